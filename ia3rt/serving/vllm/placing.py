"""Finds the layers of a vLLM model that an adapter's sites are: vLLM packs some of the checkpoint's layers into one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import Tensor
from vllm.model_executor.models.utils import PPMissingLayer

from ia3rt.adapters.site import Site
from ia3rt.serving.vllm.layers import IA3Layer, Side

Placed: TypeAlias = "dict[str, dict[Side, list[Tensor | None]]]"
"""By the vLLM layer's name and side: a vector, or None, for each layer that is packed into it."""


class Layers:
    """The layers that can wear a vector, by the names that a checkpoint has for them.

    Args:
        model: vLLM's model, its layers replaced.
        wrapped: all layers that vLLM gave an adapter's place, by name; some of them can wear LoRA only.
        packed: by a layer's name, the checkpoint's names of those packed into it.
        may_grow: whether a layer may get a table after the model started, which a compiled one must not.
        is_pooling: whether the model embeds or scores. vLLM serves it as the `model` of another, but adapters may be of
            what is within, as those of AutoModel are; LoRAs may too.
    """

    def __init__(
        self,
        model: Any,
        wrapped: Mapping[str, Any],
        packed: Mapping[str, list[str]],
        may_grow: bool,
        *,
        is_pooling: bool,
    ) -> None:
        self._model = model
        self._wrapped = wrapped
        self._packed = packed
        self._parts = {part: (name, index) for name, parts in packed.items() for index, part in enumerate(parts)}
        self._may_grow = may_grow
        self._is_pooling = is_pooling
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        self._mapper = None if mapper is None else mapper.get_rename_mapper()
        self.wearing: dict[str, IA3Layer] = {
            name: layer for name, layer in wrapped.items() if isinstance(layer, IA3Layer)
        }

    def place(self, name: str, vectors: Mapping[Site, Tensor]) -> Placed:
        """Sorts a mix's vectors by layer. Sites of other pipeline stages are left out.

        Args:
            name: the adapter, as error messages call it.
            vectors: float32 [width] by site.

        Raises:
            ValueError: the model has no such layer, of that width, that can wear a vector on that side.
        """
        placed: Placed = {}
        for site, vector in vectors.items():
            path = self._served(site.path)
            whole, index = self._parts.get(path, (path, 0))
            layer = self._wrapped.get(whole)
            if layer is None and self._is_elsewhere(whole):
                continue
            self._check(name, site, path, whole, index, layer)
            sides = placed.setdefault(whole, {})
            parts = sides.setdefault(site.side, [None] * len(layer.ia3_widths(site.side)))  # type: ignore[union-attr]
            if parts[index] is not None:
                raise ValueError(
                    f"adapter {name!r} cannot be served: it has two vectors for one place of the served model, {whole} "
                    f"(part {index}, {site.side}put), one of them at {site}: leave one of them"
                )
            parts[index] = vector
        return placed

    def _served(self, path: str) -> str:
        """The served model's path of a layer. vLLM's rules are for names of weights: one may begin or end in a dot."""
        weight = None if self._mapper is None else self._mapper._map_name(f"{path}.weight")
        path = path if weight is None else weight.removesuffix(".weight")
        if self._is_pooling and not self._has(path) and self._has(f"model.{path}"):
            return f"model.{path}"
        return path

    def _has(self, path: str) -> bool:
        return path in self._parts or path in self._wrapped or self._is_elsewhere(path)

    def _check(self, name: str, site: Site, path: str, whole: str, index: int, layer: Any) -> None:
        refused = f"adapter {name!r} cannot be served: it acts at {site}, "
        if layer is None:
            raise ValueError(
                refused + "and the served model has no such layer, or none that --lora-target-modules names"
            )
        if site.side == "out" and whole == path and whole in self._packed and whole not in self._packed[whole]:
            raise ValueError(
                refused + f"which vLLM made of {', '.join(self._packed[whole])}: name those, each with its own vector"
            )
        if isinstance(layer, IA3Layer) and layer.ia3_refusal is not None:
            raise ValueError(refused + layer.ia3_refusal)
        widths = layer.ia3_widths(site.side) if isinstance(layer, IA3Layer) else ()
        if index >= len(widths):
            kind = type(layer.base_layer).__name__ if hasattr(layer, "base_layer") else type(layer).__name__
            raise ValueError(
                refused + f"where vLLM has {whole}, a {kind}, which can wear no vector at its {site.side}put"
            )
        if widths[index] != site.width:
            raise ValueError(
                refused + f"but the served model's is {widths[index]} wide. It was made for a model of another size"
            )
        if site.side == "out" and layer.base_layer.skip_bias_add and layer.base_layer.bias is not None:
            raise ValueError(refused + "whose bias vLLM adds later, outside of what a vector scales")
        if not self._may_grow and site.side not in layer.ia3_tables:
            raise ValueError(
                refused + "where the compiled model has no room for a vector: start the server with --enforce-eager"
            )

    def _is_elsewhere(self, path: str) -> bool:
        """Whether another pipeline stage has this layer."""
        module = self._model
        for part in path.split("."):
            if isinstance(module, PPMissingLayer):
                return True
            module = getattr(module, part, None)
            if module is None:
                return False
        return isinstance(module, PPMissingLayer)

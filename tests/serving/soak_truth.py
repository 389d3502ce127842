"""What each answer of the soak should be: Hugging Face's model in float64, each row with numbers of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

WIDTHS = {"self_attn.k_proj": 64, "self_attn.v_proj": 64, "mlp.down_proj": 192}
LAYERS = 2
MARGIN = 1e-3
"""How far below the likeliest token's logit, in float64, one may be that float32 takes for the likeliest."""
_BATCH = 512


@dataclass(frozen=True)
class Worn:
    """What a request wears, as numbers of adapters.

    Attributes:
        adapters: none for the base model; -1 alone for the LoRA.
        kind: how they combine.
        weights: one for each adapter; of a product there are none.
    """

    adapters: tuple[int, ...] = ()
    kind: str = "product"
    weights: tuple[float, ...] = ()


LORA = Worn((-1,))


class Reference:
    """The truth about the adapters 0, 1, … of random vectors.

    Args:
        model: the small model's folder.
        folder: where the adapters are written, each in a folder named by its number.
        count: how many.
        lora: a LoRA's folder.
    """

    def __init__(self, model: Path, folder: Path, count: int, lora: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
        self._lora = peft.PeftModel.from_pretrained(base, lora).eval().double()
        self._folder, self._base = folder, str(model)
        self._vectors: dict[str, Tensor] = {}
        self._rows: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(0)
        for layer in range(LAYERS):
            for name, width in WIDTHS.items():
                path = f"model.layers.{layer}.{name}"
                self._vectors[path] = 1 + 0.3 * torch.randn(count, width, generator=generator)
                self._hook(path)
        for number in range(count):
            self.write(folder / str(number), {path: vectors[number] for path, vectors in self._vectors.items()})

    def write(self, folder: Path, vectors: dict[str, Tensor]) -> Path:
        """Writes an adapter in the layout of PEFT's checkpoints."""
        folder.mkdir(parents=True, exist_ok=True)
        shapes = {path: (1, -1) if path.endswith("down_proj") else (-1, 1) for path in vectors}
        tensors = {
            f"base_model.model.{path}.ia3_l": vector.reshape(shapes[path]).clone() for path, vector in vectors.items()
        }
        save_file(tensors, folder / "adapter_model.safetensors")
        config = dict(peft_type="IA3", task_type="CAUSAL_LM", base_model_name_or_path=self._base)
        config |= dict(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    def wrong(self, asked: Sequence[tuple[tuple[int, ...], list[int], tuple[Worn, ...]]]) -> list[int]:
        """The places in `asked` of answers that are right for nothing that they may be the answer of.

        Args:
            asked: a prompt, its answer, and what was worn, or what else may have been while that was replaced.
        """
        tries = [(place, worn) for place, (_, _, possible) in enumerate(asked) for worn in possible]
        right = set()
        by_shape: dict[tuple[int, int, bool], list[tuple[int, Worn]]] = {}
        for place, worn in tries:
            prompt, answer, _ = asked[place]
            by_shape.setdefault((len(prompt), len(answer), worn == LORA), []).append((place, worn))
        for (_, _, is_lora), group in by_shape.items():
            for start in range(0, len(group), _BATCH):
                batch = group[start : start + _BATCH]
                rows = [asked[place][:2] for place, _ in batch]
                gaps = self._gaps(rows, [worn for _, worn in batch], is_lora)
                right.update(place for (place, _), gap in zip(batch, gaps, strict=True) if gap <= MARGIN)
        return [place for place in range(len(asked)) if place not in right]

    @torch.no_grad()
    def _gaps(self, rows: Sequence[tuple[tuple[int, ...], list[int]]], worn: list[Worn], is_lora: bool) -> list[float]:
        """How far below the likeliest each answer's unlikeliest token is."""
        prompts, answers = (torch.tensor([row[part] for row in rows]) for part in (0, 1))
        ids = torch.cat([prompts, answers[:, :-1]], dim=1)
        if not is_lora:
            self._rows = {path: self._scales(path, worn) for path in self._vectors}
        logits = (self._lora if is_lora else self._model)(input_ids=ids).logits[:, prompts.shape[1] - 1 :]
        given = logits.gather(-1, answers[..., None])[..., 0]
        return (logits.amax(-1) - given).amax(-1).tolist()

    def _scales(self, path: str, worn: list[Worn]) -> Tensor:
        vectors = self._vectors[path].double()
        scales = torch.ones(len(worn), vectors.shape[1], dtype=torch.float64)
        for row, each in enumerate(worn):
            if not each.adapters:
                continue
            of_row = vectors[list(each.adapters)]
            weights = torch.tensor(each.weights, dtype=torch.float64)
            if each.kind == "product":
                scales[row] = of_row.prod(0)
            elif each.kind == "linear":
                scales[row] = weights @ of_row
            else:
                scales[row] = 1 + weights @ (of_row - 1)
        return scales

    def _hook(self, path: str) -> None:
        layer = self._model.get_submodule(path)
        if path.endswith("down_proj"):
            layer.register_forward_pre_hook(lambda _, given: (given[0] * self._rows[path][:, None],))
        else:
            layer.register_forward_hook(lambda _, given, out: out * self._rows[path][:, None])

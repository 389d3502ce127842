"""The drop-in of a linear layer that tensor parallelism splits: each process multiplies its part of a vector."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ia3rt.adapters.site import Side
from ia3rt.modules import eager
from ia3rt.modules.layer import IA3Layer
from ia3rt.modules.sharding import is_distributed
from ia3rt.modules.split import Part, part_of
from ia3rt.modules.wearer import How
from ia3rt.routing.worn import Worn


class IA3SplitLayer(IA3Layer):
    """A linear layer of which this process has a part. The bank has vectors whole, in each process.

    Attributes:
        ia3_part: what of them is multiplied here.
    """

    ia3_part: Part

    def ia3_begin(self) -> None:
        """Sees which part it has, while its parameters are the split ones: during a forward others may stand there."""
        super().ia3_begin()
        vars(self)["ia3_part"] = part_of(self)

    def ia3_scale(self, position: int, x: Tensor, worn: Worn) -> Tensor | None:
        """As of any drop-in, and of it what belongs to the part of the layer that is here."""
        scale = super().ia3_scale(position, x, worn)
        if scale is None or not scale.dim() or position != self._ia3_position(self.ia3_part.side):
            return scale
        return scale[..., self.ia3_part.columns]

    def ia3_forward(
        self,
        worn: Worn,
        l_in: int | None,
        l_out: int | None,
        x: Tensor,
        rest: tuple[tuple[Any, ...], dict[str, Any]] | None = None,
    ) -> Tensor:
        """As of any linear layer. Of DTensors, which a plan may have it compute with, what is here is multiplied."""
        if not is_distributed(x):
            return super().ia3_forward(worn, l_in, l_out, x, rest)
        y = super().ia3_forward(worn, None, None, self._scaled("in", worn, l_in, x), rest)
        return self._scaled("out", worn, l_out, y)  # type: ignore[no-any-return]

    def _scaled(self, side: Side, worn: Worn, position: int | None, x: Any) -> Any:
        """A DTensor with what is here of it multiplied.

        Raises:
            ValueError: it is not placed as the weight is, so that other numbers are here than those of the part.
        """
        if position is None:
            return x
        (placement,) = x.placements
        is_whole = placement.is_replicate() or (placement.is_partial() and placement.reduce_op in ("sum", "avg"))
        if not (placement.is_shard(x.dim() - 1) if side == self.ia3_part.side else is_whole):
            site = list(self.ia3_routing.bank.sites.values())[position]
            raise ValueError(
                f"the {side}put at {site} is placed {list(x.placements)} over the processes, which have their parts "
                f"of the layer's {self.ia3_part.side}puts: a vector acts where its {self.ia3_part.side}put is split in "
                "its last dimension, and the other is not split"
            )
        local = x.to_local()
        scale = self.ia3_scale(position, local, worn)
        if scale is None:
            return x
        return type(x).from_local(
            eager.scaled(local, scale),
            x.device_mesh,
            x.placements,
            run_check=False,
            shape=x.shape,
            stride=x.stride(),
        )

    def _ia3_position(self, side: Side) -> int | None:
        return self.ia3_in if side == "in" else self.ia3_out

    def _how(self, side: Side, rows: int) -> How:
        how = super()._how(side, rows)
        if side != self.ia3_part.side:
            return how
        part = self.ia3_part.columns
        return how._replace(why=f"{how.why}; of the vector, {part.start} to {part.stop - 1} in this process")

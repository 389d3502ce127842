"""The drop-in of a convolution: a layer whose vectors go over channels, which are not its last dimension."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ia3rt.modules.channels import spatial_dims
from ia3rt.modules.layer import IA3Layer
from ia3rt.routing.worn import Worn


class IA3Convolution(IA3Layer):
    """A Conv1d, Conv2d or Conv3d whose input and output are scaled by channel; [C, *sizes] or [N, C, *sizes].

    An input vector of a convolution with groups has a number for each channel of the input, as in PEFT.
    """

    def ia3_scale(self, position: int, x: Tensor, worn: Worn) -> Tensor | None:
        """What x, [..., C, *sizes], is multiplied by; see `Wearer.ia3_scale`, to which the channels come last."""
        after = spatial_dims(self)
        scale = super().ia3_scale(position, x.movedim(-1 - after, -1), worn)
        if scale is None or scale.dim() == 0:  # a one, as of a site that the model got since
            return scale
        return scale.movedim(-1, -1 - after) if scale.dim() > 1 else scale.view(-1, *(1,) * after)

    def _by_kernel(self, *_: Any) -> None:
        """No kernel reads a convolution's weight."""

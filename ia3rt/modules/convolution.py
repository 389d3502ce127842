"""The drop-in of a convolution: a layer whose vectors go over channels, which are not its last dimension."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from ia3rt.modules.channels import CONVOLUTIONS, spatial_dims
from ia3rt.modules.layer import IA3Layer
from ia3rt.modules.own_result import own_result
from ia3rt.modules.wearer import original_class
from ia3rt.routing.worn import Worn


class IA3Convolution(IA3Layer):
    """A Conv1d, Conv2d or Conv3d whose input and output are scaled by channel; [C, *sizes] or [N, C, *sizes].

    An input vector of a convolution with groups has a number for each channel of the input, as in PEFT.
    """

    ia3_own: ClassVar[Callable[[nn.Module, Tensor], Tensor | None] | None]

    def __init_subclass__(cls) -> None:
        """Looks at the original class once, when the drop-in class is made."""
        super().__init_subclass__()
        cls.ia3_own = own_result(original_class(cls), CONVOLUTIONS)

    def ia3_scale(self, position: int, x: Tensor, worn: Worn) -> Tensor | None:
        """What x, [..., C, *sizes], is multiplied by; see `Wearer.ia3_scale`, to which the channels come last."""
        after = spatial_dims(self)
        scale = super().ia3_scale(position, x.movedim(-1 - after, -1), worn)
        if scale is None or scale.dim() == 0:  # a one, as of a site that the model got since
            return scale
        return scale.movedim(-1, -1 - after) if scale.dim() > 1 else scale.view(-1, *(1,) * after)

    def _by_kernel(self, *_: Any) -> None:
        """No kernel reads a convolution's weight."""

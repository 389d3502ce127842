"""The drop-in of an embedding: a layer that wears a vector at its output; its input are indices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from ia3rt.modules.layer import IA3Layer
from ia3rt.modules.own_result import own_result
from ia3rt.modules.wearer import original_class


class IA3Embedding(IA3Layer):
    """An nn.Embedding whose output is scaled; a layer that shares its weight wears nothing of it."""

    ia3_own: ClassVar[Callable[[nn.Module, Tensor], Tensor | None] | None]

    def __init_subclass__(cls) -> None:
        """Looks at the original class once, when the drop-in class is made."""
        super().__init_subclass__()
        cls.ia3_own = own_result(original_class(cls), (nn.Embedding,))

    def _by_kernel(self, *_: Any) -> None:
        """No kernel looks indices up."""

"""The drop-in of an embedding: a layer that wears a vector at its output; its input are indices."""

from __future__ import annotations

from typing import Any

from ia3rt.modules.layer import IA3Layer


class IA3Embedding(IA3Layer):
    """An nn.Embedding whose output is scaled; a layer that shares its weight wears nothing of it."""

    def _by_kernel(self, *_: Any) -> None:
        """No kernel looks indices up."""

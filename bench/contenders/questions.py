"""What is asked about one document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Questions:
    """A document that all rows have read, and what each is asked about it.

    Attributes:
        document: int64 [1, tokens].
        asked: int64 [rows, tokens].
        worn: the adapter of each row.
        tokens: how many each answers, at least two.
        once: whether the base model reads the document once for all; else each row reads it, wearing its adapter.
    """

    document: Tensor
    asked: Tensor
    worn: Sequence[str]
    tokens: int
    once: bool

    @property
    def prompts(self) -> Tensor:
        """The document and the questions: int64 [rows, tokens]."""
        return torch.cat([self.document.expand(len(self.asked), -1), self.asked], 1)

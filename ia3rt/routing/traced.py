"""Whether a compiler reads along."""

from __future__ import annotations

import torch


def is_traced() -> bool:
    """Whether a compiler or an export reads this; not where such a one calls code that it does not read.

    `torch.compiler.is_compiling` is true there too.
    """
    return torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting()

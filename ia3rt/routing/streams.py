"""The current stream of a CUDA device, by a look at its number: torch.cuda.current_stream takes as long as a launch."""

from __future__ import annotations

from typing import TypeAlias

import torch

from ia3rt.adapters.bank import Bank

Streams: TypeAlias = tuple[torch.cuda.Stream | None, ...]
"""A stream for each of a bank's tables, None for one that is on no CUDA device; none where no table is."""

_seen: dict[tuple[int, int], torch.cuda.Stream] = {}


def current_stream(device: torch.device) -> torch.cuda.Stream:
    """What torch.cuda.current_stream returns; one object for each stream, which CUDA tells apart by the number too."""
    index = device.index
    key = index, torch._C._cuda_getCurrentRawStream(index)
    stream = _seen.get(key)
    if stream is None:
        stream = _seen[key] = torch.cuda.current_stream(device)
    return stream


def current_streams(bank: Bank) -> Streams:
    """The streams that what is done now with a bank's tables is done in."""
    if not bank.is_cuda:
        return ()
    return tuple(current_stream(here.device) if here.table.is_cuda else None for here in bank.tables)

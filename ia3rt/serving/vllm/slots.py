"""Which of vLLM's adapter slots each token of a step wears: a LoRA's, an IA³ mix's, or none."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch


class TokenSlots:
    """The slot of each token of the step that runs.

    vLLM's graphs are captured once and replayed, so what a step decides is in tensors that stay where they are.

    Attributes:
        identity: the number of the row of ones that follows the slots' rows in a table, which is the number of slots.
        index: int32 [max_tokens], the row of each token, on the model's device. Rows past the step's tokens wear the
            identity: graphs are padded, and must not read what an earlier step left there.
        active: int32 [1], on the CPU: whether any token wears a row that is not the identity.
        mixes: int32 [slots + 1, 4], on the model's device: the kernels' mix table (kernels/mixes.py), in which mix i is
            row i alone.
        runs: (first token, one past the last, row) of tokens in a row that wear the same; without those that wear none.
        tokens: how many the step has.
        step: counts the steps, for those who keep what they made of one.
        lora: whether any token wears a LoRA.
        numbers: vLLM's number of the adapter in each slot that tokens wear.
        unworn: the numbers of adapters that a layer could not put on in this step.
    """

    def __init__(self, max_tokens: int, slots: int, device: torch.device) -> None:
        self.identity = slots
        self.index = torch.empty(max_tokens, dtype=torch.int32, device=device)
        self.active = torch.zeros(1, dtype=torch.int32, device="cpu")
        self.mixes = torch.empty(slots + 1, 4, dtype=torch.int32, device=device)
        self.runs: list[tuple[int, int, int]] = []
        self.step = 0
        self.lora = False
        self.numbers: dict[int, int] = {}
        self.unworn: set[int] = set()
        self.reset()

    @property
    def worn(self) -> bool:
        """Whether any token of the step wears an adapter, IA³ or a LoRA."""
        return self.lora or bool(self.runs)

    def reset(self) -> None:
        """Writes all of it, in place: nothing is worn. A device that slept may have lost what was there."""
        rows = torch.arange(self.identity + 1, dtype=torch.int32, device="cpu")
        one = torch.ones(len(rows), dtype=torch.float32, device="cpu").view(torch.int32)
        self.mixes.copy_(torch.stack([torch.zeros_like(rows), torch.ones_like(rows), rows, one], dim=1))
        self.tokens = len(self.index)
        self.write([], lora=False)

    def write(self, rows: Sequence[int], *, lora: bool) -> None:
        """Says which row each token wears, in place.

        Args:
            rows: a row for each token of the step; `identity` for none.
            lora: whether any of them wears a LoRA.

        Raises:
            ValueError: there are more tokens than vLLM said there would be.
        """
        count = len(rows)
        if count > len(self.index):
            raise ValueError(f"a step of {count} tokens, but the most was to be {len(self.index)}")
        self.lora = lora
        self.step += 1
        self.runs, start = [], 0
        for row, tokens in groupby(rows):
            stop = start + sum(1 for _ in tokens)
            if row != self.identity:
                self.runs.append((start, stop, row))
            start = stop
        self.active[0] = bool(self.runs)
        # From pinned memory, so that the host need not wait for what the device is doing.
        given = torch.tensor(rows, dtype=torch.int32, device="cpu", pin_memory=self.index.is_cuda)
        self.index[:count].copy_(given, non_blocking=True)
        if self.tokens > count:
            self.index[count : self.tokens].fill_(self.identity)
        self.tokens = count

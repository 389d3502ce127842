"""What a step writes for the graphs and for plain torch to read."""

from __future__ import annotations

import pytest

from ia3rt.serving.vllm.slots import TokenSlots

SLOTS, TOKENS = 5, 40


def test_what_a_graph_reads_stays_where_it_is(device) -> None:
    slots = TokenSlots(TOKENS, SLOTS, device)
    before = [tensor.data_ptr() for tensor in (slots.index, slots.active, slots.mixes)]
    slots.write([4] * 7, lora=True)
    assert [tensor.data_ptr() for tensor in (slots.index, slots.active, slots.mixes)] == before
    assert slots.lora and slots.active.tolist() == [1]
    slots.write([SLOTS], lora=False)
    assert not slots.lora and slots.active.tolist() == [0]
    assert slots.index.unique().tolist() == [SLOTS]


def test_runs_leave_out_what_wears_nothing(device) -> None:
    slots = TokenSlots(TOKENS, SLOTS, device)
    slots.write([SLOTS, 3, 3, SLOTS, 1, 0, 0], lora=False)
    assert slots.runs == [(1, 3, 3), (4, 5, 1), (5, 7, 0)]
    slots.write([SLOTS, SLOTS], lora=False)
    assert slots.runs == []


def test_more_tokens_than_announced_are_refused(device) -> None:
    with pytest.raises(ValueError, match=f"{TOKENS + 1} tokens"):
        TokenSlots(TOKENS, SLOTS, device).write([0] * (TOKENS + 1), lora=False)

"""Switching on a GPU: the host waits for nothing, and what is on its way to the device is not overwritten."""

import pytest
import torch
from tiny import logits, patched, tiny_model, token_ids

import ia3rt

NAMES = "abcdefgh"


@pytest.fixture(params=["triton", "torch"])
def runtime(request: pytest.FixtureRequest) -> ia3rt.Runtime:
    return patched(tiny_model("llama", torch.bfloat16).cuda(), NAMES, backend=request.param)


def test_switching_waits_for_no_device(runtime) -> None:
    specs = ["a", None, ["a", "b"], {"a": 0.3, "c": 0.9}]
    for spec in specs:
        runtime.set_adapter(spec)
    runtime.route([*specs, "d"])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for spec in specs:
            runtime.set_adapter(spec)
            runtime.route([*specs[1:], spec, "d"])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("by_row", [False, True])
def test_a_forward_wears_what_was_set_before_it(by_row, runtime) -> None:
    """The device is kept busy meanwhile, so that a hundred switches are ahead of their forwards."""
    model, ids = runtime.model, token_ids(2).cuda()
    specs = [([NAMES[turn % 8], NAMES[turn // 8 % 8]] if by_row else NAMES[turn * 3 % 8]) for turn in range(100)]
    wear = runtime.route if by_row else runtime.set_adapter
    expected = []
    for spec in specs:
        wear(spec)
        expected.append(logits(model, ids))
        torch.cuda.synchronize()
    busy, answers = torch.rand(8192, 8192, device="cuda"), []
    with torch.no_grad():
        for _ in range(20):
            busy = busy @ busy / 8192
        for spec in specs:
            wear(spec)
            answers.append(model(ids, use_cache=False).logits)
    for spec, answer, right in zip(specs, answers, expected, strict=True):
        assert torch.equal(answer, right), spec

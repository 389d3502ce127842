"""What a stage of a model could not read comes to the last one, whose output the scheduler sees."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.sequence import IntermediateTensors
from vllm.v1.worker import gpu_model_runner
from vllm.v1.worker.gpu import model_runner

from ia3rt.serving.vllm import stages
from ia3rt.serving.vllm.failing import FIELD

HIDDEN = {"hidden_states": torch.ones(2, 4)}


def stage(unreadable: set[int], output: object) -> tuple[SimpleNamespace, list[dict]]:
    """A runner whose step cannot read these and returns this, and what its steps were given."""
    given: list[dict] = []

    def original(self, scheduler_output, intermediate_tensors):
        given.append({} if intermediate_tensors is None else dict(intermediate_tensors.tensors))
        setattr(self.lora_manager, FIELD, set(unreadable))  # as a step begins with
        return output() if callable(output) else output

    runner = SimpleNamespace(
        lora_manager=SimpleNamespace(**{FIELD: set()}),
        intermediate_tensors=None,
        model=SimpleNamespace(make_empty_intermediate_tensors=lambda **kwargs: kwargs),
        max_num_tokens=8,
        model_config=SimpleNamespace(dtype=torch.float32),
        device="cpu",
        step=stages._execute_model(original),
    )
    return runner, given


@pytest.mark.parametrize(
    "unreadable",
    [({3}, set(), set()), (set(), {5}, set()), ({3, 9}, {5}, {7}), (set(), set(), set())],
)
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_the_last_one_tells_of_all(monkeypatch, unreadable, processes) -> None:
    monkeypatch.setattr(stages, "get_tp_group", lambda: SimpleNamespace(world_size=processes))
    handed = None
    for number, own in enumerate(unreadable):
        is_last = number == len(unreadable) - 1
        runner, given = stage(own, None if is_last else lambda: IntermediateTensors(dict(HIDDEN)))
        output = runner.step(runner, None, handed)
        assert given == [HIDDEN if number else {}]  # what vLLM copies has vLLM's names only
        assert runner.lora_manager.ia3rt_hands_on
        if number:
            assert runner.intermediate_tensors["batch_size"] == 8
        if not is_last:
            told = output.tensors.get(FIELD)
            # vLLM cuts a tensor that its processes can share evenly.
            assert told is None or processes == 1 or told.numel() % processes
            handed = output
    assert getattr(runner.lora_manager, FIELD) == set().union(*unreadable)


def test_a_model_without_adapters_is_vllms_own() -> None:
    def original(self, scheduler_output, intermediate_tensors):
        return scheduler_output, intermediate_tensors

    assert stages._execute_model(original)(SimpleNamespace(), 1, 2) == (1, 2)


@pytest.mark.parametrize("runners", [gpu_model_runner, model_runner], ids=["first", "second"])
def test_both_of_vllms_runners_hand_on(monkeypatch, runners) -> None:
    def original(self, scheduler_output, intermediate_tensors=None, is_profile=False):
        return scheduler_output, is_profile

    for each in (gpu_model_runner, model_runner):
        monkeypatch.setattr(each.GPUModelRunner, "execute_model", original)
    stages.install()
    runner = SimpleNamespace(lora_manager=SimpleNamespace(**{FIELD: set()}))
    assert runners.GPUModelRunner.execute_model(runner, "step", is_profile=True) == ("step", True)
    assert runner.lora_manager.ia3rt_hands_on

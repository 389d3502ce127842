"""What vLLM's own scheduler and workers' manager make of an adapter that cannot be read in the middle of a step."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm.config import CacheConfig, DeviceConfig, LoRAConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import FinishReason
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from ia3rt.serving.vllm import failing, register, worker_manager

BLOCK = 16
PROMPT = list(range(1, 3 * BLOCK + 2))
GOOD, GONE = LoRARequest("good", 1, "/store/good"), LoRARequest("gone", 2, "/store/gone")


@pytest.fixture(scope="module", autouse=True)
def plugin() -> None:
    register()


@pytest.fixture
def scheduler(tmp_path: Path) -> Scheduler:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 32}
    config |= {"num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 99, "max_position_embeddings": 512}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = ModelConfig(model=str(tmp_path), skip_tokenizer_init=True, dtype="float32", max_model_len=256)
    scheduling = SchedulerConfig(
        max_num_seqs=8, max_num_batched_tokens=512, max_model_len=256, is_encoder_decoder=False, async_scheduling=False
    )
    cache = CacheConfig(block_size=BLOCK, enable_prefix_caching=True)
    cache.num_gpu_blocks = 64
    whole = VllmConfig(
        model_config=model,
        scheduler_config=scheduling,
        cache_config=cache,
        device_config=DeviceConfig("cpu"),
        lora_config=LoRAConfig(max_loras=4, max_lora_rank=8),
    )
    layer = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=16, dtype=torch.float32)
    blocks = KVCacheConfig(num_blocks=64, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], layer)])
    init_none_hash(sha256)
    return Scheduler(
        vllm_config=whole,
        kv_cache_config=blocks,
        structured_output_manager=StructuredOutputManager(whole),
        block_size=BLOCK,
        hash_block_size=BLOCK,
    )


def add(scheduler: Scheduler, name: str, worn: LoRARequest | None) -> None:
    request = Request(
        request_id=name,
        prompt_token_ids=PROMPT,
        sampling_params=SamplingParams(max_tokens=4, ignore_eos=True),
        pooling_params=None,
        lora_request=worn,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
    )
    scheduler.add_request(request)


class Later(AsyncModelRunnerOutput):
    """A step's output that another thread waits for, as on a GPU."""

    def __init__(self, output: ModelRunnerOutput) -> None:
        self.kept = output

    def get_output(self) -> ModelRunnerOutput:
        return self.kept

    def get_kv_connector_output(self) -> None:
        return None


def step(
    scheduler: Scheduler, unreadable: frozenset[int] = frozenset(), *, later: bool = False
) -> dict[str, tuple[list[int], object]]:
    """Runs a step in which every request gets token 7; returns the tokens that each is told, and why it ends."""
    scheduled = scheduler.schedule()
    names = list(scheduled.num_scheduled_tokens)
    output = ModelRunnerOutput(names, {name: row for row, name in enumerate(names)}, [[7] for _ in names])
    manager = SimpleNamespace(**{failing.FIELD: unreadable})
    worker = SimpleNamespace(model_runner=SimpleNamespace(lora_manager=manager))
    output = failing.tell(worker, Later(output)).get_output() if later else failing.tell(worker, output)
    told = scheduler.update_from_output(scheduled, output)
    said: dict[str, tuple[list[int], object]] = {}
    for each in (each for outputs in told.values() for each in outputs.outputs):
        tokens, _ = said.get(each.request_id, ([], None))
        said[each.request_id] = [*tokens, *each.new_token_ids], each.finish_reason
    return said


@pytest.mark.parametrize("later", [False, True])
def test_its_requests_fail_and_no_others(scheduler, later) -> None:
    for name, worn in (("g", GONE), ("a", GOOD), ("b", None)):
        add(scheduler, name, worn)
    told = step(scheduler, frozenset({GONE.lora_int_id}), later=later)
    assert told == {"g": ([], FinishReason.ERROR), "a": ([7], None), "b": ([7], None)}
    assert step(scheduler).keys() == {"a", "b"} and "g" not in scheduler.requests


def test_one_that_wore_it_before_fails_in_the_middle(scheduler) -> None:
    add(scheduler, "g", GONE)
    assert step(scheduler) == {"g": ([7], None)}
    assert step(scheduler, frozenset({GONE.lora_int_id})) == {"g": ([], FinishReason.ERROR)}


@pytest.mark.parametrize("is_unreadable", [False, True])
def test_what_it_left_in_the_prefix_cache_is_forgotten(scheduler, is_unreadable) -> None:
    add(scheduler, "g", GONE)
    add(scheduler, "a", GOOD)
    step(scheduler, frozenset({GONE.lora_int_id} if is_unreadable else ()))
    add(scheduler, "g2", GONE)
    add(scheduler, "a2", GOOD)
    computed = scheduler.schedule().num_scheduled_tokens  # what the cache does not have
    assert computed["g2"] == (len(PROMPT) if is_unreadable else len(PROMPT) - 3 * BLOCK)
    assert computed["a2"] == len(PROMPT) - 3 * BLOCK


@pytest.mark.parametrize("lost", ["its client left", "it was preempted"])
def test_nor_does_one_leave_anything_that_lost_its_blocks_in_the_step(scheduler, lost) -> None:
    add(scheduler, "g", GONE)
    scheduled = scheduler.schedule()
    if lost == "its client left":
        scheduler.finish_requests("g", RequestStatus.FINISHED_ABORTED)
    else:  # by the next step, which vLLM schedules while this one runs
        scheduler._preempt_request(scheduler.running.pop(), 0.0)
    output = ModelRunnerOutput(["g"], {"g": 0}, [[7]])
    setattr(output, failing.FIELD, frozenset({GONE.lora_int_id}))
    scheduler.update_from_output(scheduled, output)
    add(scheduler, "g2", GONE)
    assert scheduler.schedule().num_scheduled_tokens["g2"] == len(PROMPT)


@pytest.mark.parametrize(
    ("stages", "is_told", "hands_on", "is_raised"),
    [(1, True, False, False), (1, False, False, True), (2, True, True, False), (2, True, False, True)],
)
def test_where_nobody_is_told_it_is_raised(monkeypatch, stages, is_told, hands_on, is_raised) -> None:
    """Or its requests would be answered as the base model's."""
    monkeypatch.setattr(worker_manager, "get_pp_group", lambda: SimpleNamespace(world_size=stages))
    manager = worker_manager.IA3WorkerManager.__new__(worker_manager.IA3WorkerManager)
    manager.ia3rt_is_told, manager.ia3rt_hands_on = is_told, hands_on

    def unreadable(request: LoRARequest) -> bool:
        raise ValueError("gone")

    manager.add_adapter = unreadable
    if is_raised:
        with pytest.raises(ValueError, match="gone"):
            manager._is_unreadable(GONE)
    else:
        assert manager._is_unreadable(GONE)


def test_a_workers_step_says_that_it_tells() -> None:
    manager = SimpleNamespace(**{failing.FIELD: set()})
    worker = SimpleNamespace(model_runner=SimpleNamespace(lora_manager=manager))
    step = failing._execute_model(lambda self, output: output)
    assert step(SimpleNamespace(worker=worker), "output") == "output" and manager.ia3rt_is_told

"""A thousand hostile adapters and mixes in real engines, and innocent requests that get the blocks that they wrote.

Nothing refuses them here, as they go straight to the engine. The truth is what the same engine answered before, one
request at a time, so that each is computed in steps of the same shape; it has room for three requests in its cache.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from small_model import CONFIG, save_small_model
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from ia3rt.adapters.checkpoint import write_checkpoint
from ia3rt.adapters.mix import Mix
from ia3rt.adapters.site import Site
from ia3rt.bench.serving.server import ON_CPU
from ia3rt.serving.vllm import told_engine
from ia3rt.serving.vllm.source import Source

HOSTILE = 340
VALUES = (1e38, -3e38, 3e4, 1e20, -1e30, 3.4e38, 0.0)
PLACES = [("self_attn.k_proj", "out", 64), ("self_attn.v_proj", "out", 64), ("mlp.down_proj", "in", 192)]


def sites(places: list[tuple[str, str, int]]) -> list[Site]:
    layers = range(CONFIG.num_hidden_layers)
    return [Site(f"model.layers.{layer}.{name}", side, width) for layer in layers for name, side, width in places]


def hostile(folder: Path, number: int) -> LoRARequest:
    """An adapter everywhere or at one kind of layer, of large values of both signs, or a mix of two of it."""
    generator = torch.Generator().manual_seed(number)
    at = sites(PLACES if number % 4 == 0 else [PLACES[number % 4 - 1]])
    value = VALUES[number % len(VALUES)]
    vectors = {site: value * (2 * torch.rand(site.width, generator=generator) - 1) for site in at}
    path = folder / str(number)
    write_checkpoint(path, vectors, [site.path for site in at], {"base_model_name_or_path": "small"}, {}, [])
    if number % 3:
        return LoRARequest(f"hostile{number}", number + 1, str(path))
    weights = ((1e38, 0.3), (1e300, -1e300), (-1e10, 1e-3))[number % 5 % 3]
    source = Source(Mix(("a", "b"), weights, "linear"), {"a": str(path), "b": str(path)})
    return LoRARequest(f"hostile{number}", number + 1, source.path())


@pytest.mark.parametrize(
    "dtype", ["float16", *(pytest.param(x, marks=pytest.mark.slow) for x in ("bfloat16", "float32"))]
)
def test_no_innocent_answer_changes(dtype, tmp_path, monkeypatch) -> None:
    for name, value in {**ON_CPU, "HF_HUB_OFFLINE": "1", "VLLM_CACHE_ROOT": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    # What is refused before the engine knows of it (test_offline) is let through: here the engine has to stand it.
    monkeypatch.setattr(told_engine, "check", lambda request, dtype: True)
    (tmp_path / "small").mkdir()
    save_small_model(tmp_path / "small")
    options = dict(enable_lora=True, max_lora_rank=1, max_loras=4, max_cpu_loras=8, enforce_eager=True)
    options |= dict(num_gpu_blocks_override=12, block_size=32, max_model_len=128, max_num_seqs=4)
    engine = LLM(str(tmp_path / "small"), dtype=dtype, enable_prefix_caching=False, **options)
    greedy = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)

    def answers(prompts: list[list[int]], worn: LoRARequest | None) -> list[list[int]]:
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        done = engine.generate(given, greedy, lora_request=[worn] * len(prompts), use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in done]

    chance = random.Random(0)
    innocent = [[chance.randrange(256) for _ in range(5 + 7 * number)] for number in range(4)]
    before = [answers([prompt], None) for prompt in innocent]
    changed = []
    for number in range(HOSTILE):
        lengths = [chance.randrange(20, 100) for _ in range(3)]
        answers([[chance.randrange(256) for _ in range(length)] for length in lengths], hostile(tmp_path, number))
        asked = number % len(innocent)
        if answers([innocent[asked]], None) != before[asked]:
            changed.append(number)
    assert changed == []

"""Everything at once, on one server: innocent requests, hostile ones and mishaps; no innocent answer is wrong.

In a minute and a half as many requests as this machine answers; with `-m slow` a hundred thousand.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import soak_faults
import soak_traffic
import torch
from server import Server
from small_model import save_small_model
from soak_faults import Faults
from soak_traffic import ADAPTERS, SWAPPED, Traffic, Version
from soak_truth import Reference, Worn
from transformers import AutoModelForCausalLM
from truth import make_lora

from ia3rt.serving.settings import ALLOW_ADAPTERS

OPTIONS = ["--dtype", "float32", "--max-model-len", "128", "--enforce-eager", "--enable-lora", "--max-lora-rank", "8"]
# Far less of everything than there are adapters; and a cache that half of the requests fill.
OPTIONS += ["--max-loras", "12", "--max-cpu-loras", "100", "--max-num-seqs", "32", "--num-gpu-blocks-override", "40"]
OPTIONS += ["--block-size", "32"]
STATIC = 100
"""Adapters that are loaded at the start; a resolver finds the others when they are first asked for."""
GROWTH = 128e6
"""Bytes by which the server's processes may grow in the second half."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("soak")
    for name in ("model", "allowed/originals", "allowed/hostile", "server"):
        (folder / name).mkdir(parents=True)
    save_small_model(folder / "model")
    make_lora(folder / "model", folder / "allowed" / "originals" / "lora")
    return folder


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    originals = folder / "allowed" / "originals"
    return Reference(folder / "model", originals, ADAPTERS, originals / "lora")


@pytest.fixture
def server(folder: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    originals = folder / "allowed" / "originals"
    modules = [f"{name}={originals / name}" for name in [*map(str, range(STATIC)), "lora"]]
    modules += [f"{name}={originals / '0'}" for name in SWAPPED]
    monkeypatch.setenv("VLLM_LORA_RESOLVER_CACHE_DIR", str(originals))
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
    monkeypatch.setenv(ALLOW_ADAPTERS, str(folder / "allowed"))
    made = Server(folder / "model", [*OPTIONS, "--lora-modules", *modules], folder / "server")
    made.start()
    made.wait()
    yield made
    made.kill()


@torch.no_grad()
def test_the_truth_is_what_peft_has(folder, reference) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    originals = folder / "allowed" / "originals"
    wrapped = peft.PeftModel.from_pretrained(base, originals / "3", adapter_name="3").eval()
    wrapped.load_adapter(originals / "7", "7")
    wrapped.add_weighted_adapter(["3", "7"], [0.7, 0.4], "sum")
    prompt = list(range(30, 50))
    for names, worn in ((["3"], Worn((3,))), (["3", "7"], Worn((3, 7))), (["sum"], Worn((3, 7), "linear", (0.7, 0.4)))):
        wrapped.base_model.set_adapter(names)
        answer: list[int] = []
        for _ in range(6):
            answer.append(int(wrapped(input_ids=torch.tensor([prompt + answer])).logits[0, -1].argmax()))
        asked = [(tuple(prompt), answer, (worn,)), (tuple(prompt), answer, (Worn(),))]
        assert reference.wrong(asked) == [1]


@pytest.mark.parametrize(
    ("seconds", "requests"), [(90, 10**5), pytest.param(3600, 10**5, marks=pytest.mark.slow)], ids=["short", "whole"]
)
def test_no_innocent_answer_is_wrong(seconds, requests, folder, server, reference, capsys) -> None:
    traffic = Traffic(server.url, random.Random(seconds))
    traffic.versions = {name: [Version(Worn((0,)), 0.0, 0.0)] for name in SWAPPED}
    allowed = folder / "allowed"
    store = folder / "server" / "cache" / "ia3rt" / "adapters"
    faults = Faults(traffic, reference, allowed / "originals", allowed / "hostile", store)
    sizes: list[float] = []

    async def measure(until: asyncio.Task) -> None:
        while not until.done():
            sizes.append(server.memory())
            await asyncio.sleep(1)

    async def everything() -> float:
        begun = time.monotonic()
        sending = asyncio.create_task(soak_traffic.send(traffic, seconds, requests))
        await asyncio.gather(sending, measure(sending), *(soak_faults.happen(faults, sending, 0.2) for _ in range(2)))
        return time.monotonic() - begun

    took = asyncio.run(everything())
    half, end = (max(sizes[:count]) for count in (len(sizes) // 2, len(sizes)))
    answered = len(traffic.asked)
    wrong = reference.wrong(traffic.asked)
    with capsys.disabled():
        print(*traffic.wrong_statuses[:40], sep="\n")
        print(f"\n{answered:,} answers in {took:.0f} s, {len(wrong)} wrong, {traffic.failed} failed; {traffic.counts}")
        print(f"memory: {sizes[0] / 1e6:.0f} MB, {half / 1e6:.0f} MB in the first half, {end / 1e6:.0f} MB")
    assert server.is_up()
    # Two mishaps at once may show as a third; each kind of fault comes more often than this.
    assert len(traffic.wrong_statuses) <= answered // 500, "\n".join(traffic.wrong_statuses[:40])
    assert not wrong, [traffic.asked[place] for place in wrong[:10]]
    assert all(traffic.counts[kind] for kind in (*soak_traffic.KINDS, *soak_faults.KINDS)), traffic.counts
    assert traffic.failed < 0.05 * answered
    assert end - half < GROWTH
    # And the comparison could have told: hardly an answer is right for another adapter, too.
    others = [(prompt, answer, (Worn((ADAPTERS - 1,)),)) for prompt, answer, worn in traffic.asked[:1000]]
    assert len(reference.wrong(others)) > 900
    series = [name for name in server.metrics() if "lora" in name or "ia3rt" in name]
    assert len(series) < 100, series

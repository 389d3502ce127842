"""vLLM's `LLM` and `AsyncLLM`, without a server: all is worn as PEFT has it, and what cannot be worn is one error."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from offline_engine import MARK
from safetensors.torch import load_file, save_file
from truth import Truth, greedy_with_lora
from vllm.lora.request import LoRARequest
from vllm.v1.core.kv_cache_utils import _gen_lora_extra_hash_keys

from ia3rt.bench.serving.server import ON_CPU
from ia3rt.serving.vllm import lora_request, told_engine
from ia3rt.serving.vllm.keeping import keeping
from ia3rt.serving.vllm.told_engine import Told

SUM, PRODUCT = "mix:a*0.7+b*0.3", "b*a"
RIGHT = [
    [None],
    ["named", "a"],
    ["user", "a", 1, "{a}"],
    ["named", SUM],
    ["named", PRODUCT],
    ["named", "lora"],
    ["user", "a", 2, "{b}"],
]
WRONG: list[tuple[list[Any], str, str]] = [
    (["user", "gone", 3, "{folder}/gone"], "FileNotFoundError", "'gone'"),
    (["user", "gone", 3, "no/where"], "FileNotFoundError", "'gone'"),
    (["named", "mix:a+gone"], "FileNotFoundError", "gone"),
    (["user", "cut", 4, "{cut}"], "ValueError", "damaged"),
    (["named", "cut"], "ValueError", "damaged"),
    (["user", "cut lora", 4, "{cut_lora}"], "ValueError", "'cut lora'"),
    (["user", "wide", 5, "{wide}"], "ValueError", "width 999"),
    (["user", "large", 6, "{large}"], "ValueError", "3e+38"),
    (["named", "mix:a*1001"], "ValueError", "1001"),
    (["named", "large*a"], "ValueError", "'large'"),
    (["named", "a*lora"], "ValueError", "LoRA"),
    (["named", "mix:a*much"], "ValueError", "much"),
    (["named", "a*nobody"], "ValueError", "nobody"),
    (["user", "b", 1, "{b}"], "ValueError", "lora_int_id 1 "),
]


@pytest.fixture(scope="module")
def adapters(small_truth: Truth) -> dict[str, str]:
    """Good ones, and some that cannot be served."""
    folder = small_truth.folder
    found = {name: folder / name for name in ("a", "b", "lora", "large")}
    for name, original in (("cut", "a"), ("cut_lora", "lora"), ("wide", "a")):
        found[name] = folder / f"offline-{name}"
        shutil.copytree(folder / original, found[name])
    for name in ("cut", "cut_lora"):
        (found[name] / "adapter_model.safetensors").write_bytes(b"cut")
    vectors = load_file(found["wide"] / "adapter_model.safetensors")
    vectors[next(key for key in vectors if "k_proj" in key)] = torch.ones(999, 1)
    save_file(vectors, found["wide"] / "adapter_model.safetensors")
    return {name: str(path) for name, path in found.items()} | {"gone": str(folder / "gone")}


@pytest.fixture(scope="module", params=["LLM", "AsyncLLM"])
def answers(request, small_truth, adapters, tmp_path_factory) -> Iterator[list[Any]]:
    """What the engine answers: RIGHT, then each of WRONG and the base model after it, and RIGHT again."""
    asked = [*RIGHT]
    for wrong, _, _ in WRONG:
        asked += [wrong, [None]]
    asked += RIGHT
    places = {"folder": str(small_truth.folder), **adapters}
    asked = [[part.format(**places) if isinstance(part, str) else part for part in each] for each in asked]
    told = {"model": str(small_truth.model), "adapters": adapters, "prompts": small_truth.prompts.tolist()}
    environment = {**os.environ, **ON_CPU, "VLLM_CACHE_ROOT": str(tmp_path_factory.mktemp("cache"))}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # which AsyncLLM does not heed
    script = Path(__file__).parent / "offline_engine.py"
    command = [sys.executable, str(script), request.param, json.dumps({**told, "requests": asked})]
    with (tmp_path_factory.mktemp("log") / "log").open("w+") as log:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=log, timeout=600, text=True)
        log.seek(0)
        assert done.returncode == 0, log.read()[-4000:]
    said = next(line for line in done.stdout.splitlines() if line.startswith(MARK))
    yield json.loads(said.removeprefix(MARK))


def test_all_is_as_peft_has_it(answers, small_truth) -> None:
    first, last = answers[: len(RIGHT)], answers[-len(RIGHT) :]
    assert first == last
    base, named, user, weighted, product, lora, b = first
    assert named == user == small_truth.greedy(named, "a")
    assert base == small_truth.greedy(base) and b == small_truth.greedy(b, "b")
    assert weighted == small_truth.greedy(weighted, "a", "b", weights=[0.7, 0.3])
    assert product == small_truth.greedy(product, "a", "b")
    assert lora == greedy_with_lora(small_truth.model, small_truth.folder / "lora", small_truth.prompts, lora)
    assert len({json.dumps(tokens) for tokens in first}) == len(RIGHT) - 1


def test_what_cannot_be_worn_is_one_error_and_the_engine_goes_on(answers) -> None:
    base = answers[0]
    after = answers[len(RIGHT) : -len(RIGHT)]
    for (asked, kind, told), (kinds, says), then in zip(WRONG, after[::2], after[1::2], strict=True):
        assert kind in kinds and told in says and "\n" not in says and "stack trace" not in says, (asked, kinds, says)
        assert then == base, asked


def test_equal_mixes_are_one_request(adapters, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    keeping.cache_clear()
    first = lora_request(SUM, adapters)
    assert lora_request("mix:b*0.3+a*0.7", adapters) is first
    others = [lora_request(name, adapters) for name in (PRODUCT, "a", "b", "lora", "delta:a*0.5")]
    assert len({request.lora_int_id for request in (first, *others)}) == 6
    assert len({request.lora_name for request in (first, *others)}) == 6
    # Beyond what users number and name themselves.
    assert min(request.lora_int_id for request in (first, *others)) >= 1 << 30
    assert not {request.lora_name for request in others} & set(adapters)
    keeping.cache_clear()


@pytest.mark.usefixtures("own_store")
@pytest.mark.parametrize("kinds", ["a b", "a lora", "lora a", "lora lora"])
def test_a_folder_that_holds_something_else_is_another_request(small_truth, tmp_path, kinds) -> None:
    before, after = (small_truth.folder / kind for kind in kinds.split())
    place = tmp_path / "x"
    shutil.copytree(before, place)
    first = lora_request("x", {"x": place})
    assert lora_request("x", {"x": place}) is first
    shutil.copytree(after, place, dirs_exist_ok=True)
    if before == after:  # other numbers in as many bytes
        weights = load_file(place / "adapter_model.safetensors")
        save_file({key: -tensor for key, tensor in weights.items()}, place / "adapter_model.safetensors")
    second = lora_request("x", {"x": place})
    assert lora_request("x", {"x": place}) is second
    assert second.lora_int_id != first.lora_int_id and blocks_of(second) != blocks_of(first)


def test_two_of_one_name_are_told_apart() -> None:
    known = Told()
    requests = [LoRARequest(name, number, f"/{number}") for number, name in enumerate(("x", "x", "x#2", "x#4", "x"), 1)]
    seen = []
    for request in requests:
        seen.append(known.apart(request))
        known.add(seen[-1], is_ia3=True)
    assert seen[0] is requests[0] and len({request.lora_name for request in seen}) == len(seen)
    assert [request.lora_int_id for request in seen] == [1, 2, 3, 4, 5]
    assert [known.apart(request) for request in requests] == seen  # each again as it was
    assert all(known.knows(request) for request in requests)
    known.removed(1)
    assert not known.knows(requests[0]) and known.knows(requests[1])


class Engine:
    """vLLM's, as far as it is told what to wear."""

    vllm_config = SimpleNamespace(lora_config=True, model_config=SimpleNamespace(dtype=torch.float32))
    add_lora = told_engine._add_lora(lambda *_: True)
    remove_lora = told_engine._remove_lora(lambda *_: True)
    add_request = told_engine._add_request(lambda self, name, prompt, params, time, worn: worn)

    def wear(self, *request: Any) -> LoRARequest:
        worn: LoRARequest = self.add_request("0", {}, None, None, LoRARequest(*request))
        return worn


def blocks_of(request: LoRARequest) -> object:
    """What of a request vLLM's prefix cache knows its blocks by."""
    return _gen_lora_extra_hash_keys(SimpleNamespace(lora_request=request))


@pytest.mark.parametrize("kinds", ["a b", "a lora", "lora a"])
@pytest.mark.parametrize("how", ["by a request", "by add_lora", "removed before", "under a number of its own"])
def test_what_is_loaded_again_meets_no_keys_and_values_of_before(small_truth, tmp_path, kinds, how) -> None:
    engine, place, number = Engine(), tmp_path / "x", 1
    before, after = (small_truth.folder / kind for kind in kinds.split())
    shutil.copytree(before, place)
    first = engine.wear("x", 1, str(place))
    assert blocks_of(engine.wear("x", 1, str(place))) == blocks_of(first)
    shutil.rmtree(place)
    shutil.copytree(after, place)
    if how == "by a request":
        in_place = engine.wear("x", 1, str(place), None, True)
        assert not in_place.load_inplace  # or each step would read it
    elif how == "by add_lora":
        engine.add_lora(LoRARequest("x", 1, str(place), load_inplace=True))
    else:
        engine.remove_lora(1)
        number = 1 if how == "removed before" else 2
    second = engine.wear("x", number, str(place))
    assert second.lora_int_id == number and second.lora_path == first.lora_path
    assert blocks_of(second) != blocks_of(first)
    assert blocks_of(engine.wear("x", number, str(place))) == blocks_of(second)
    assert how != "by a request" or blocks_of(in_place) == blocks_of(second)

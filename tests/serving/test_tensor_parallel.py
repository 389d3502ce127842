"""Two processes that share each layer: every vector is cut as the layer's weights are."""

from __future__ import annotations

from pathlib import Path

import pytest
from server import Server, say
from small_model import save_small_model
from truth import Truth


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    save_small_model(folder)
    return folder


@pytest.mark.slow  # the servers' processes wait for each other by spinning
def test_two_processes(small, tmp_path) -> None:
    truth = Truth(small, tmp_path / "adapters")
    names = ["a", "b"]
    for seed, name in enumerate(names):
        truth.make_adapter(name, seed)
    options = ["--dtype", "float32", "--max-model-len", "128", "--enforce-eager", "--tensor-parallel-size", "2"]
    options += ["--enable-lora", "--max-lora-rank", "1", "--lora-modules"]
    options += [f"{name}={truth.folder / name}" for name in names]
    server = Server(small, options, tmp_path)
    server.start()
    try:
        server.wait()
        answers = {
            name: [say(server, name, prompt) for prompt in truth.prompts.tolist()] for name in ("a", "b", "a*b", "base")
        }
    finally:
        server.kill()
    assert len({str(tokens) for tokens in answers.values()}) == len(answers)
    for name, tokens in answers.items():
        assert tokens == truth.greedy(tokens, *([] if name == "base" else name.split("*"))), name

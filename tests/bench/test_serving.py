"""The servers' benchmark, against a server that answers as slowly as a test says."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import httpx
import peft
import pytest
from safetensors.torch import load_file
from tiny import tiny_model
from typer.testing import CliRunner

from ia3rt.bench.serving import adapters, run, tables
from ia3rt.bench.serving.load import Load, Served, send
from ia3rt.cli.main import app

FIRST, BETWEEN, TOKENS = 0.20, 0.05, 5


class Answers(BaseHTTPRequestHandler):
    """One token after FIRST seconds, and then one every BETWEEN."""

    asked: ClassVar[list[dict]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        refused = body["model"] == "nobody"
        self.send_response(404 if refused else 200)
        self.end_headers()
        for position in range(0 if refused else body["max_tokens"]):
            time.sleep(FIRST if position == 0 else BETWEEN)
            self.wfile.write(b'data: {"choices": [{"text": "x"}]}\n\n')
            self.wfile.flush()
        self.wfile.write(b'data: {"choices": [], "usage": {}}\n\ndata: [DONE]\n\n')

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Answers.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_what_a_round_took(url) -> None:
    taken = send(url, Load(["a", "b", "a"], tokens=TOKENS), seed=1)
    whole = FIRST + (TOKENS - 1) * BETWEEN
    assert FIRST <= taken.first < 2 * FIRST
    assert BETWEEN <= taken.between < 2 * BETWEEN
    assert 3 * TOKENS / (2 * whole) < taken.tokens_per_second <= 3 * TOKENS / whole  # all at once
    assert sorted(body["model"] for body in Answers.asked) == ["a", "a", "b"]
    prompts = [tuple(body["prompt"]) for body in Answers.asked]
    assert len(set(prompts)) == 3 and all(len(prompt) == 32 for prompt in prompts)


def test_arrivals_do_not_wait_for_the_server(url) -> None:
    start = time.perf_counter()
    send(url, Load(["a"] * 20, tokens=1, rate=200.0), seed=1)
    assert time.perf_counter() - start < 20 * FIRST / 2
    assert math.isinf(Load(["a"]).rate)


def test_a_refused_request_ends_the_run(url) -> None:
    with pytest.raises(httpx.HTTPStatusError, match="404"):
        send(url, Load(["a", "nobody"], tokens=1), seed=1)


def test_ctrl_c_keeps_what_was_timed(tmp_path, monkeypatch) -> None:
    class Up:
        url = ""
        start = wait = kill = lambda self: None

    cases = run.cases(quick=True)
    sent: list[Load] = []

    def send_or_stop(url: str, load: Load, seed: int) -> Served:
        if len(load.models) == cases[1].requests:
            raise KeyboardInterrupt
        sent.append(load)
        return Served(1.0, 1.0, 1.0)

    monkeypatch.setattr(run, "send", send_or_stop)
    monkeypatch.setattr(run, "Server", lambda *_: Up())
    kept = run.time_servers(tmp_path, [], cases, rounds=2, rate=5.0, done=lambda _: None)
    assert [one.case for one in kept] == cases[:1]
    assert {name: len(rounds) for name, rounds in kept[0].rounds.items()} == {"base": 2, "control": 2}
    assert len(sent) == 2 * 3 and all(load.rate == 5.0 for load in sent)


def test_ctrl_c_is_what_the_command_exits_with(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("ia3rt.bench.serving.cli.importlib.util.find_spec", lambda _: True)
    monkeypatch.setattr(run, "time_servers", lambda *_, **__: [timed()])
    (tmp_path / "config.json").write_text("{}")
    command = ["bench", "serve", str(tmp_path), "--quick", "--out", str(tmp_path)]
    assert CliRunner().invoke(app, command).exit_code == 130
    monkeypatch.setattr(run, "time_servers", lambda *_, **__: [timed(), timed()])
    assert CliRunner().invoke(app, command).exit_code == 0


def timed() -> run.Timed:
    base = [Served(100.0, 0.1, 0.02), Served(50.0, 0.2, 0.04), Served(100.0, 0.1, 0.02)]
    ours = [Served(95.0, 0.11, 0.022), Served(47.5, 0.22, 0.044), Served(99.0, 0.1, 0.02)]
    return run.Timed(run.Case(8, 8, "distinct"), {"base": base, "lora": ours, "control": base})


def test_ratios_are_of_a_round() -> None:
    def ratio(contender: str, figure: str) -> float:
        measured = timed().measured(contender, figure)
        assert measured.ratio is not None
        return measured.ratio.p50

    assert ratio("lora", "tokens_per_second") == pytest.approx(0.95)
    assert ratio("lora", "first") == pytest.approx(1.1)
    assert ratio("control", "between") == 1


def test_tables(tmp_path) -> None:
    file, result = tmp_path / "serving.md", tmp_path / "a.json"
    file.write_text("# A\n<!-- served -->\n\n<!-- end of served -->\n")
    result.write_text(json.dumps(run.as_dict([timed()], "ia3rt bench serve MODEL", "m")))
    assert run.read(result)[1] == [timed()]
    tables.write(file, [result])
    text = file.read_text()
    assert "| 8 requests, distinct of 8: base | 100.0 |  |" in text
    assert "| 8 requests, distinct of 8: lora | 95.0 | 0.950 |" in text  # the control shows no doubt here
    assert "fallback" in text and "control" in text and "`ia3rt bench serve MODEL`" in text


def test_loras_are_what_peft_loads(tmp_path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "m")
    folders = adapters.lora_folders(tmp_path / "m", tmp_path / "loras", 10)
    assert len(folders) == 10 and len(set(folders)) == adapters.DISTINCT_LORAS
    loaded = peft.PeftModel.from_pretrained(model, folders[1])
    written = load_file(folders[1] / "adapter_model.safetensors")
    kept = peft.get_peft_model_state_dict(loaded)
    assert kept.keys() == written.keys() and all((kept[key] == written[key]).all() for key in written)


def test_bad_options(tmp_path, monkeypatch) -> None:
    import importlib.machinery
    import importlib.util

    find = importlib.util.find_spec
    spec = importlib.machinery.ModuleSpec("vllm", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: spec if name == "vllm" else find(name, *more))

    def told(*arguments: object) -> str:
        result = CliRunner().invoke(app, ["bench", "serve", *map(str, arguments)])
        assert result.exit_code == 2
        return " ".join(result.output.split())

    assert "no config.json" in told(tmp_path)
    assert "'nothing'" in told(tmp_path, "--against", "nothing")
    (tmp_path / "config.json").touch()
    assert "'8 requests, distinct of 8'" in told(tmp_path, "--cases", "nothing")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "vllm" else find(name, *more))
    missing = CliRunner().invoke(app, ["bench", "serve", str(Path("m"))])
    assert missing.exit_code == 1 and "pip install" in missing.output

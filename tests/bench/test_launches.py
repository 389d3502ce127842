"""`ia3rt bench launch` on this machine: what it counts, and that it prints and writes what it timed; compiled calls."""

import json
from pathlib import Path

import torch
from typer.testing import CliRunner

from ia3rt.bench.launches.compiled_calls import microseconds
from ia3rt.cli.main import app


def test_a_call_of_a_compiled_model_is_timed() -> None:
    """With a graph that computes nothing, more layers take longer by their checks alone."""

    def takes_longer() -> bool:
        torch._dynamo.reset()
        return 0 < microseconds("ia3rt, torch backend", 1, 200) < microseconds("ia3rt, torch backend", 8, 200)

    assert any(takes_longer() for _ in range(3)), "the machine may do something else meanwhile, but not each time"
    torch._dynamo.reset()


def test_the_command_times_every_operation(tmp_path: Path) -> None:
    run = CliRunner().invoke(app, ["bench", "launch", "--out", str(tmp_path / "times.json")])
    assert run.exit_code == 0, run.output
    found = json.loads((tmp_path / "times.json").read_text("utf-8"))
    launches = {time["operation"]: time["launches"] for time in found["times"]}
    assert launches == {
        "activation": 1,
        "linear_pair (k and v)": 2,  # the parts of the sums, and their sum
        "linear": 2,
        "scale": 1,
        "rope (q, k and v)": 1,
        "attention": 2,
        "set_adapter": 0,
        "set_adapter, a product of three": 0,
        "route, 16 rows": 0,
    }
    for time in found["times"]:
        assert time["microseconds"] > 0
        assert (time["op_microseconds"] is None) == (time["launches"] == 0)
        assert time["operation"] in run.output

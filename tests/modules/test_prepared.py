"""What drop-ins prepared is what they would launch now, whatever happened to the model meanwhile."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ia3rt import ops
from ia3rt.modules.prepared import Prepared

SCRIPT = Path(__file__).with_name("launches_of_a_model.py")


def launches(way: str) -> tuple[list[str], int]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parents[1]), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, SCRIPT, way], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines(), int(done.stderr.splitlines()[-1])


def test_a_model_launches_what_triton_would_whatever_changes() -> None:
    (ours, repeated), (theirs, none) = launches("direct"), launches("triton")
    assert len(ours) == len(theirs) > 40 and repeated > 300 and none == 0
    for step, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        assert our == their, f"step {step}"


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_other_strides_at_the_same_place_are_prepared_anew(name) -> None:
    layer, tables = nn.Linear(8, 8), SimpleNamespace(bank=[torch.ones(2, 8)])
    fixed = dict(weight=layer.weight, bias=layer.bias, l_in=None, l_out=tables.bank[0])
    prepared = Prepared(tables, (layer,), ops.linear, **fixed)
    assert prepared.fits(tables)
    parameter = getattr(layer, name)
    parameter.data = parameter.data.t() if name == "weight" else parameter.data[:1].expand(8)
    assert not prepared.fits(tables)

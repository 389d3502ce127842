"""What the launchers launch, built for GPUs that need not be there: spills, registers, and tensor core instructions.

The kernels are compiled in another process: in this one they may belong to the interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ia3rt.bench.compiled.build import PLAIN, all_cases
from ia3rt.bench.document import compiled_table

SHARED_BYTES = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}  # sm_80: as sm_86 has
MAX_REGISTERS = 240

pytestmark = pytest.mark.slow  # each architecture takes the compiler a minute


@pytest.fixture(scope="module", params=SHARED_BYTES)
def built(request: pytest.FixtureRequest) -> tuple[str, dict[str, dict[str, int]]]:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "ia3rt.bench.compiled", request.param]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return request.param, json.loads(done.stdout)


def test_each_kernel_fits_the_device(built) -> None:
    arch, kernels = built
    for name, facts in kernels.items():
        assert facts["spills"] == 0, f"{name} spills on {arch}: {facts}"
        assert facts["shared"] <= SHARED_BYTES[arch], f"{name} on {arch}: {facts}"


def test_each_launch_is_what_its_case_says(built) -> None:
    arch, kernels = built
    for name, case in all_cases().items():
        facts = kernels[name]
        message = f"{name} on {arch}: {facts}"
        assert facts["matrix"] > 0 or not case.matrix or arch in case.library, message
        if arch != "gfx942":
            assert facts["wrong_dots"] == 0, message
            assert facts["registers"] <= MAX_REGISTERS, message
        if arch == "sm_90":
            assert facts["registers"] <= case.max_registers, message
            assert facts["HGMMA"] > 0 or not (case.wgmma or case.hgmma), message
            assert facts["wide_loads"] >= case.wide_loads, message


def test_the_documented_table_is_what_was_built(built) -> None:
    arch, kernels = built
    if arch == "sm_90":
        documented = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text("utf-8")
        assert compiled_table(kernels) in documented, "run python -m ia3rt.bench document"


def test_a_scale_leaves_the_main_loop_of_wgmma_as_it_is(built) -> None:
    """On sm_90: as many instructions and waits as without a scale, and both operands in shared memory."""
    arch, kernels = built
    names = [name.removesuffix(PLAIN) for name in kernels if name.endswith(PLAIN)]
    assert bool(names) is (arch == "sm_90")
    for name in names:
        fused, plain, case = kernels[name], kernels[name + PLAIN], all_cases()[name]
        message = f"{name}: {fused}, without a scale {plain}"
        assert fused["HGMMA"] == plain["HGMMA"] and fused["from_registers"] == 0, message
        for waits in ("waiting_HGMMA", "waits"):
            assert 0 < fused[waits] == plain[waits] <= case.dots, message
        assert 0 < fused["loop"] <= plain["loop"] + case.longer_loop, message

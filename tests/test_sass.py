"""What the launchers launch, built for GPUs that need not be there: spills, registers, and tensor core instructions.

The kernels are compiled in another process (this file as a script): in this one they may belong to the interpreter.
There the launchers run as they are, on tensors without data, and only Triton's driver is another: it names the target,
and a launch ends when its code is compiled. So arguments, their specialisation and options are the shipped ones.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
SHARED_BYTES = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}  # sm_80: as sm_86 has
MAX_REGISTERS = 240


class Case(NamedTuple):
    """One launch of linear; `longest` is the number of adapters that the mix table has room for."""

    M: int
    R: int
    N: int = 4096
    K: int = 4096
    longest: int = 8
    dtype: str = "bfloat16"
    site: str = "out"
    conv1d: bool = False
    bank_offset: int = 0  # numbers in the bank's rows before this site
    wgmma: bool = False  # what sm_90 has to use


CASES = {
    "prefill, uniform": Case(4096, 1, wgmma=True),
    "prefill, one mix a sequence": Case(4096, 4, wgmma=True),
    "prefill, Conv1D": Case(4096, 4096, N=2304, K=768, conv1d=True, wgmma=True),
    "prefill, unaligned site": Case(4096, 4, bank_offset=3, wgmma=True),
    "prefill, odd sizes": Case(1000, 8, N=1001, K=1003, dtype="float16"),
    "prefill, fp32": Case(4096, 4096, dtype="float32"),
    "64 rows, one mix a row": Case(64, 64, N=1024, wgmma=True),
    "decode, one mix a row": Case(16, 16),
    "decode, odd sizes": Case(16, 16, N=1001, K=1003),
    "decode, input site, uniform": Case(32, 1, N=8192, site="in"),
    "decode, input site, 16 rows": Case(16, 16, N=8192, longest=2, site="in"),
    "decode, input site, 32 rows": Case(32, 32, longest=1, site="in"),
    "decode, input site, fp32": Case(16, 16, longest=2, dtype="float32", site="in"),
}
SCALE_CASES = {"scale, uniform": 1, "scale, one mix a row": 4096}


@pytest.fixture(scope="module", params=SHARED_BYTES)
def built(request: pytest.FixtureRequest) -> tuple[str, dict[str, dict[str, int]]]:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, request.param]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return request.param, json.loads(done.stdout)


def test_each_case_fits_the_device(built) -> None:
    arch, kernels = built
    for name, facts in kernels.items():
        assert facts["spills"] == 0, f"{name} spills on {arch}: {facts}"
        assert facts["shared"] <= SHARED_BYTES[arch], f"{name} on {arch}: {facts}"
        if arch != "gfx942":
            assert facts["registers"] <= MAX_REGISTERS, f"{name} on {arch}: {facts}"


def test_matrices_are_multiplied_by_the_tensor_cores(built) -> None:
    arch, kernels = built
    for name, case in CASES.items():
        facts = kernels[name]
        if case.dtype != "float32":
            assert facts["matrix"] > 0, f"{name} on {arch}: {facts}"
        if case.wgmma and arch == "sm_90":
            assert facts["HGMMA"] > 0, f"{name}: {facts}"


def _compile(arch: str) -> dict[str, dict[str, int]]:
    """Build every case for one architecture. Runs in the subprocess."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget

    from ia3rt.kernels import linear, scale

    target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)
    triton.runtime.driver.set_active(_Driver(target))
    linear.arch_of = lambda device: arch
    launched = []

    def build_only(kernel) -> None:
        def run(*args, grid, warmup, **options) -> None:
            launched.append(type(kernel).run(kernel, *args, grid=grid, warmup=True, **options))

        kernel.run = run

    build_only(linear.linear_kernel)
    build_only(scale.scale_kernel)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for case in CASES.values():
        dtype = getattr(torch, case.dtype)
        weight = empty(case.K, case.N, dtype=dtype).t() if case.conv1d else empty(case.N, case.K, dtype=dtype)
        width = case.K if case.site == "in" else case.N
        site = empty(64, case.bank_offset + width)[:, case.bank_offset :]
        l_in, l_out = (site, None) if case.site == "in" else (None, site)
        mixes, route = empty(64, 2 + 2 * case.longest, dtype=torch.int32), empty(case.R, dtype=torch.int32)
        linear.linear(empty(case.M, case.K, dtype=dtype), weight, empty(case.N, dtype=dtype), l_in, l_out, mixes, route)
    for R in SCALE_CASES.values():
        x, bank = empty(4096, 4096, dtype=torch.bfloat16), empty(64, 3 * 4096)[:, 4096:8192]
        scale.scale(x, bank, empty(64, 18, dtype=torch.int32), empty(R, dtype=torch.int32))
    facts = [_facts(arch, kernel) for kernel in launched]
    return dict(zip((*CASES, *SCALE_CASES), facts, strict=True))  # strict: each case is one launch


class _Driver:
    """As much of a Triton driver as a launch asks before it has its code."""

    def __init__(self, target) -> None:
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _facts(arch: str, kernel) -> dict[str, int]:
    """Return what one compiled kernel uses, and how many instructions of some kinds it has."""
    count = _amd_facts(kernel.asm["amdgcn"]) if arch.startswith("gfx") else _nvidia_facts(kernel.asm["cubin"])
    return count | {"shared": kernel.metadata.shared}


def _amd_facts(assembly: str) -> dict[str, int]:
    spills = re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", assembly)
    registers = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
    return {"registers": int(registers[1]), "spills": sum(map(int, spills)), "matrix": assembly.count("v_mfma")}


def _nvidia_facts(cubin: bytes) -> dict[str, int]:
    from triton import knobs

    def cuobjdump(option: str) -> str:
        command = [knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass, usage = cuobjdump("-sass"), cuobjdump("-res-usage")
    count = {name: len(re.findall(rf"\b{name}\b", sass)) for name in ("HMMA", "HGMMA", "UTCHMMA", "LDL", "STL")}
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": count["LDL"] + count["STL"],
        "matrix": count["HMMA"] + count["HGMMA"] + count["UTCHMMA"],
        "HGMMA": count["HGMMA"],
    }


if __name__ == "__main__":
    print(json.dumps(_compile(sys.argv[1])))

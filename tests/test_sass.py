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
    """One launch of linear, or of linear_pair; `longest` is the number of adapters that the mix table has room for."""

    M: int
    R: int
    N: int = 4096
    K: int = 4096
    longest: int = 8
    dtype: str = "bfloat16"
    site: str = "out"
    conv1d: bool = False
    bank_offset: int = 0  # numbers in the bank's rows before this site
    stride_x: int | None = None
    pair: bool = False  # two such layers in one launch
    wgmma: bool = False  # what sm_90 has to use


CASES = {
    "prefill, uniform": Case(4096, 1, wgmma=True),
    "prefill, one mix a sequence": Case(4096, 4, wgmma=True),
    "prefill, two programs a processor": Case(512, 1, N=1024, wgmma=True),
    "prefill, Conv1D": Case(4096, 4096, N=2304, K=768, conv1d=True, wgmma=True),
    "prefill, unaligned site": Case(4096, 4, bank_offset=3, wgmma=True),
    "prefill, x without descriptors": Case(4096, 4, stride_x=4100, wgmma=True),
    "prefill, pair": Case(4096, 4, N=1024, pair=True, wgmma=True),
    "prefill, wide pair": Case(4096, 1, pair=True, wgmma=True),
    "decode, pair": Case(16, 16, N=1024, pair=True),
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
PLAIN = ", no scale"
SCALE_CASES = {"scale, uniform": 1, "scale, one mix a row": 4096}


class ActivationCase(NamedTuple):
    """One launch of activation on the halves of a fused tensor, and one of its gradient."""

    kind: str
    R: int
    dtype: str = "bfloat16"
    gated: bool = True


ACTIVATION_CASES = {
    "silu, uniform": ActivationCase("silu", 1),
    "silu, one mix a row": ActivationCase("silu", 4096),
    "gelu, one mix a row, fp32": ActivationCase("gelu", 4096, "float32"),
    "gelu_tanh, one mix a row": ActivationCase("gelu_tanh", 4096),
    "quick_gelu, uniform": ActivationCase("quick_gelu", 1),
    "relu2, not gated": ActivationCase("relu2", 4096, "float16", gated=False),
}


def _arch_param(arch: str):
    # It takes minutes, so one architecture is the rule.
    return pytest.param(arch, marks=[] if arch == "sm_90" else [pytest.mark.slow])


@pytest.fixture(scope="module", params=map(_arch_param, SHARED_BYTES))
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


def test_a_scale_leaves_the_main_loop_of_wgmma_as_it_is(built) -> None:
    """On sm_90: as many instructions and waits as without a scale, and both operands in shared memory."""
    arch, kernels = built
    names = [name.removesuffix(PLAIN) for name in kernels if name.endswith(PLAIN)]
    assert bool(names) is (arch == "sm_90")
    for name in names:
        fused, plain = kernels[name], kernels[name + PLAIN]
        message = f"{name}: {fused}, without a scale {plain}"
        assert fused["HGMMA"] == plain["HGMMA"] and fused["from_registers"] == 0, message
        assert fused["waiting_HGMMA"] == 1 and fused["waits"] == plain["waits"] == 1, message
        # A bank that is read one number at a time leaves fewer uniform registers, and one more move for it.
        assert 0 < fused["loop"] <= plain["loop"] + (CASES[name].bank_offset > 0), message


def test_two_programs_fit_a_processor_of_sm_90(built) -> None:
    arch, kernels = built
    if arch == "sm_90":
        facts = kernels["prefill, two programs a processor"]
        assert 2 * 256 * facts["registers"] <= 1 << 16 and 2 * (facts["shared"] + (1 << 10)) <= 228 << 10, facts


def test_activations_leave_a_processor_its_threads_and_load_16_bytes_at_once(built) -> None:
    arch, kernels = built
    for name, case in ACTIVATION_CASES.items():
        for kernel, tensors in ((name, 1 + case.gated), (f"{name}, activation_gradient_kernel", 2 + case.gated)):
            facts = kernels[kernel]
            if arch == "sm_90":
                assert facts["registers"] <= 64, f"{kernel}: {facts}"
                assert facts["wide_loads"] >= tensors, f"{kernel}: {facts}"


def _compile(arch: str) -> dict[str, dict[str, int]]:
    """Build every case for one architecture. Runs in the subprocess."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget

    from ia3rt.kernels import activation, linear, linear_pair, linear_sum, linear_tma, scale

    target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)
    triton.runtime.driver.set_active(_Driver(target))
    linear.arch_of = lambda device: arch
    linear.processors_of = lambda device: 132
    launched = []

    def build_only(kernel) -> None:
        def run(*args, grid, warmup, **options) -> None:
            launched.append(type(kernel).run(kernel, *args, grid=grid, warmup=True, **options))

        kernel.run = run

    for kernel in (linear.linear_kernel, linear_sum.sum_kernel, linear_tma.linear_tma_kernel, scale.scale_kernel):
        build_only(kernel)
    for kernel in (activation.activation_kernel, activation.activation_gradient_kernel):
        build_only(kernel)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def launch(case: Case, has_scale: bool) -> None:
        dtype = getattr(torch, case.dtype)
        x = empty(case.M, case.stride_x or case.K, dtype=dtype)[:, : case.K]
        weight = empty(case.K, case.N, dtype=dtype).t() if case.conv1d else empty(case.N, case.K, dtype=dtype)
        width = case.K if case.site == "in" else case.N
        site = empty(64, case.bank_offset + width)[:, case.bank_offset :] if has_scale else None
        l_in, l_out = (site, None) if case.site == "in" else (None, site)
        mixes, route = empty(64, 2 + 2 * case.longest, dtype=torch.int32), empty(case.R, dtype=torch.int32)
        bias = empty(case.N, dtype=dtype)
        if case.pair:
            linear_pair.linear_pair(x, (weight, bias, l_out), (weight, bias, l_out), mixes, route)
        else:
            linear.linear(x, weight, bias, l_in, l_out, mixes, route)

    facts = {}

    def collect(name: str) -> None:
        """File what was built under the name of the case, and of the kernel where it is not the case's first."""
        assert launched
        for index, kernel in enumerate(launched):
            facts[f"{name}, {kernel.metadata.name}" if index else name] = _facts(arch, kernel)
        launched.clear()

    for name, case in CASES.items():
        launch(case, has_scale=True)
        collect(name)
        if arch == "sm_90" and case.wgmma and case.M > 64:
            launch(case, has_scale=False)
            collect(name + PLAIN)
    for name, R in SCALE_CASES.items():
        x, bank = empty(4096, 4096, dtype=torch.bfloat16), empty(64, 3 * 4096)[:, 4096:8192]
        scale.scale(x, bank, empty(64, 18, dtype=torch.int32), empty(R, dtype=torch.int32))
        collect(name)
    for name, (kind, R, dtype, gated) in ACTIVATION_CASES.items():
        gate, up = empty(4096, 2 * 4096, dtype=getattr(torch, dtype)).chunk(2, 1)
        bank = empty(64, 3 * 4096)[:, 4096:8192]
        routing = empty(64, 18, dtype=torch.int32), empty(R, dtype=torch.int32)
        activation.activation(gate, up if gated else None, bank, *routing, kind)
        activation.activation_gradient(gate, gate, up if gated else None, bank, *routing, kind)
        collect(name)
    return facts


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
    if arch.startswith("gfx"):
        facts = _amd_facts(kernel.asm["amdgcn"])
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(kernel.asm["cubin"])
            cubin.flush()
            facts = _nvidia_facts(cubin.name) | {
                "matrix": len(re.findall(r"\b(?:mma\.sync|tcgen05\.mma)", kernel.asm["ptx"]))
            }
            if arch == "sm_90":  # disassembling takes most of this test's time
                facts |= _sm_90_facts(cubin.name)
    return facts | {"shared": kernel.metadata.shared}


def _amd_facts(assembly: str) -> dict[str, int]:
    spills = re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", assembly)
    registers = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
    return {"registers": int(registers[1]), "spills": sum(map(int, spills)), "matrix": assembly.count("v_mfma")}


def _cuobjdump(option: str, file: str) -> str:
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, option, file]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _nvidia_facts(file: str) -> dict[str, int]:
    usage = _cuobjdump("-res-usage", file)
    # A kernel's stack is where it spills to.
    return {
        name: int(re.search(rf"{key}:(\d+)", usage)[1]) for name, key in (("registers", "REG"), ("spills", "STACK"))
    }


def _sm_90_facts(file: str) -> dict[str, int]:
    sass = _cuobjdump("-sass", file)
    count = {name: len(re.findall(rf"\b{name}\b", sass)) for name in ("HMMA", "HGMMA", "LDL", "STL")}
    return {
        "spills": count["LDL"] + count["STL"],
        "matrix": count["HMMA"] + count["HGMMA"],
        "HGMMA": count["HGMMA"],
        "wide_loads": len(re.findall(r"\bLDG\.E\.128\b", sass)),
        **_wgmma_loop_facts(sass),
    }


def _wgmma_loop_facts(sass: str) -> dict[str, int]:
    """Count what is in the innermost loops with an HGMMA: the most of any, as a pair of layers has two."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)
    code = {int(address, 16): instruction for address, instruction in found}
    loops = []
    for address, instruction in code.items():
        target = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", instruction)
        if target and int(target[1], 16) < address:
            loops.append(range(int(target[1], 16), address + 16, 16))
    seen: set[int] = set()
    innermost = []
    for loop in sorted(loops, key=len):  # around the innermost come longer ones, with the same HGMMAs
        multiplies = {at for at in loop if "HGMMA" in code[at]}
        if multiplies - seen:
            innermost.append(loop)
        seen |= multiplies
    most = {"loop": 0, "waits": 0, "waiting_HGMMA": 0, "from_registers": 0}
    for addresses in innermost:
        multiplies = [code[at] for at in addresses if "HGMMA" in code[at]]
        counts = {
            "loop": len(addresses),
            "waits": sum("WARPGROUP.DEPBAR" in code[at] for at in addresses),
            "waiting_HGMMA": sum("gsb" in line for line in multiplies),
            # HGMMA D, gdesc[both operands], D; where the first operand is in registers: HGMMA D, A, gdesc[...], D
            "from_registers": sum(not re.search(r"HGMMA\S* R\d+, gdesc", line) for line in multiplies),
        }
        most = {name: max(count, most[name]) for name, count in counts.items()}
    return most


if __name__ == "__main__":
    print(json.dumps(_compile(sys.argv[1])))

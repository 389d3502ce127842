"""What compiled kernels use, and how many instructions of some kinds they have."""

from __future__ import annotations

import re
import subprocess
import tempfile
from typing import Any

from triton import knobs

Facts = dict[str, int]


def facts_of(arch: str, kernel: Any) -> Facts:
    """Return a compiled kernel's facts.

    registers, spills, shared (bytes), matrix (tensor core instructions) for all; for NVIDIA also wrong_dots (see
    below); for sm_90 also instructions, HGMMA, wide_loads (of 16 bytes), and of the innermost loop with an HGMMA: loop
    (instructions), waits, waiting_HGMMA and from_registers (HGMMAs whose first operand is not in shared memory).
    """
    if arch.startswith("gfx"):
        facts = _amd_facts(kernel.asm["amdgcn"])
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(kernel.asm["cubin"])
            cubin.flush()
            facts = _nvidia_facts(cubin.name) | {
                "matrix": len(re.findall(r"\b(?:mma\.sync|tcgen05\.mma)", kernel.asm["ptx"])),
                "wrong_dots": wrong_dots(kernel.asm["ttgir"]),
            }
            if arch == "sm_90":  # disassembling takes longest
                facts |= _sm_90_facts(cubin.name)
    return facts | {"shared": kernel.metadata.shared}


def wrong_dots(ttgir: str) -> int:
    """Count the products by mma.sync whose step along K is shorter than what four threads hold of it side by side.

    A thread has kWidth neighbours along K, and the four that share a row have 4 kWidth. Where a step is shorter, two of
    them hold the same numbers, and Triton 3.6 and 3.7 multiply some twice and others never.
    """
    operands = re.findall(r"tt\.dot .*?: tensor<\d+x(\d+)x\w+, #ttg\.dot_op<\{opIdx = 0, .*?kWidth = (\d+)\}>>", ttgir)
    return sum(int(steps) < 4 * int(width) for steps, width in operands)


def _amd_facts(assembly: str) -> Facts:
    registers = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
    scratch = re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)
    assert registers and scratch
    # Scalar registers spill to vector ones, vector registers to scratch memory.
    return {"registers": int(registers[1]), "spills": int(scratch[1]), "matrix": assembly.count("v_mfma")}


def _cuobjdump(option: str, file: str) -> str:
    command = [knobs.nvidia.cuobjdump.path, option, file]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _nvidia_facts(file: str) -> Facts:
    usage = _cuobjdump("-res-usage", file)
    facts = {}
    for name, key in (("registers", "REG"), ("spills", "STACK")):  # a kernel's stack is where it spills to
        found = re.search(rf"{key}:(\d+)", usage)
        assert found
        facts[name] = int(found[1])
    return facts


def _sm_90_facts(file: str) -> Facts:
    sass = _cuobjdump("-sass", file)
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)
    code = {int(address, 16): instruction for address, instruction in found}
    count = {name: len(re.findall(rf"\b{name}\b", sass)) for name in ("HMMA", "IMMA", "QGMMA", "HGMMA", "LDL", "STL")}
    return {
        "instructions": sum(not re.match(r"(NOP|BRA 0x)", line) for line in code.values()),
        "spills": count["LDL"] + count["STL"],
        "matrix": count["HMMA"] + count["IMMA"] + count["QGMMA"] + count["HGMMA"],
        "HGMMA": count["HGMMA"],
        "wide_loads": len(re.findall(r"\bLDG\.E\.128\b", sass)),
        **_wgmma_loop_facts(code),
    }


def _wgmma_loop_facts(code: dict[int, str]) -> Facts:
    """Count what is in the innermost loops with an HGMMA: the most of any, as a kernel may have several."""
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
        lines = [code[at] for at in addresses if "HGMMA" in code[at]]
        counts = {
            "loop": len(addresses),
            "waits": sum("WARPGROUP.DEPBAR" in code[at] for at in addresses),
            "waiting_HGMMA": sum("gsb" in line for line in lines),
            # HGMMA D, gdesc[both operands], D; where the first operand is in registers: HGMMA D, A, gdesc[...], D
            "from_registers": sum(not re.search(r"HGMMA\S* R\d+, gdesc", line) for line in lines),
        }
        most = {name: max(count, most[name]) for name, count in counts.items()}
    return most

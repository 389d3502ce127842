"""Run by test_bound.py in a process of its own: compares direct launches with Triton's own, call by call.

The CPU is taken for an H100: kernels are compiled for it, and each launch ends where the C launcher would be called.
What Triton would call it with is the truth.
"""

import random
import sys
from types import SimpleNamespace

import torch
from launched_memory import forget_pointers, memory_of, told, watch_matmuls, watch_pointers
from torch import Tensor

from ia3rt.bench.compiled.driver import stop_at_launches

launched: list[tuple] = []
stop_at_launches(lambda *call: launched.append(call))
watch_pointers()

from ia3rt import ops  # noqa: E402
from ia3rt.ops import Bound, _repeat  # noqa: E402

RANDOM = random.Random(int(sys.argv[1]))
BANK = torch.ones(9, 4096)


def tables(R: int, slots: int = 64, longest: int = 8) -> SimpleNamespace:
    mixes, route = torch.zeros(slots, 2 + 2 * longest, dtype=torch.int32), torch.zeros(R, dtype=torch.int32)
    return SimpleNamespace(mixes=mixes, route=route, layout=(R, slots, longest))


def calls(run, given: list[Tensor]) -> tuple[list[object], object]:
    launched.clear()
    forget_pointers()
    results = run()
    results = [results] if isinstance(results, Tensor) else list(results)
    names = {memory_of(x): f"given {place}" for place, x in enumerate(given)}
    names |= {memory_of(y): f"result {place}" for place, y in enumerate(results)}
    made: dict[int, str] = {}
    described = [(y.shape, y.stride(), y.dtype, y.storage_offset(), names[memory_of(y)]) for y in results]
    # Grid, stream, function and so on; then the kernel's own arguments, and of a matmul its tensors.
    return [(call[:3], call[4:8], told(call[-1], names, made)) for call in launched], described


class Case:
    def __init__(self, op, fixed) -> None:
        self.op, self.fixed = op, fixed
        self.bound = Bound(op, **fixed)
        self.names = self.bound._names

    def check(self, worn: SimpleNamespace, given: dict[str, Tensor]) -> None:
        arguments = {**self.fixed, **given, "mixes": worn.mixes, "route": worn.route}
        tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
        theirs = calls(lambda: self.op.body(*(arguments[name] for name in self.names)), tensors)
        ours = calls(lambda: self.bound.call(worn, *given.values()), tensors)
        assert theirs[0], "nothing was launched"
        assert ours == theirs, (
            f"{self.op.body.__name__} {[(x.shape, x.stride()) for x in given.values()]}:\n{ours}\n{theirs}"
        )


def columns(kind: str, rows: tuple[int, ...], width: int, dtype: torch.dtype) -> Tensor:
    """Rows as callers have them: contiguous, the half of a wider tensor, or beginning in the middle of 16 bytes."""
    if kind == "plain or shifted":  # with the same shape and strides
        kind = RANDOM.choice(["plain", "shifted"])
    if kind == "half":
        return torch.ones(*rows, 2 * width, dtype=dtype).chunk(2, -1)[RANDOM.randrange(2)]
    if kind == "padded":
        return torch.ones(*rows, width + 8, dtype=dtype)[..., :width]
    if kind == "shifted":
        count = width
        for row in rows:
            count *= row
        return torch.ones(count + 1, dtype=dtype)[1:].view(*rows, width)
    return torch.ones(*rows, width, dtype=dtype)


def main() -> None:
    repeats = 0
    write = _repeat._Writer.function

    def counted(writer):
        function = write(writer)

        def repeat(*arguments):
            nonlocal repeats
            repeats += 1
            return function(*arguments)

        return repeat

    _repeat._Writer.function = counted
    watch_matmuls(launched)
    worn = {R: tables(R) for R in (1, 2, 4)} | {"long": tables(1, 64, 16), "one": tables(1, 64, 1)}
    cases = []
    for dtype in (torch.bfloat16, torch.float32):
        w, w2 = torch.ones(256, 128, dtype=dtype), torch.ones(256, 128, dtype=dtype)
        bias, tall = torch.ones(256, dtype=dtype), torch.ones(128, 256, dtype=dtype).t()
        site, other, wide = BANK[:, :256], BANK[:, 256:512], BANK[:, 512 : 512 + 128]
        pair = dict(weight_a=w, bias_a=None, l_a=site, weight_b=w2, bias_b=None, l_b=other)
        cases += [
            (dtype, ("x",), 128, Case(ops.linear, dict(weight=w, bias=bias, l_in=None, l_out=site))),
            (dtype, ("x",), 128, Case(ops.linear, dict(weight=tall, bias=None, l_in=None, l_out=other))),
            (dtype, ("x",), 128, Case(ops.linear, dict(weight=w2, bias=None, l_in=wide, l_out=None))),
            (dtype, ("x",), 128, Case(ops.linear_pair, pair)),
            (dtype, ("x",), 256, Case(ops.scale, dict(l=site))),
            (dtype, ("gate", "up"), 256, Case(ops.activation, dict(l=site, kind="silu"))),
            (dtype, ("gate",), 256, Case(ops.activation, dict(up=None, l=other, kind="gelu"))),
        ]
    for _ in range(int(sys.argv[2])):
        dtype, names, width, case = RANDOM.choice(cases)
        torch.backends.cuda.matmul.fp32_precision = "tf32" if RANDOM.random() < 0.2 else "ieee"
        rows = RANDOM.choice([(1, 1), (4, 1), (1, 4), (2, 40), (4, 30), (1, 520), (4,), (16, 4)])
        count = rows[0] * (rows[1] if len(rows) > 1 else 1)
        fits = [R for R in worn if not isinstance(R, int) or count % R == 0]
        kinds = {name: RANDOM.choice(["plain", "plain or shifted", "half", "padded"]) for name in names}
        routes = RANDOM.sample(fits, min(2, len(fits)))
        for _ in range(8):  # other tensors laid out alike, under two routes by turns
            given = {name: columns(kind, rows, width, dtype) for name, kind in kinds.items()}
            case.check(worn[RANDOM.choice(routes)], given)
    print(repeats)


main()

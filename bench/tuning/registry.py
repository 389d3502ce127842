"""The operations that are tuned, by name."""

from ia3rt.bench.tuning.attention import ATTENTION
from ia3rt.bench.tuning.gate_up import GATE_UP
from ia3rt.bench.tuning.linear import LINEAR
from ia3rt.bench.tuning.quantised import QUANTISED

OPERATIONS = {operation.name: operation for operation in (LINEAR, GATE_UP, QUANTISED, ATTENTION)}

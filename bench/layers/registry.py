"""All cases, by name."""

from ia3rt.bench.layers import activation, attention, gate_up, key_value, mlp, quantised, rope
from ia3rt.bench.layers.case import Case

CASES: dict[str, Case] = {
    module.CASE.name: module.CASE for module in (key_value, quantised, rope, attention, activation, mlp, gate_up)
}

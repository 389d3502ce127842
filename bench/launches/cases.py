"""Drop-ins as a decoding step of Llama-3-8B calls them, and the ops behind them; and what switches adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

import ia3rt
from ia3rt import ops
from ia3rt.modules.attention import attention_forward

Case = tuple[str, Callable[[], object], Callable[[], object] | None]
DTYPE = torch.bfloat16
HIDDEN, INNER, KEY_VALUE, HEAD = 4096, 14336, 1024, 128
LENGTH = 1024  # of the cache
ADAPTERS = 16


def _projections(*names: str) -> dict[str, nn.Linear]:
    return {name: nn.Linear(HIDDEN, KEY_VALUE, bias=False, dtype=DTYPE) for name in names}


class _KeysAndValues(nn.ModuleDict):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self["k_proj"](x), self["v_proj"](x)


def cases() -> Iterator[Case]:
    """Make each case: its name, the drop-in's part, and the op on the same tensors, if there is one."""
    yield _activation()
    yield _pair()
    yield _linear()
    yield _scale()
    yield _rope()
    yield _attention()
    yield from _switches()


def _patched(model: nn.Module, **names: object) -> ia3rt.Runtime:
    runtime = ia3rt.patch(model, backend="triton", **names)  # type: ignore[arg-type]
    runtime.add_adapter("a", {site.key: torch.ones(site.width) for site in runtime.sites})
    runtime.set_adapter("a")
    return runtime


def _worn(runtime: ia3rt.Runtime) -> tuple[Sequence[Tensor], Tensor, Tensor]:
    tables = runtime._routing.now().tables
    return tables.bank, tables.mixes, tables.route


def _activation() -> Case:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    config = LlamaConfig(hidden_size=64, intermediate_size=INNER)  # the matrices are not what is timed
    model = nn.ModuleDict({"mlp": LlamaMLP(config).to(DTYPE)})  # type: ignore[no-untyped-call]
    runtime = _patched(model)
    tables = runtime._routing.now().tables
    (l,), mixes, route = _worn(runtime)  # noqa: E741
    mlp, gate, up = model["mlp"], _row(INNER), _row(INNER)
    return (
        "activation",
        lambda: mlp.ia3_activate(tables, 0, gate, up, "silu"),  # type: ignore[operator]
        lambda: ops.activation(gate, up, l, mixes, route, "silu"),
    )


def _pair() -> Case:
    layers = _projections("q_proj", "k_proj", "v_proj")
    runtime = _patched(_KeysAndValues(layers))
    (l_k, l_v), mixes, route = _worn(runtime)
    x, key, value = _row(HIDDEN), layers["k_proj"], layers["v_proj"]
    runtime.model(x)  # the first forward is watched, which would go on
    runtime._routing.forwards.before_forward(runtime.model, (x,), {})  # within a forward, the first computes for both
    weights = key.weight, None, l_k, value.weight, None, l_v
    return (
        "linear_pair (k and v)",
        lambda: (key.forward(x), value.forward(x)),
        lambda: ops.linear_pair(x, *weights, mixes, route),
    )


def _linear() -> Case:
    layers = _projections("v_proj")
    (l,), mixes, route = _worn(_patched(nn.ModuleDict(layers), target_modules=["v_proj"]))  # noqa: E741
    x, layer = _row(HIDDEN), layers["v_proj"]
    return (
        "linear",
        lambda: layer.forward(x),
        lambda: ops.linear(x, layer.weight, None, None, l, mixes, route),
    )


def _scale() -> Case:
    runtime = _patched(nn.ModuleDict(_projections("v_proj")), target_modules=["v_proj"])
    tables = runtime._routing.now().tables
    x, bound = _row(KEY_VALUE), ops.Bound(ops.scale, l=tables.bank[0])
    return "scale", lambda: bound.call(tables, x), lambda: ops.scale(x, tables.bank[0], tables.mixes, tables.route)


def _rope() -> Case:
    from transformers import Phi3Config
    from transformers.models.phi3.modeling_phi3 import Phi3Attention

    config = Phi3Config(hidden_size=HIDDEN, num_attention_heads=32, num_key_value_heads=8, pad_token_id=0)
    model = nn.ModuleDict({"self_attn": Phi3Attention(config, 0).to(DTYPE)})
    runtime = _patched(model)
    (l,), mixes, route = _worn(runtime)  # noqa: E741
    attention, qkv = model["self_attn"], _row(HIDDEN + 2 * KEY_VALUE)
    angles = _row(HEAD), _row(HEAD)
    form: Any = attention.ia3_form
    sizes = form.sizes(attention)
    worn = runtime._routing.now()
    return (
        "rope (q, k and v)",
        lambda: attention.ia3_turned(worn, [qkv], [l], angles),  # type: ignore[operator]
        lambda: ops.rope(*form.parts(qkv, *sizes), *form.parts(l, *sizes), *angles, mixes, route, False),
    )


def _attention() -> Case:
    q = torch.ones(1, 32, 1, HEAD, dtype=DTYPE)
    k, v = torch.ones(2, 1, 8, LENGTH, HEAD, dtype=DTYPE)
    mixes, route = torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    module, options = nn.Module(), (HEAD**-0.5, False, None, None)
    return (
        "attention",
        lambda: attention_forward(module, q, k, v, None),
        lambda: ops.attention(q, k, v, *[None] * 5, mixes, route, *options),
    )


def _switches() -> Iterator[Case]:
    """What a server says before each forward: between two of a kind, as what is worn already is worn in no time."""
    layers = _projections("q_proj", "k_proj", "v_proj")
    runtime = ia3rt.patch(nn.ModuleDict(layers), backend="triton")
    names = [f"adapter{number}" for number in range(ADAPTERS)]
    for name in names:
        runtime.add_adapter(name, {site.key: torch.ones(site.width) for site in runtime.sites})
    one, three, rows = cycle(names[:2]), cycle((names[:3], names[1:4])), cycle((names, names[::-1]))
    yield "set_adapter", lambda: runtime.set_adapter(next(one)), None
    yield "set_adapter, a product of three", lambda: runtime.set_adapter(next(three)), None
    yield f"route, {ADAPTERS} rows", lambda: runtime.route(next(rows)), None


def _row(width: int) -> Tensor:
    return torch.ones(1, 1, width, dtype=DTYPE)

"""Run by test_prepared.py in a process of its own: what a patched model launches while things change around it.

The CPU is taken for an H100, and each launch ends where the C launcher would be called. With "direct" as its argument,
launches go past Triton's own way where they can; with "triton" none does. Printed is what the C launcher got: a pointer
as the weight, the vectors or the table that it is into, or as the first, second, … of the forward's other tensors, and
how far. Both have to print the same.
"""

import copy
import json
import sys

import torch
from launched_memory import forget_pointers, memory_of, told, watch_matmuls, watch_pointers
from tiny import tiny_model, token_ids
from torch import nn
from transformers import MistralConfig, MistralForCausalLM, Phi3Config, Phi3ForCausalLM

from ia3rt.bench.compiled.driver import stop_at_launches

launched: list[tuple] = []
stop_at_launches(lambda *call: launched.append(call))
watch_pointers()

import ia3rt  # noqa: E402
from ia3rt.kernels import launch  # noqa: E402
from ia3rt.modules import layer, mlp, pair, qkv  # noqa: E402
from ia3rt.ops import _repeat  # noqa: E402
from ia3rt.routing.layout import Layout  # noqa: E402
from ia3rt.routing.probing import Probing  # noqa: E402

# No launch computes anything here, so that nothing shows where the rows are.
Probing.layout = lambda *_: Layout(0)  # type: ignore[method-assign]
watch_matmuls(launched)
repeated = 0
if sys.argv[1] == "triton":
    launch.can_repeat = lambda: False  # type: ignore[assignment]
    for drop_ins in (layer, mlp, pair, qkv):  # and nothing is prepared
        drop_ins.can_prepare = lambda tables: False  # type: ignore[assignment]
else:
    write = _repeat._Writer.function

    def counted(writer):
        function = write(writer)

        def repeat(*arguments):
            global repeated
            repeated += 1
            return function(*arguments)

        return repeat

    _repeat._Writer.function = counted  # type: ignore[method-assign]


def names(runtime: ia3rt.Runtime) -> dict[int, str]:
    tables = runtime._routing.now().tables
    named = {memory_of(parameter): name for name, parameter in runtime.model.named_parameters()}
    named |= {memory_of(part): "vectors" for part in tables.bank}
    return named | {memory_of(tables.mixes): "mixes", memory_of(tables.route): "route"}


def forward(runtime: ia3rt.Runtime, rows: int, length: int) -> None:
    """Three times: seen, noted, and launched directly."""
    for _ in range(3):
        launched.clear()
        forget_pointers()
        runtime.model(token_ids(rows, length), use_cache=False)
    named, made = names(runtime), dict[int, str]()
    print(json.dumps([[call[:3], told(call[-1], named, made)] for call in launched]))


def patched(model: nn.Module, **options) -> ia3rt.Runtime:
    runtime = ia3rt.patch(model, backend="triton", capacity=4, **options)
    for name in "abc":
        runtime.add_adapter(name, {site.key: torch.ones(site.width) for site in runtime.sites})
    runtime.set_adapter("a")
    return runtime


def phi3() -> nn.Module:
    sizes = dict(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    return Phi3ForCausalLM(Phi3Config(**sizes, pad_token_id=0)).to(torch.bfloat16).eval()


def mistral() -> nn.Module:
    """Without biases."""
    sizes = dict(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    return MistralForCausalLM(MistralConfig(**sizes, num_key_value_heads=2)).to(torch.bfloat16).eval()


def tiny(family: str) -> nn.Module:
    return tiny_model(family, torch.bfloat16)


for make in (lambda: tiny("llama"), lambda: tiny("gpt2"), phi3, mistral):
    runtime = patched(make())
    model = runtime.model
    forward(runtime, 2, 1)
    forward(runtime, 2, 5)
    runtime.set_adapter(["a", "b"])
    forward(runtime, 2, 1)
    with runtime.route(["a", {"b": 0.5}]):
        forward(runtime, 2, 1)
        forward(runtime, 2, 5)
    forward(runtime, 2, 1)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):  # the parameters stay, their data does not
        model.to(dtype)
        forward(runtime, 2, 1)
    model.to(torch.bfloat16)
    forward(runtime, 2, 1)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    forward(runtime, 2, 1)
    for parameter in model.parameters():  # at the same place
        parameter.data = parameter.data.view(torch.float16)
    forward(runtime, 2, 1)
    model.to(torch.bfloat16)
    forward(runtime, 2, 1)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    forward(runtime, 2, 1)
    for name in "defgh":  # the bank grows
        runtime.add_adapter(name, {site.key: torch.ones(site.width) for site in runtime.sites})
    runtime.set_adapter("h")
    forward(runtime, 2, 1)
    other = copy.deepcopy(runtime)
    forward(other, 2, 1)
    forward(runtime, 2, 1)
    with torch.autocast("cpu", torch.bfloat16):
        forward(runtime, 2, 1)
    if hasattr(launch.knobs.runtime.launch_enter_hook, "add"):
        seen: list[object] = []
        launch.knobs.runtime.launch_enter_hook.add(seen.append)
        forward(runtime, 2, 1)
        launch.knobs.runtime.launch_enter_hook.remove(seen.append)
print(repeated, file=sys.stderr)

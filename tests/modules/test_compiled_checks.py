"""What compiled code checks at each call, counted: without CUDA graphs, that is what a compiled model costs."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from peft import IA3Config, get_peft_model
from tiny import VOCABULARY, token_ids
from torch import nn
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM
from where import home

import ia3rt

IDS = token_ids()
SIZES = dict(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
BACKENDS = ["torch", "triton"]


def base(layers: int) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=layers)).eval()


def pefts(layers: int) -> nn.Module:
    return get_peft_model(base(layers), IA3Config(task_type="CAUSAL_LM")).eval()


def patched(layers: int, backend: str, rows: bool = False) -> nn.Module:
    runtime = ia3rt.patch(base(layers).to(home(backend)), backend=backend)
    for name in ("a", "b"):
        runtime.add_adapter(name, {site.key: torch.ones(site.width) for site in runtime.sites})
    if rows:
        runtime.route(["a", "b", None])
    else:
        runtime.set_adapter("a")
    return runtime.model


def checks(model: nn.Module) -> Counter[str]:
    """How many checks of each kind a call of the compiled model makes."""
    seen: Counter[str] = Counter()

    def see(guards):
        seen.update(guard.guard_type for guard in guards)
        return [True] * len(guards)

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, backend="eager", options={"guard_filter_fn": see})
    with torch.no_grad():
        compiled(input_ids=IDS.to(next(model.parameters()).device), use_cache=False)
    assert counters["frames"]["ok"] == 1  # a hook that is compiled by itself costs as much as some layers
    torch._dynamo.reset()
    return seen


def of_two_and_of_a_layer(make: Callable[[int], nn.Module]) -> tuple[Counter[str], Counter[str]]:
    """The checks of two layers, and of two more."""
    of_two, of_four = checks(make(2)), checks(make(4))
    return of_two, of_four - of_two


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_more_than_pefts(backend):
    ours, of_ours = of_two_and_of_a_layer(lambda layers: patched(layers, backend))
    theirs, of_theirs = of_two_and_of_a_layer(pefts)
    assert ours.total() <= theirs.total()
    assert of_ours.total() <= of_theirs.total()


@pytest.mark.parametrize(("backend", "rows"), [("torch", False), ("triton", True)])
def test_what_all_layers_share_is_found_in_one_place(backend, rows):
    """Where it is found in two, compiled code checks in Python, by the whole way to both, that it is one object."""
    kind = "DUPLICATE_INPUT"
    _, of_ours = of_two_and_of_a_layer(lambda layers: patched(layers, backend, rows))
    _, of_bases = of_two_and_of_a_layer(base)
    # An attention that is a drop-in calls the forward that it replaces, where transformers asks it for its class.
    assert of_ours[kind] <= of_bases[kind] + (2 if backend == "triton" else 0)

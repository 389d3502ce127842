"""Key and value projections in one launch: the same results, and never a stale one."""

import copy

import pytest
import torch
from tiny import logits, token_ids
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM
from where import DEVICE

import ia3rt
from ia3rt import ops
from ia3rt.kernels import launch
from ia3rt.modules.pair import Pair

IDS = token_ids()


class Attention(nn.Module):
    """Calls its projections as the test says."""

    def __init__(self, value_width=6):
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(8, value_width)

    def forward(self, x, calls=None):
        return calls(self, x) if calls else (self.k_proj(x), self.v_proj(x))


@pytest.fixture
def calls(monkeypatch):
    """How often each op ran; on a GPU a call that is like one before would launch the same again, past the op."""
    monkeypatch.setattr(launch, "can_repeat", lambda: False)
    counts = {"linear": 0, "linear_pair": 0}
    for name in counts:
        monkeypatch.setattr(ops, name, _counted(getattr(ops, name), name, counts))
    return counts


def _counted(op, name, counts):
    def run(*args):
        counts[name] += 1
        return op(*args)

    run.body = op.body
    return run


def patched(model):
    runtime = ia3rt.patch(model.to(DEVICE), backend="triton")
    generator = torch.Generator().manual_seed(1)
    for name in "bc":
        runtime.add_adapter(name, {site.key: torch.rand(site.width, generator=generator) for site in runtime.sites})
    runtime.set_adapter("b")
    return runtime


def drawn():
    return torch.randn(2, 3, 8).to(DEVICE)


def expected(runtime, name, layer, x):
    (scale,) = (
        vector for site, vector in runtime._bank.vectors(runtime._bank.adapters[name]).items() if site.path == layer
    )
    fresh = Attention(runtime.model.v_proj.out_features).to(DEVICE)
    return getattr(fresh, layer)(x) * scale


@pytest.mark.parametrize("value_width", [6, 10])
def test_both_come_from_one_op(calls, value_width):
    runtime, x = patched(Attention(value_width)), drawn()
    for name in "bc":
        runtime.set_adapter(name)
        key, value = runtime.model(x)
        torch.testing.assert_close(key, expected(runtime, name, "k_proj", x))
        torch.testing.assert_close(value, expected(runtime, name, "v_proj", x))
    assert calls == {"linear": 0, "linear_pair": 2}


def test_a_model_uses_it_in_each_layer(calls):
    """One that normalises its keys before it rotates them, so that the rotary embedding cannot wear their vectors."""
    sizes = dict(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16)
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    logits(patched(model).model, IDS)
    assert calls["linear_pair"] == 2


def test_another_x_or_a_changed_one_gets_its_own_result():
    runtime = patched(Attention())
    x, other = drawn(), drawn()

    def calls(model, x):
        model.k_proj(x)
        torch.testing.assert_close(model.v_proj(other), expected(runtime, "b", "v_proj", other))
        model.k_proj(x)
        x.mul_(2)
        torch.testing.assert_close(model.v_proj(x), expected(runtime, "b", "v_proj", x))

    runtime.model(x, calls)


def test_a_second_call_gets_its_own_result():
    runtime, x = patched(Attention()), drawn()
    runtime.model(x)
    runtime.set_adapter("c")
    torch.testing.assert_close(runtime.model.v_proj(x), expected(runtime, "c", "v_proj", x))


def test_where_nobody_comes_for_the_second_result_it_is_computed_no_more(calls):
    runtime, x = patched(Attention()), drawn()

    def keys(model, x):
        for _ in range(4):
            torch.testing.assert_close(model.k_proj(x), expected(runtime, "b", "k_proj", x))

    runtime.model(x, keys)
    assert calls == {"linear": 3, "linear_pair": 1}


def test_a_switch_between_the_two_calls_shows_in_the_next_forward():
    runtime, x = patched(Attention()), drawn()

    def switched(model, x):
        model.k_proj(x)
        runtime.set_adapter("c")
        return model.v_proj(x)

    torch.testing.assert_close(runtime.model(x, switched), expected(runtime, "b", "v_proj", x))
    torch.testing.assert_close(runtime.model(x)[1], expected(runtime, "c", "v_proj", x))


def test_a_layer_that_is_called_alone_computes_alone(calls):
    runtime, x = patched(Attention()), drawn()
    runtime.model.k_proj(x)
    runtime.set_adapter("c")
    torch.testing.assert_close(runtime.model.v_proj(x), expected(runtime, "c", "v_proj", x))
    assert calls == {"linear": 2, "linear_pair": 0}


def test_an_input_vector_on_one_of_them_ends_the_pair(calls):
    runtime, x = patched(Attention()), drawn()
    runtime.add_adapter("in", {("v_proj", "in"): torch.rand(8)})
    runtime.model(x)
    assert calls == {"linear": 2, "linear_pair": 0}


def test_copies_have_pairs_of_their_own():
    runtime, x = patched(Attention()), drawn()
    other = copy.deepcopy(runtime)
    other.set_adapter("c")
    pair = other.model.k_proj.ia3_pair
    assert isinstance(pair, Pair) and pair is not runtime.model.k_proj.ia3_pair
    torch.testing.assert_close(other.model(x)[1], expected(runtime, "c", "v_proj", x))
    torch.testing.assert_close(runtime.model(x)[1], expected(runtime, "b", "v_proj", x))


def test_gradients_are_those_of_separate_layers():
    runtime = patched(Attention())
    x = drawn().requires_grad_()
    key, value = runtime.model(x)
    (key.sin().sum() + value.cos().sum()).backward()
    fused, x.grad = x.grad, None
    (expected(runtime, "b", "k_proj", x).sin().sum() + expected(runtime, "b", "v_proj", x).cos().sum()).backward()
    torch.testing.assert_close(fused, x.grad)


def test_unpatching_leaves_nothing_behind():
    model = Attention()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    runtime = patched(model)
    model(drawn())
    runtime.unpatch()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before

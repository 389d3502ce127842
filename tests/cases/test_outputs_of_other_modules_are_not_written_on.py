"""A vector is multiplied in place only into what ia3rt computed: another module's output is somebody else's."""

import copy

import pytest
import torch
from tiny import logits, patched, tiny_model, token_ids
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from where import home

import ia3rt


class MatMul(torch.autograd.Function):
    """As bitsandbytes' MatMul8bitLt does with its shapes: the result is a view made in here."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return (x.reshape(-1, x.shape[-1]) @ weight.t()).reshape(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.saved_tensors[0], None


class View(nn.Linear):
    def forward(self, x):
        return MatMul.apply(x, self.weight) + 0 * self.bias if self.bias is not None else MatMul.apply(x, self.weight)


class ReturnsItsInput(nn.Linear):
    def forward(self, x):
        return x


class ReturnsAView(nn.Linear):
    def forward(self, x):
        return x.view(x.shape)


class ReturnsABuffer(nn.Linear):
    """As a layer that computes its result once."""

    def forward(self, x):
        if not hasattr(self, "kept"):
            self.kept = F.linear(x, self.weight).detach()
        return self.kept


class ReturnsAParameter(nn.Linear):
    def forward(self, x):
        return self.weight.expand(*x.shape[:-2], *self.weight.shape)


class KeepsItsOutput(nn.Linear):
    def forward(self, x):
        self.output = F.linear(x, self.weight)
        return self.output


class Tagged(torch.Tensor):
    """A weight of another library: it computes by its own code, and hands out what it keeps."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            weight = args[1].as_subclass(torch.Tensor)
            if not hasattr(args[1], "kept"):
                args[1].kept = args[0] @ weight.t()
            return args[1].kept
        return super().__torch_function__(function, types, args, kwargs or {})

    def __deepcopy__(self, memo):
        return self.as_subclass(torch.Tensor).clone().as_subclass(Tagged)


def linear_with_a_tensor_of_its_own(*args, **kwargs):
    layer = nn.Linear(*args, **kwargs)
    layer._parameters["weight"] = torch.randn(8, 8).as_subclass(Tagged)
    return layer


LAYERS = [View, ReturnsItsInput, ReturnsAView, ReturnsABuffer, ReturnsAParameter, KeepsItsOutput]


class Net(nn.Module):
    def __init__(self, cls):
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.o_proj = nn.Linear(8, 8), nn.Linear(8, 8)
        self.k_proj, self.v_proj = cls(8, 8, bias=False), cls(8, 8, bias=False)

    def forward(self, x):
        q = self.q_proj(x)
        return self.o_proj(q * self.k_proj(x) + self.v_proj(x) + x)


def vectors():
    generator = torch.Generator().manual_seed(1)
    return {name: torch.empty(8).uniform_(-0.5, 2, generator=generator) for name in ("k_proj", "v_proj")}


def truth(model, x, scales):
    q, k, v = model.q_proj(x), model.k_proj(x), model.v_proj(x)
    return model.o_proj(q * (k * scales["k_proj"]) + v * scales["v_proj"] + x)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("cls", [*LAYERS, linear_with_a_tensor_of_its_own])
def test_what_a_layer_returns_stays_as_it_is(cls, mode, backend):
    model = Net(cls).to(home(backend))
    device, fresh, scales = model.o_proj.weight.device, copy.deepcopy(model), vectors()
    x = torch.randn(3, 8, 8).to(device)
    given = x.clone()
    runtime = ia3rt.patch(model, backend=backend)
    runtime.add_adapter("a", scales)
    runtime.set_adapter("a")
    on = {name: vector.to(device) for name, vector in scales.items()}
    with mode():
        for _ in range(3):  # what it keeps, or was given, would be scaled again
            torch.testing.assert_close(model(x), truth(fresh, x, on), rtol=1e-4, atol=1e-5)
    assert torch.equal(x, given)
    for ours, theirs in zip(runtime.unpatch().parameters(), fresh.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    if cls is KeepsItsOutput:
        torch.testing.assert_close(model.k_proj.output, fresh.k_proj.output)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("cls", [View, ReturnsItsInput, ReturnsAView, KeepsItsOutput])
def test_vectors_behind_such_a_layer_are_trained(cls, backend):
    model = Net(cls).to(home(backend))
    device, fresh = model.o_proj.weight.device, copy.deepcopy(model)
    x = torch.randn(2, 3, 8).to(device)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    runtime = ia3rt.patch(model, backend=backend)
    runtime.add_adapter("a", vectors())
    ours = runtime.train_adapter("a")
    model(inputs[0]).square().sum().backward()
    theirs = {name: vector.to(device).requires_grad_() for name, vector in vectors().items()}
    truth(fresh, inputs[1], theirs).square().sum().backward()
    for mine, other in zip(ours, theirs.values(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-3, atol=1e-4)


class Kept(nn.Module):
    """An activation that returns what it keeps."""

    def forward(self, x):
        if not hasattr(self, "kept"):
            self.kept = x.sin()
        return self.kept


class Viewed(nn.Module):
    """An activation that returns a view of its argument."""

    def forward(self, x):
        return x.view(x.shape)


@pytest.mark.parametrize("activation", [Kept, Viewed, nn.Identity, nn.ReLU, lambda: nn.ReLU(inplace=True), nn.GELU])
@pytest.mark.parametrize("first", [nn.Linear, KeepsItsOutput])
def test_what_an_activation_returns_stays_as_it_is(activation, first):
    """Of an MLP that is taken apart: its gate is another's, or its activation's result is."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    torch.manual_seed(0)
    mlp = LlamaMLP(LlamaConfig(hidden_size=8, intermediate_size=12, num_attention_heads=2))
    mlp.act_fn, mlp.gate_proj = activation(), first(8, 12, bias=False)
    fresh, vector, x = copy.deepcopy(mlp), torch.rand(12), torch.randn(2, 3, 8)
    runtime = ia3rt.patch(nn.ModuleDict({"mlp": mlp}))
    runtime.add_adapter("a", {"mlp.down_proj": vector})
    runtime.set_adapter("a")
    with torch.no_grad():
        fresh.down_proj.weight.mul_(vector)
        for _ in range(3):
            torch.testing.assert_close(mlp(x), fresh(x), rtol=1e-4, atol=1e-6)
    if first is KeepsItsOutput:
        torch.testing.assert_close(mlp.gate_proj.output, fresh.gate_proj.output)
    if activation is Kept:
        torch.testing.assert_close(mlp.act_fn.kept, fresh.act_fn.kept)


class Dispatched(TorchDispatchMode):
    """Keeps what each operation gave."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return self.keep(function(*args, **(kwargs or {})))

    def keep(self, result):
        if isinstance(result, torch.Tensor):
            self.seen.append((result, result.detach().clone()))
        return result


class Called(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return Dispatched.keep(self, function(*args, **(kwargs or {})))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("mode", [Dispatched, Called])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_a_mode_saw_stays_as_it_was(family, mode, grad):
    model = tiny_model(family)
    patched(model).set_adapter("a")
    logits(model, token_ids())
    with mode() as looking, torch.set_grad_enabled(grad):
        model(token_ids())
    assert len(looking.seen) > 20 and all(torch.equal(*each) for each in looking.seen)

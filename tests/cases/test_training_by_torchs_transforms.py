"""Functions of an adapter's vectors, by torch.func's transforms of a forward: ensembles, Jacobians, products with them.

The truth is PEFT, of which the same functions are taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest
import torch
from tiny import FAMILIES, peft_model, tiny_model, token_ids
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap
from where import DEVICE

import ia3rt
from ia3rt import ops

IDS = token_ids()
Vectors: TypeAlias = dict[str, Tensor]
Call: TypeAlias = Callable[[Vectors], Tensor]


def several(vectors: Vectors) -> Vectors:
    return {path: torch.stack([vector * factor for factor in (1.0, 0.7, 1.2)]) for path, vector in vectors.items()}


def loss(call: Call) -> Call:
    return lambda vectors: call(vectors).pow(2).mean()


def one_by_one(call: Call, vectors: Vectors) -> Vectors:
    """The logits where the vectors of one site are several, of each site."""
    return {p: vmap(lambda v: call({**vectors, p: v}))(each) for p, each in several(vectors).items()}  # noqa: B023


TRANSFORMS = {
    "an ensemble": lambda call, at, along: vmap(call)(several(at)),
    "an ensemble without gradients": lambda call, at, along: torch.no_grad()(vmap(call))(several(at)),
    "several of one site": lambda call, at, along: one_by_one(call, at),
    "several of one site without gradients": lambda call, at, along: torch.no_grad()(one_by_one)(call, at),
    "gradients of an ensemble": lambda call, at, along: vmap(grad(loss(call)))(several(at)),
    "a derivative": lambda call, at, along: jvp(call, (at,), (along,))[1],
    "derivatives of an ensemble": lambda call, at, along: vmap(lambda v: jvp(call, (v,), (along,))[1])(several(at)),
    "a Hessian's product": lambda call, at, along: jvp(grad(loss(call)), (at,), (along,))[1],
    "a Jacobian": lambda call, at, along: jacrev(lambda v: call(v)[0, 0, :4])(at),
    "a Jacobian forwards": lambda call, at, along: jacfwd(lambda v: call({**at, **v})[0, 0, :4])(
        {path: at[path] for path in sorted(at)[:1]}
    ),
}


def function_of_vectors(model: nn.Module) -> tuple[Call, Vectors]:
    """A model's logits by vectors, and those that it has, by the paths of what they act at."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    names = {name.removeprefix("base_model.model.").partition(".ia3_")[0]: name for name in trained}

    def call(vectors: Vectors) -> Tensor:
        given = {name: vectors[path].reshape(trained[name].shape) for path, name in names.items()}
        result: Tensor = functional_call(model, given, (IDS,), {"use_cache": False}).logits
        return result

    return call, {path: trained[name].detach().flatten() for path, name in names.items()}


def pair(dtype: torch.dtype, family: str, backend: str = "torch", **config: object) -> tuple[Call, Call, Vectors]:
    """PEFT's function, ours, and the vectors of an adapter."""
    model = tiny_model(family, dtype)
    model.set_attn_implementation("eager")  # the fused one has no derivative forwards
    wrapped, patched = (peft_model(model, family, "a", **config) for _ in range(2))
    theirs, vectors = function_of_vectors(wrapped)
    runtime = ia3rt.patch(patched, backend=backend)
    runtime.train_adapter("a")
    ours, trained = function_of_vectors(runtime.model)
    assert trained.keys() == vectors.keys()
    return theirs, ours, vectors


def assert_same(ours: Tensor | Vectors, theirs: Tensor | Vectors, dtype: torch.dtype) -> None:
    bar = dict(rtol=1e-5, atol=1e-5) if dtype is torch.float32 else dict(rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(ours, theirs, **bar)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_transform_gives_what_it_gives_of_peft(family: str, dtype: torch.dtype, transform: str) -> None:
    theirs, ours, at = pair(dtype, family)
    along = {path: torch.randn(vector.shape, generator=torch.Generator().manual_seed(4)) for path, vector in at.items()}
    assert_same(TRANSFORMS[transform](ours, at, along), TRANSFORMS[transform](theirs, at, along), dtype)


def test_several_of_a_site_whose_product_is_formed_in_place() -> None:
    """As the MLP of Llama has it without gradients: what its gate gives is one, what its up_proj gives is several."""
    theirs, ours, at = pair(torch.float32, "llama", target_modules=["up_proj", "down_proj"])
    for gives in (one_by_one, torch.no_grad()(one_by_one)):
        assert_same(gives(ours, at), gives(theirs, at), torch.float32)


@pytest.mark.parametrize("transform", ["gradients of an ensemble", "a derivative", "a Hessian's product", "a Jacobian"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_transform_on_the_triton_backend(family: str, transform: str) -> None:
    theirs, ours, at = pair(torch.float32, family, "triton")
    along = {path: torch.randn(vector.shape, generator=torch.Generator().manual_seed(4)) for path, vector in at.items()}
    assert_same(TRANSFORMS[transform](ours, at, along), TRANSFORMS[transform](theirs, at, along), torch.float32)


@pytest.mark.parametrize("attention", ["eager", "ia3rt"])
def test_derivatives_forwards_on_the_triton_backend(attention: str) -> None:
    """By an input, also where nothing else asks for derivatives."""
    model = tiny_model("llama", torch.float32)
    model.set_attn_implementation("eager")
    at, along = (torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(seed)) for seed in (4, 5))

    def logits(x: Tensor) -> Tensor:
        return model(inputs_embeds=x, use_cache=False).logits  # type: ignore[no-any-return]

    truth = jvp(logits, (at,), (along,))[1]
    runtime = ia3rt.patch(model, backend="triton")
    runtime.add_adapter("ones", {site.key: torch.ones(site.width) for site in runtime.sites})
    runtime.set_adapter("ones")
    model.set_attn_implementation(attention)
    with torch.no_grad(), forward_ad.dual_level():
        derivative = forward_ad.unpack_dual(logits(forward_ad.make_dual(at, along))).tangent
    assert_same(derivative, truth, torch.float32)
    assert_same(jvp(logits, (at,), (along,))[1], truth, torch.float32)


def test_gradients_of_gradients_on_the_triton_backend_are_refused() -> None:
    x = torch.randn(2, 8, device=DEVICE, requires_grad=True)
    mixes = torch.zeros(1, 4, dtype=torch.int32, device=DEVICE)
    y = ops.activation(x, x, None, mixes, mixes[0, :1], "silu")
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match='backend="torch"'):
        gradient.sum().backward()

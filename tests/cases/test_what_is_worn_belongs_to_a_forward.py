"""A forward wears what it began with, to its end and no longer."""

import sys

import pytest
import torch
from tiny import logits, patched, tiny_model
from worn_truth import IDS, close, input_gradients, truth

import ia3rt


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def runtime() -> ia3rt.Runtime:
    return patched(tiny_model())


def test_a_switch_inside_a_forward_is_for_the_next(runtime) -> None:
    model = runtime.model
    hook = model.model.layers[0].register_forward_hook(lambda *_: runtime.set_adapter("b"))
    runtime.set_adapter("a")
    close(logits(model, IDS), logits(truth(runtime, "a"), IDS))
    hook.remove()
    close(logits(model, IDS), logits(truth(runtime, "b"), IDS))


def test_a_forward_that_fails_leaves_nothing_behind(runtime) -> None:
    model = runtime.model
    runtime.set_adapter("a")
    hook = model.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    for wear in (lambda: None, lambda: runtime.route(["a", "b", None])):
        wear()
        with pytest.raises(ZeroDivisionError):
            logits(model, IDS)
    hook.remove()
    runtime.set_adapter("b")
    close(logits(model, IDS), logits(truth(runtime, "b"), IDS))


@pytest.mark.parametrize("watched", [True, False])
def test_ctrl_c_in_a_forward_that_is_followed_leaves_nothing_that_follows(runtime, watched) -> None:
    model = runtime.model
    if not watched:  # it is known which layers a forward reaches, and not where it has its rows
        logits(model, IDS)
    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    runtime.route(["a", None, "b"])
    with pytest.raises(KeyboardInterrupt):
        logits(model, IDS)
    hook.remove()
    assert not torch._C._len_torch_dispatch_stack() and sys.getprofile() is None


@pytest.mark.parametrize("routed", [False, True])
def test_a_forward_that_ctrl_c_ended_is_over(runtime, routed) -> None:
    """torch calls no hook after an exception that is no Exception."""
    model = runtime.model
    hook = model.model.layers[0].register_forward_hook(interrupt)
    runtime.set_adapter("a")
    if routed:
        runtime.route(["a", None, "b"])  # the first of its kind, which is looked at
    with pytest.raises(KeyboardInterrupt):
        logits(model, IDS)
    hook.remove()
    for name in ("b", "a"):
        runtime.set_adapter(name)
        close(logits(model, IDS), logits(truth(runtime, name), IDS))
        close(input_gradients(model, IDS), input_gradients(truth(runtime, name), IDS))
    with runtime.route(["a", "b"]), pytest.raises(ValueError, match="the route has 2 rows, but the batch has 3"):
        logits(model, IDS)
    assert not torch._C._len_torch_dispatch_stack()

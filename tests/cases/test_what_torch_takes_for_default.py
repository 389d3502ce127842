"""Vectors, mixes and routes under torch's own defaults: of dtype, of device, and under modes that see operations."""

from collections.abc import Iterator

import pytest
import torch
from tiny import logits, peft_model, save_each, tiny_model, token_ids
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from where import home

import ia3rt

BACKENDS = ["torch", "triton"]


@pytest.fixture
def as_before() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.fixture
def folders(tmp_path) -> list:
    return save_each(peft_model(tiny_model(), "llama"), tmp_path)


@pytest.fixture
def truths(folders) -> dict[str, Tensor]:
    """By PEFT, with torch's defaults as they are."""
    wrapped, found = peft_model(tiny_model(), "llama"), {}
    with torch.no_grad():
        for name in "bc":
            wrapped.set_adapter(name)
            found[name] = wrapped(token_ids()).logits
        wrapped.base_model.set_adapter(["b", "c"])
        found["b*c"] = wrapped(token_ids()).logits
    return found


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("default", ["dtype", "device"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_not_what_vectors_are_kept_in(backend, default, folders, truths, as_before) -> None:
    """A script that sets bfloat16 for its own tensors, or a device, has an adapter of a float32 model on the CPU."""
    model, x = tiny_model().to(home(backend)), token_ids()
    if default == "dtype":
        torch.set_default_dtype(torch.bfloat16)
    else:
        torch.set_default_device("meta")
    runtime = ia3rt.patch(model, backend=backend)
    for name, folder in zip("bcd", folders, strict=True):
        runtime.load_adapter(folder, name)
    runtime.add_weighted_adapter(["b", "c"], [0.5, 0.5], "mean", combination_type="linear")
    with runtime.route(["b", None, "c"]):
        for _ in range(2):  # the first is followed
            rows = logits(model, x)
    runtime.set_adapter(["b", "c"])
    product = logits(model, x)
    runtime.set_adapter("mean")
    mean = logits(model, x)
    runtime.set_adapter("b")
    runtime.merge_adapter()
    merged = logits(model, x)
    runtime.unmerge_adapter()
    tensors = [rows, product, mean, merged]
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    assert all(each.device.type == "cpu" for each in tensors)
    close(rows[0], truths["b"][0])
    close(rows[2], truths["c"][2])
    close(product, truths["b*c"])
    close(merged, truths["b"])
    runtime.set_adapter({"b": 0.5, "c": 0.5})
    close(mean, logits(model, x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_alone_leave_nothing(backend, folders, truths) -> None:
    """A forward in FakeTensorMode, which has no numbers, is none that rows are followed through or mixes laid in."""
    model, x = tiny_model().to(home(backend)), token_ids()
    runtime = ia3rt.patch(model, backend=backend)
    for name, folder in zip("bcd", folders, strict=True):
        runtime.load_adapter(folder, name)
    with FakeTensorMode(allow_non_fake_inputs=True), runtime.route(["b", None, "c"]):
        shape = logits(model, torch.zeros(3, 7, dtype=torch.long)).shape
    assert shape == (3, 7, 128)
    with runtime.route(["b", None, "c"]):
        rows = logits(model, x)
    close(rows[0], truths["b"][0])
    close(rows[2], truths["c"][2])
    with FakeTensorMode(allow_non_fake_inputs=True):
        runtime.set_adapter("b")
    close(logits(model, x), truths["b"])

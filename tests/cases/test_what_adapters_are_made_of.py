"""What `add_adapter` and `add_weighted_adapter` are given: what is no tensor of floating point numbers is told so."""

from __future__ import annotations

from typing import Any

import numpy as np
import peft
import pytest
import torch
from tiny import logits, tiny_model, token_ids

import ia3rt

KEY = ("model.layers.0.mlp.down_proj", "in")
WIDTH = 96
ONES = torch.ones(WIDTH)
CONFIG = peft.IA3Config(target_modules=["down_proj"])

VECTORS: dict[str, tuple[object, type[Exception], str]] = {
    "a list": ({KEY: [1.0] * WIDTH}, TypeError, r"'new' must be tensors, .* at \('model.*', 'in'\) is of type list"),
    "an array": ({KEY: np.ones(WIDTH)}, TypeError, r"is of type ndarray: make one of it, as by torch.tensor\("),
    "nothing": ({KEY: None}, TypeError, "is of type NoneType"),
    "no mapping": ([ONES], TypeError, "'new' must be a mapping of names to tensors, and what is given is of type list"),
    "an empty list": ([], TypeError, "must be a mapping"),
    "a tensor": (ONES, TypeError, "must be a mapping of names to tensors, and what is given is of type Tensor"),
    "a config of PEFT's": (CONFIG, TypeError, "must be a mapping .* of type IA3Config"),
    "a number for a place": ({3: ONES}, ValueError, r"'new' has a vector at 3: name its place by a module's path"),
    "a place without a side": ({KEY[:1]: ONES}, ValueError, r"a vector at \('model.*',\): name its place"),
    "int64": ({KEY: ONES.long()}, ValueError, "'new' at .*down_proj .* is of dtype torch.int64: expected a floating p"),
    "bool": ({KEY: ONES.bool()}, ValueError, "of dtype torch.bool: expected a floating point one"),
    "sparse": ({KEY: ONES.to_sparse()}, ValueError, "a vector of layout torch.sparse_coo at .*: expected a plain"),
    "meta": ({KEY: ONES.to("meta")}, ValueError, "without numbers, on the meta device at .*down_proj"),
    "too large for any bank": (
        {KEY: ONES.double() * -1e300},
        ValueError,
        r"'new' has a number of magnitude 1e\+300 at .* too large .* torch.float32: no dtype of a bank's holds it",
    ),
    "NaN in eight bits": ({KEY: (ONES * torch.nan).to(torch.float8_e4m3fn)}, ValueError, "has a NaN or inf at"),
}
MODULES: dict[str, tuple[Any, str]] = {
    "no mapping": (["lm_head"], "the modules of adapter 'new' must be a mapping of names to state_dict"),
    "a tensor": ({"lm_head": ONES}, "'new' at 'lm_head' must be a mapping of names to tensors, .* of type Tensor"),
    "a list": ({"lm_head": {"weight": [1.0]}}, "at 'lm_head' must be tensors, .* at 'weight' is of type list"),
}


@pytest.fixture
def runtime() -> ia3rt.Runtime:
    runtime = ia3rt.patch(tiny_model())
    runtime.add_adapter("a", {KEY: 1.5 * ONES})
    return runtime


@pytest.mark.parametrize(("vectors", "error", "message"), VECTORS.values(), ids=VECTORS)
def test_vectors_that_are_none_are_refused(
    runtime: ia3rt.Runtime, vectors: Any, error: type[Exception], message: str
) -> None:
    sites, before = runtime.sites, logits(runtime.model, token_ids())
    with pytest.raises(error, match=message):
        runtime.add_adapter("new", vectors)
    assert (runtime.adapters, runtime.sites) == (["a"], sites)
    assert torch.equal(logits(runtime.model, token_ids()), before)


@pytest.mark.parametrize(("modules", "message"), MODULES.values(), ids=MODULES)
def test_modules_that_are_none_are_refused(runtime: ia3rt.Runtime, modules: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        runtime.add_adapter("new", {KEY: ONES}, modules=modules)
    assert runtime.adapters == ["a"]


def test_a_config_that_is_none_is_refused(runtime: ia3rt.Runtime) -> None:
    config: Any = CONFIG
    with pytest.raises(TypeError, match="the config of adapter 'new' must be a mapping .* of type IA3Config"):
        runtime.add_adapter("new", {KEY: ONES}, config)
    assert runtime.adapters == ["a"]


@pytest.mark.parametrize(
    ("importances", "error", "message"),
    [
        ([ONES], TypeError, "importances must be a mapping"),
        ({"a": [ONES]}, TypeError, "the importances of adapter 'a' must be a mapping"),
        ({"a": {KEY: [1.0] * WIDTH}}, TypeError, "the importances of adapter 'a' must be tensors, .* of type list"),
        ({"a": {KEY: ONES.long()}}, ValueError, "'a' at .*down_proj .* is of dtype torch.int64: expected a floating"),
        ({"a": {KEY: ONES.to(torch.complex64)}}, ValueError, "of dtype torch.complex64: expected a floating"),
    ],
    ids=["no mapping", "none of places", "a list", "int64", "complex"],
)
def test_importances_that_are_none_are_refused(
    runtime: ia3rt.Runtime, importances: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        runtime.add_weighted_adapter(["a"], None, "new", "fisher", importances=importances)
    assert runtime.adapters == ["a"]


def test_a_half_bank_says_which_dtype_would_hold_a_number() -> None:
    runtime = ia3rt.patch(tiny_model(), dtype=torch.float16)
    with pytest.raises(ValueError, match=r"magnitude 1e\+06 at .*: patch\(dtype=torch.float32\) holds it"):
        runtime.add_adapter("new", {KEY: 1e6 * ONES})
    with pytest.raises(ValueError, match="no dtype of a bank's holds it"):
        runtime.add_adapter("new", {KEY: 1e300 * ONES.double()})
    runtime.add_adapter("new", {KEY: 6e4 * ONES.double()})

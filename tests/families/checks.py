"""One function with all checks of a family: ia3rt beside PEFT, on the same model and the same checkpoints."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families.family import Family
from families.truth import SUM, Outputs, Truth, outputs, pefts, randomize
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
)
from tiny import peft_vectors
from torch import Tensor, nn
from where import home

import ia3rt

ROWS: list[Any] = ["a", None, ["a", "b"], SUM]
CLOSE = 2e-5  # of the largest number in an output: for another order of sums, as in a batch of one row
TOKENS = 5


@dataclass(frozen=True)
class Report:
    """What was seen of a family, for docs/models.md.

    Attributes:
        sites: where `patch()` lets vectors act, with N for a layer's number.
        kernels: the operations that apply them on a GPU.
        default: the modules of PEFT's own adapter for the type; None where PEFT has none.
        mixed: what becomes of a batch whose rows wear different adapters.
        generation: the same of `generate`; None where the class has none.
        merged: what becomes of merging.
    """

    sites: tuple[str, ...]
    kernels: tuple[str, ...]
    default: str | None
    mixed: str
    generation: str | None
    merged: str


def check(family: Family, folder: Path) -> Report:
    """Compares everything; raises AssertionError where something differs.

    Args:
        family: which.
        folder: an empty one, for the adapters' files.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, on Conv1D and on merging
        truth = Truth(family, folder)
        model = family.build()
        before, kinds = outputs(model, family.inputs(2)), _kinds(model)
        runtime = ia3rt.patch(model)
        assert {site.key for site in runtime.sites} == truth.keys, "the sites are not those that the table names"
        for each in truth.folders:
            runtime.load_adapter(each)
        _check_outputs(runtime, truth, family, before)
        mixed = _check_mixed(runtime, truth, family)
        generation = _check_generation(runtime, truth, family)
        merged = _check_merged(runtime, truth, family)
        runtime.unpatch()
        assert _kinds(model) == kinds, "unpatch() has to give the classes back"
        own = family.build().state_dict()
        assert all(torch.equal(own[name], value) for name, value in model.state_dict().items()), "weights have changed"
        _assert_same(outputs(model, family.inputs(2)), before, exact=True)
        default = _check_default(family, folder / "default")
        _check_taken_over(family)
        return Report(_named(runtime.sites), _kernels(family), default, mixed, generation, merged)


def _check_outputs(runtime: ia3rt.Runtime, truth: Truth, family: Family, before: Outputs) -> None:
    inputs = family.inputs(2)
    for spec in ("a", "b", ["a", "b"], SUM):
        expected = truth.outputs(spec, inputs)
        runtime.set_adapter(spec)
        found = outputs(runtime.model, inputs)
        _assert_same(found, expected)
        assert any(not _are_close(found[at], before[at], 5) for at in expected), "the adapter does not show"


def _check_mixed(runtime: ia3rt.Runtime, truth: Truth, family: Family) -> str:
    """A batch in which each row wears another mix, beside PEFT on each row alone."""
    inputs = family.inputs(len(ROWS))
    alone = [_row(inputs, row) for row in range(len(ROWS))]
    of_rows = list(_of_rows(family.build(), inputs, alone))
    if not of_rows:
        return "the model itself mixes rows"
    expected = [truth.outputs(spec, one) for spec, one in zip(ROWS, alone, strict=True)]
    images = list(range(len(ROWS))) if family.images else None
    if images is not None:
        with pytest.raises(ValueError, match=r"images=\[…\]"), runtime.route(ROWS):
            outputs(runtime.model, inputs)
    try:
        with runtime.route(ROWS, images=images):
            found = [outputs(runtime.model, inputs) for _ in range(2)]  # the first is looked at, the second is not
    except ValueError as error:
        assert family.mixed is not None and re.search(family.mixed, str(error)), f"refused by row: {error}"
        return f"refused: {family.mixed}"
    assert family.mixed is None, "it is not refused any more"
    for each in found:
        for at in of_rows:
            for row, one in enumerate(expected):
                assert _are_close(each[at][row], one[at][0]), f"row {row} of output {at} is another one's"
    return "right, with `images=[…]`" if family.images else "right"


def _of_rows(model: nn.Module, inputs: dict[str, Tensor], alone: list[dict[str, Tensor]]) -> Iterator[str]:
    """The outputs in which the model itself, without adapters, keeps the rows apart."""
    batch, each = outputs(model, inputs), [outputs(model, one) for one in alone]
    for at, x in batch.items():
        by_row = len(x) == len(alone) and all(at in one and one[at].shape == x[:1].shape for one in each)
        if by_row and all(_are_close(x[row], one[at][0]) for row, one in enumerate(each)):
            yield at


def _row(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: x[row : row + 1] if x.dim() and len(x) == len(ROWS) else x for name, x in inputs.items()}


def _check_generation(runtime: ia3rt.Runtime, truth: Truth, family: Family) -> str | None:
    can = getattr(runtime.model, "can_generate", lambda: False)() if family.generates is None else family.generates
    if not can:
        return None
    inputs = {name: x for name, x in family.inputs(len(ROWS)).items() if not name.startswith("decoder_")}
    alone = [_row(inputs, row) for row in range(len(ROWS))]
    for spec in ("a", ["a", "b"]):
        runtime.set_adapter(spec)
        with truth.wearing(spec):
            expected = generated(truth.model, inputs)
        assert torch.equal(generated(runtime.model, inputs), expected), f"generate wearing {spec} is not PEFT's"
    base = family.build()
    if not all(torch.equal(generated(base, inputs)[row], generated(base, one)[0]) for row, one in enumerate(alone)):
        return "PEFT's; decoding a batch mixes its rows in the model itself"
    try:
        with runtime.route(ROWS, images=list(range(len(ROWS))) if family.images else None):
            found = generated(runtime.model, inputs)
    except ValueError as error:
        assert family.mixed is not None and re.search(family.mixed, str(error)), f"refused by row: {error}"
        return "PEFT's"
    for row, (spec, one) in enumerate(zip(ROWS, alone, strict=True)):
        with truth.wearing(spec):
            expected = generated(truth.model, one)
        assert torch.equal(found[row], expected[0]), f"row {row} of a mixed batch generates other tokens"
    return "PEFT's, by row too"


def generated(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The tokens of greedy decoding."""
    torch.manual_seed(3)
    settings = dict(max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, num_beams=1, pad_token_id=0)
    return model.generate(**inputs, **settings)  # type: ignore[no-any-return]


def _check_merged(runtime: ia3rt.Runtime, truth: Truth, family: Family) -> str:
    inputs = family.inputs(2)
    runtime.set_adapter("a")
    worn = outputs(runtime.model, inputs)
    with truth.wearing("a"):
        truth.wrapped.base_model.merge_adapter()
        _assert_same(worn, outputs(truth.model, inputs))
    try:
        runtime.merge_adapter()
    except ValueError as error:
        assert family.merged is not None and re.search(family.merged, str(error)), f"not merged: {error}"
        return f"refused: {family.merged}"
    assert family.merged is None, "merging is not refused any more"
    merged = outputs(runtime.model, inputs)
    runtime.unmerge_adapter()
    _assert_same(merged, worn)
    _assert_same(outputs(runtime.model, inputs), worn, exact=True)
    return "right"


def _check_default(family: Family, folder: Path) -> str | None:
    """Whether an adapter that PEFT makes without being told where loads and computes as PEFT does."""
    kind = getattr(getattr(family.build(), "config", None), "model_type", None)
    targets = TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(kind)
    if targets is None:
        return None
    wrapped = peft.get_peft_model(family.build(), peft.IA3Config()).eval()
    randomize(wrapped)
    wrapped.save_pretrained(folder)
    model = family.build()
    runtime = ia3rt.patch(model)
    runtime.set_adapter(runtime.load_adapter(folder, "default"))
    _assert_same(outputs(model, family.inputs(2)), outputs(wrapped, family.inputs(2)))
    inputs = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(kind, [])
    paths = [path for path, _ in peft_vectors(wrapped, "default")]
    found = [name for name in targets if any(f".{path}".endswith(f".{name}") for path in paths)]  # not what is no layer
    return ", ".join(f"{name} (in)" if name in inputs else name for name in found)


def _check_taken_over(family: Family) -> None:
    """Whether `patch(peft_model)` has the sites of the adapters that it takes over, and goes on with what they do."""
    wrapped = pefts(family)
    theirs = {key for name in "ab" for key in peft_vectors(wrapped, name)}
    expected = outputs(wrapped.get_base_model(), family.inputs(2))
    runtime = ia3rt.patch(wrapped)
    assert {site.key for site in runtime.sites} == theirs and runtime.adapters == ["a", "b"]
    _assert_same(outputs(wrapped.get_base_model(), family.inputs(2)), expected)
    runtime.unpatch()
    _assert_same(outputs(wrapped.get_base_model(), family.inputs(2)), expected, exact=True)


def _kernels(family: Family) -> tuple[str, ...]:
    """What applies the vectors on a GPU, by `ia3rt.explain`."""
    model = family.build().to(home("triton"))
    ia3rt.patch(model, backend="triton")
    return tuple(sorted({site.kernel for site in ia3rt.explain(model).sites}))


def _named(sites: list[ia3rt.Site]) -> tuple[str, ...]:
    """The sites as a reader wants them: the same place in each layer once."""
    return tuple(dict.fromkeys(f"{re.sub(r'(?<=[.])[0-9]+(?=[.])', 'N', site.path)} ({site.side})" for site in sites))


def _kinds(model: nn.Module) -> dict[str, type]:
    return {path: type(module) for path, module in model.named_modules()}


def _are_close(found: Tensor, expected: Tensor, times: float = 1) -> bool:
    """Within `CLOSE`, where inf and NaN, as some masks give, are where they were."""
    scale = expected[expected.isfinite()].abs().max().item() if expected.isfinite().any() else 1.0
    return torch.allclose(found, expected, rtol=0, atol=times * CLOSE * scale, equal_nan=True)


def _assert_same(found: Outputs, expected: Outputs, exact: bool = False) -> None:
    assert found.keys() == expected.keys()
    for at in found:
        if exact:
            assert torch.equal(found[at].nan_to_num(), expected[at].nan_to_num()), f"output {at} is not the same"
        else:
            assert _are_close(found[at], expected[at]), (
                f"output {at} differs by {(found[at] - expected[at]).abs().max()}"
            )

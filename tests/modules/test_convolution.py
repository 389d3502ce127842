"""Convolutions wear vectors over their channels as PEFT's do, in groups or not."""

from __future__ import annotations

import copy

import pytest
import torch
from convolutions import images, model, peft_model
from tiny import save_each
from torch import nn
from where import home

import ia3rt

DTYPES = [torch.float32, torch.bfloat16]
SUM = {"b": 0.25, "d": -0.7}


def names_of(dtype):
    return str(dtype).removeprefix("torch.")


@pytest.fixture(scope="module", params=DTYPES, ids=names_of)
def pair(request, tmp_path_factory):
    """A PEFT model with three adapters, and a Runtime over the same model that loaded their files."""
    plain = model(request.param)
    wrapped = peft_model(plain)
    runtime = ia3rt.patch(plain)
    for folder in save_each(wrapped, tmp_path_factory.mktemp("adapters")):
        runtime.load_adapter(folder)
    wrapped.base_model.add_weighted_adapter(["b", "d"], list(SUM.values()), "sum")
    return wrapped, runtime, request.param


def peft_output(wrapped, spec, x):
    with torch.no_grad():
        if spec is None:
            with wrapped.disable_adapter():
                return wrapped(x)
        wrapped.base_model.set_adapter(["sum"] if isinstance(spec, dict) else [spec] if isinstance(spec, str) else spec)
        return wrapped(x)


def output(runtime, x):
    with torch.no_grad():
        return runtime.model(x)


@pytest.mark.parametrize("spec", ["b", ["b", "c", "d"], None], ids=str)
def test_a_checkpoint_of_pefts_is_worn_as_in_peft(pair, spec):
    wrapped, runtime, dtype = pair
    assert {(site.path, site.side, site.width, site.spatial) for site in runtime.sites} == {
        ("same", "out", 4, 2),
        ("wide", "in", 4, 2),
        ("deep", "in", 4, 3),
        ("out", "out", 5, 0),
    }
    runtime.set_adapter(spec)
    assert torch.equal(output(runtime, images(dtype=dtype)), peft_output(wrapped, spec, images(dtype=dtype)))


def test_a_weighted_sum_is_pefts(pair):
    wrapped, runtime, dtype = pair
    runtime.set_adapter(SUM)
    ours, pefts = output(runtime, images(dtype=dtype)), peft_output(wrapped, SUM, images(dtype=dtype))
    close = {torch.float32: 1e-6, torch.bfloat16: 5e-2}[dtype]  # PEFT rounds the sum to the model's dtype
    torch.testing.assert_close(ours, pefts, rtol=close, atol=close)


def test_each_row_wears_its_own(pair):
    wrapped, runtime, dtype = pair
    rows = ["b", None, ["c", "d"], SUM]  # as many as channels
    x = images(len(rows), dtype)
    close = {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    with runtime.route(rows):
        for _ in range(2):  # the first forward of its kind is looked at
            mixed = output(runtime, x)
            for row, spec in enumerate(rows):
                expected = peft_output(wrapped, spec, x[row : row + 1])
                torch.testing.assert_close(mixed[row : row + 1], expected, rtol=close, atol=close)


@pytest.mark.parametrize("format_", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_layout_of_memory_changes_nothing(format_):
    plain = model()
    expected = peft_output(peft_model(plain, "b"), "b", images())
    runtime = ia3rt.patch(peft_model(plain.to(memory_format=torch.contiguous_format), "b"))
    runtime.set_adapter("b")
    with torch.no_grad():
        got = runtime.model(images().to(memory_format=format_))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_what_is_saved_loads_in_peft(tmp_path):
    plain = model()
    runtime = ia3rt.patch(plain)
    generator = torch.Generator().manual_seed(3)
    sites = {("same", "in"): 4, ("wide", "out"): 8, ("deep", "out"): 6, ("first", "in"): 3}
    runtime.add_adapter("a", {key: torch.rand(width, generator=generator) for key, width in sites.items()})
    runtime.set_adapter("a")
    runtime.save_adapter("a", tmp_path)
    import peft

    wrapped = peft.PeftModel.from_pretrained(model(), tmp_path).eval()
    assert {tuple(p.shape) for n, p in wrapped.named_parameters() if "ia3_l" in n} == {
        (1, 4, 1, 1),
        (1, 8, 1, 1),
        (1, 6, 1, 1, 1),
        (1, 3, 1, 1),
    }
    with torch.no_grad():
        assert torch.equal(runtime.model(images()), wrapped(images()))
    again = ia3rt.patch(model())
    again.load_adapter(tmp_path, "a")
    again.set_adapter("a")
    assert torch.equal(output(again, images()), output(runtime, images()))


def test_a_peft_model_is_taken_over_and_given_back():
    wrapped = peft_model(model(), "b")
    before = peft_output(wrapped, "b", images())
    runtime = ia3rt.patch(wrapped)
    assert torch.equal(output(runtime, images()), before)
    runtime.add_adapter("new", {("first", "out"): torch.full((4,), 2.0)})
    assert runtime.unpatch() is wrapped
    assert torch.equal(peft_output(wrapped, "b", images()), before)
    assert wrapped.get_base_model().first.ia3_l["new"].shape == (1, 4, 1, 1)


def test_merging_is_wearing_and_unmerging_gives_the_weights_back():
    plain = model().double()
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    runtime = ia3rt.patch(plain)
    generator = torch.Generator().manual_seed(3)
    widths = {"same": (4, 4), "wide": (4, 8), "deep": (4, 6), "line": (6, 5)}
    vectors = {
        (path, side): torch.rand(width, generator=generator)
        for path, both in widths.items()
        for side, width in zip(("in", "out"), both, strict=True)
    }
    runtime.add_adapter("a", vectors)
    runtime.set_adapter("a")
    x = images(dtype=torch.float64)
    worn = output(runtime, x)
    runtime.merge_adapter()
    assert not torch.equal(plain.same.weight, before["same.weight"])
    torch.testing.assert_close(output(runtime, x), worn, rtol=1e-12, atol=1e-12)
    runtime.unmerge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())


def test_a_conv1d_is_scaled_by_the_papers_formula():
    layer = nn.Conv1d(6, 4, 3, groups=2, padding=1)
    block = nn.ModuleDict({"line": copy.deepcopy(layer)})
    runtime = ia3rt.patch(block, target_modules=["line"])
    l_in, l_out = torch.rand(6), torch.rand(4)
    runtime.add_adapter("a", {("line", "in"): l_in, ("line", "out"): l_out})
    runtime.set_adapter("a")
    for x in (torch.randn(2, 6, 9), torch.randn(6, 9)):
        expected = layer.double()(x.double() * l_in.double()[:, None]) * l_out.double()[:, None]
        torch.testing.assert_close(block["line"](x), expected.float(), rtol=1e-5, atol=1e-6)


class Standardised(nn.Conv2d):
    """As BiT's: its output does not depend on the scale of its weight."""

    def forward(self, x):
        weight = self.weight / self.weight.std()
        return nn.functional.conv2d(x, weight, self.bias)


def test_a_subclass_wears_and_is_merged_only_where_its_forward_is_torchs():
    class Renamed(nn.Conv2d):
        pass

    for cls in (Renamed, Standardised):
        block = nn.ModuleDict({"conv": cls(3, 4, 1)})
        x = torch.randn(2, 3, 5, 5)
        expected = block["conv"](x) * 3
        runtime = ia3rt.patch(block, target_modules=["conv"])
        runtime.add_adapter("a", {("conv", "out"): torch.full((4,), 3.0)})
        runtime.set_adapter("a")
        torch.testing.assert_close(block["conv"](x), expected)
        if cls is Renamed:
            runtime.merge_adapter()
            torch.testing.assert_close(block["conv"](x), expected)
        else:
            with pytest.raises(ValueError, match="'conv': a Standardised has a forward of its own"):
                runtime.merge_adapter()
            torch.testing.assert_close(block["conv"](x), expected)


def test_gradients_reach_the_vectors():
    plain = model()
    runtime = ia3rt.patch(plain)
    runtime.add_adapter("a", {("same", "out"): torch.ones(4), ("wide", "in"): torch.rand(4)})
    runtime.train_adapter("a")
    plain(images()).square().sum().backward()
    wrapped = peft_model(model(), "a", target_modules=["same", "wide"], feedforward_modules=["wide"])
    wrapped.get_base_model().same.ia3_l["a"].data.fill_(1.0)
    wrapped.get_base_model().wide.ia3_l["a"].data.copy_(plain.wide.ia3_in_a.data.view(1, 4, 1, 1))
    wrapped(images()).square().sum().backward()
    for path, name in (("same", "ia3_out_a"), ("wide", "ia3_in_a")):
        ours = getattr(plain.get_submodule(path), name).grad
        pefts = wrapped.get_base_model().get_submodule(path).ia3_l["a"].grad
        torch.testing.assert_close(ours, pefts.flatten(), rtol=1e-5, atol=1e-6)


def test_all_linear_means_no_convolution():
    runtime = ia3rt.patch(model(), target_modules="all-linear")
    assert [site.path for site in runtime.sites] == ["out"]


def test_a_side_that_no_one_says_is_refused(tmp_path):
    wrapped = peft_model(model(), "b", target_modules="same|wide", feedforward_modules="wi.e")
    (folder,) = save_each(wrapped, tmp_path)
    runtime = ia3rt.patch(model())
    with pytest.raises(ValueError, match="the shape of the vector at 'same' does not say on which side it acts"):
        runtime.load_adapter(folder)
    assert runtime.adapters == [] and runtime.sites == []


def test_compiled_rows_wear_their_own():
    torch.compiler.reset()
    plain = model()
    runtime = ia3rt.patch(plain, target_modules=["same", "wide"], feedforward_modules=["wide"])
    for name in "ab":
        runtime.add_adapter(name, {("same", "out"): torch.rand(4), ("wide", "in"): torch.rand(4)})
    compiled = torch.compile(plain, backend="eager")
    for route in (["a", None, "b"], ["b", "a", "a"]):
        with runtime.route(route):
            expected = output(runtime, images())
            with torch.no_grad():
                torch.testing.assert_close(compiled(images()), expected)


class Mlp(nn.Module):
    """Of a form whose linear second matrix is scaled by the MLP around it; here it is a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.activation_fn, self.fc2 = nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Conv2d(5, 5, 1)

    def forward(self, hidden_states):
        hidden_states = self.fc1(hidden_states)
        hidden_states = self.activation_fn(hidden_states)
        hidden_states = self.fc2(hidden_states)
        return hidden_states


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_on_each_backend_rows_of_an_mlp_of_convolutions_wear_their_own(backend, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # as exact as on the CPU, where the truth is
    l_a, l_b, x = torch.rand(5), torch.rand(5), images()[..., :5]  # as wide as there are channels
    runtime = ia3rt.patch(Mlp().to(home(backend)), target_modules=["fc2"], backend=backend)
    runtime.add_adapter("a", {("fc2", "in"): l_a})
    runtime.add_adapter("b", {("fc2", "in"): l_b, ("fc2", "out"): l_a})

    def truth(l_in, l_out):
        mlp = Mlp()
        return mlp.fc2(mlp.fc1(x).relu() * l_in[:, None, None]) * l_out[:, None, None]

    of_a, of_b = truth(l_a, torch.ones(5)), truth(l_b, l_a)
    runtime.set_adapter("b")
    torch.testing.assert_close(runtime.model(x.to(home(backend))).cpu(), of_b)
    with runtime.route(["a", None, "b"]):
        mixed = runtime.model(x.to(home(backend))).cpu()
    torch.testing.assert_close(mixed, torch.stack([of_a[0], Mlp()(x)[1], of_b[2]]))

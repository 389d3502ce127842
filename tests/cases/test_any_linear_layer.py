"""Subclasses of nn.Linear wear, merge and are computed as nn.Linear is; what gives no tensor wears nothing."""

import copy

import peft
import pytest
import torch
from tiny import DTYPES, logits, peft_model, peft_vectors, save_each, scaled, token_ids
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrizations, prune
from transformers import FalconConfig, FalconForCausalLM
from transformers.models.llama4.modeling_llama4 import Llama4Router
from where import home

import ia3rt
from ia3rt.modules.weights import dense_weight

IDS = token_ids()


def falcon(dtype=torch.float32):
    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bias=True, alibi=False
    )
    model = FalconForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def with_peft(model):
    names = dict(target_modules=["query_key_value", "dense_4h_to_h"], feedforward_modules=["dense_4h_to_h"])
    return peft_model(model, "llama", "bc", **names)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_falcon_is_pefts_to_the_bit(dtype, tmp_path):
    wrapped, runtime = with_peft(falcon(dtype)), ia3rt.patch(falcon(dtype))
    for folder in save_each(wrapped, tmp_path):
        runtime.load_adapter(folder)
    for spec in ("b", ["b", "c"]):
        runtime.set_adapter(spec)
        wrapped.base_model.set_adapter(spec)
        assert torch.equal(logits(runtime.model, IDS), logits(wrapped, IDS))
    with runtime.route(["b", None, "c"]):
        mixed = logits(runtime.model, IDS)
    for row, name in ((0, "b"), (2, "c")):
        wrapped.base_model.set_adapter(name)
        close = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
        torch.testing.assert_close(mixed[row], logits(wrapped, IDS)[row], rtol=close, atol=close)


def test_falcon_is_computed_by_the_kernels(tmp_path):
    wrapped, runtime = with_peft(falcon()), ia3rt.patch(falcon().to(home("triton")), backend="triton")
    for folder in save_each(wrapped, tmp_path):
        runtime.load_adapter(folder)
    kernels = {entry.site.path.rpartition(".")[2]: entry.kernel for entry in ia3rt.explain(runtime.model).sites}
    assert kernels == {"query_key_value": "linear", "dense_4h_to_h": "linear"}
    exact = {name: scaled(falcon(), peft_vectors(wrapped, name)) for name in "bc"} | {None: falcon().double()}
    with runtime.route(["b", None, "c"]):
        mixed = logits(runtime.model, IDS).double()
    for row, name in enumerate(["b", None, "c"]):
        torch.testing.assert_close(mixed[row], logits(exact[name], IDS)[row], rtol=1e-4, atol=1e-5)


def test_falcon_merges_as_in_peft(tmp_path):
    wrapped, runtime = with_peft(falcon()), ia3rt.patch(falcon())
    before = copy.deepcopy(runtime.model.state_dict())
    for folder in save_each(wrapped, tmp_path):
        runtime.load_adapter(folder)
    runtime.merge_adapter("b")
    merged = logits(runtime.model, IDS).double()
    torch.testing.assert_close(merged, logits(scaled(falcon(), peft_vectors(wrapped, "b")), IDS), rtol=1e-4, atol=1e-5)
    runtime.unmerge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in runtime.model.state_dict().items())


class Inherited(nn.Linear):
    pass


class Tripled(nn.Linear):
    """With a forward of its own that only scales: what its weight is scaled by, its output is."""

    def forward(self, input):
        return 3 * super().forward(input)


class WithMore(nn.Linear):
    """As layers with a LoRA inside: the weight is not all that it computes by."""

    def __init__(self, *args):
        super().__init__(*args)
        self.more = nn.Linear(self.in_features, self.out_features, bias=False)

    def forward(self, input):
        return super().forward(input) + self.more(input)


class Ternary(nn.Linear):
    """As BitNet's, whose weight is rounded at each call."""

    def forward(self, input):
        return F.linear(input, self.weight.sign() * self.weight.abs().mean(), self.bias)


class Clamped(nn.Linear):
    def forward(self, input):
        return super().forward(input).clamp(-20, 20)


class SoftCapped(nn.Linear):
    """As the logits of Gemma 2 are."""

    def forward(self, input):
        return 300 * torch.tanh(super().forward(input) / 300)


class Guarded(nn.Linear):
    """As in T5, so that float16 does not overflow."""

    def forward(self, input):
        return super().forward(input).clamp(-64000, 64000)


class Thresholded(nn.Linear):
    def forward(self, input):
        return F.threshold(super().forward(input).abs(), 1e-3, 0.0)


class ClampedInput(nn.Linear):
    def forward(self, input):
        return super().forward(input.clamp(-6, 6))


class InFloat32(nn.Linear):
    def forward(self, input):
        bias = None if self.bias is None else self.bias.float()
        return F.linear(input.float(), self.weight.float(), bias).to(input.dtype)


class WithArgument(nn.Linear):
    def forward(self, input, factor):
        return factor * super().forward(input)


def block(cls):
    torch.manual_seed(0)
    return nn.ModuleDict({"fc1": cls(8, 12), "fc2": cls(12, 8)})


def worn(cls, backend="torch"):
    model = block(cls).to(home(backend))
    runtime = ia3rt.patch(model, target_modules=["fc1", "fc2"], backend=backend)
    runtime.add_adapter("a", {"fc1": torch.rand(12) + 0.5, "fc2": torch.rand(12) + 0.5})
    return runtime, runtime.get_adapter("a").vectors


def run(model, x):
    device = model["fc1"].weight.device
    with torch.no_grad():
        return [model[name](each.to(device)).cpu() for name, each in zip(("fc1", "fc2"), x, strict=True)]


X = [torch.randn(3, 8, generator=torch.Generator().manual_seed(1)), torch.randn(3, 12)]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("cls", [nn.Linear, Inherited, NonDynamicallyQuantizableLinear, Tripled, WithMore, Ternary])
def test_a_subclass_wears_its_vectors(cls, backend):
    runtime, vectors = worn(cls, backend)
    runtime.set_adapter("a")
    plain = block(cls)
    with torch.no_grad():
        expected = plain["fc1"](X[0]) * vectors["fc1"].cpu(), plain["fc2"](X[1] * vectors["fc2"].cpu())
    for y, truth in zip(run(runtime.model, X), expected, strict=True):
        torch.testing.assert_close(y, truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cls", [nn.Linear, Inherited, NonDynamicallyQuantizableLinear, Tripled, InFloat32])
def test_a_subclass_merges_where_that_is_the_same(cls):
    runtime, _ = worn(cls)
    runtime.set_adapter("a")
    expected = run(runtime.model, X)
    runtime.merge_adapter()
    for y, truth in zip(run(runtime.model, X), expected, strict=True):
        torch.testing.assert_close(y, truth, rtol=1e-4, atol=1e-5)


def parametrized(layer):
    return parametrizations.weight_norm(layer)


def pruned(layer):
    return prune.l1_unstructured(layer, "weight", amount=0.25)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda _: WithMore(8, 12), "a WithMore gives other numbers than with its input and output scaled"),
        (lambda _: Ternary(8, 12), "a Ternary gives other numbers"),
        (lambda _: WithArgument(8, 12), "of its WithArgument computes is not known, and trying it out fails: .*factor"),
        (parametrized, "is no parameter, but computed from others"),
        (pruned, "is no parameter, but computed from others"),
    ],
)
def test_elsewhere_merging_says_what_it_saw(change, sentence):
    model = block(nn.Linear)
    model["fc1"] = change(model["fc1"])
    runtime = ia3rt.patch(model, target_modules=["fc1", "fc2"])
    runtime.add_adapter("a", {"fc1": torch.rand(12), "fc2": torch.rand(12)})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"cannot merge into 'fc1': .*{sentence}"):
        runtime.merge_adapter("a")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("cls", [Clamped, SoftCapped, Guarded, Thresholded, ClampedInput])
def test_what_only_some_numbers_show_is_not_merged_into(cls):
    """A cap that no ordinary input reaches: merged, it would act before the vector instead of after it."""
    side = "in" if cls is ClampedInput else "out"
    model = nn.Sequential(cls(8, 8))
    runtime = ia3rt.patch(model, target_modules=["0"], feedforward_modules=["0"] if side == "in" else [])
    runtime.add_adapter("a", {("0", side): torch.linspace(0.9, 1.1, 8)})
    with pytest.raises(ValueError, match=f"cannot merge into '0': .*a {cls.__name__} gives other numbers"):
        runtime.merge_adapter("a")


def test_a_clamped_input_is_no_obstacle_to_a_vector_at_the_output():
    model, x = nn.Sequential(ClampedInput(8, 8)), 50 * torch.randn(4, 8)
    runtime = ia3rt.patch(model, target_modules=["0"])
    runtime.add_adapter("a", {"0": torch.rand(8)})
    runtime.set_adapter("a")
    worn = model(x)
    runtime.merge_adapter()
    torch.testing.assert_close(model(x), worn)


def test_a_class_that_is_called_otherwise_is_no_matrix():
    class Called(nn.Linear):
        def __call__(self, input):
            return super().__call__(input + 1)

    assert dense_weight(Called(3, 4)) == (None, None)
    assert dense_weight(Inherited(3, 4))[0] is not None


class Narrow(nn.Linear):
    def forward(self, input):
        return super().forward(input)[..., :3]


def routers():
    from types import SimpleNamespace

    config = SimpleNamespace(hidden_size=8, num_local_experts=4, num_experts_per_tok=2)
    return nn.ModuleDict({"router": Llama4Router(config), "narrow": Narrow(8, 8), "plain": nn.Linear(8, 8)})


def test_a_router_is_left_alone_by_all_linear_and_refused_by_name():
    assert [site.path for site in ia3rt.patch(routers(), target_modules="all-linear").sites] == ["plain"]
    for name, given in (("router", "a tuple"), ("narrow", "3 numbers a row")):
        with pytest.raises(
            ValueError, match=f"module '{name}' is a .*, which wears no vector: its forward gives {given}"
        ):
            ia3rt.patch(routers(), target_modules=[name])
        runtime = ia3rt.patch(routers())
        with pytest.raises(ValueError, match=f"adapter 'a' does not fit: module '{name}' .* gives {given}"):
            runtime.add_adapter("a", {(name, "out"): torch.rand(4 if name == "router" else 8)})


class Joined(nn.Linear):
    """As one with a matrix for each group of its input."""

    def forward(self, input):
        y = super().forward(input)
        return y.flatten(-2) if input.dim() > 2 else y


def test_a_width_that_nothing_told_of_is_an_error_of_the_forward():
    model = nn.ModuleDict({"joined": Joined(8, 8)})
    runtime = ia3rt.patch(model, target_modules=["joined"])
    runtime.add_adapter("a", {("joined", "out"): torch.rand(8)})
    runtime.set_adapter("a")
    assert model["joined"](torch.randn(3, 8)).shape == (3, 8)
    with pytest.raises(ValueError, match=r"a Joined gave a tensor \(3, 16\), and its vector has width 8"):
        model["joined"](torch.randn(3, 2, 8))


def test_a_tuple_that_nothing_told_of_is_an_error_of_the_forward():
    class Pair(nn.Linear):
        def forward(self, input, factor):
            return factor * super().forward(input), factor

    model = nn.ModuleDict({"pair": Pair(4, 4)})
    runtime = ia3rt.patch(model, target_modules=["pair"])
    runtime.add_adapter("a", {"pair": torch.rand(4)})
    assert model["pair"](torch.randn(1, 4), 2)[1] == 2
    runtime.set_adapter("a")
    with pytest.raises(ValueError, match="a Pair gave a tuple, and its vector scales one tensor"):
        model["pair"](torch.randn(1, 4), 2)


@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "grad"])
def test_multihead_attention_is_refused_and_torchs_encoder_wears(gradients):
    """The truth is the formula: in PEFT, torch's operation for a whole layer reads the weights past the vectors."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0).eval()
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    for name in ("out_proj", "self_attn.out_proj"):
        with pytest.raises(ValueError, match="MultiheadAttention reads its weight and never calls it"):
            ia3rt.patch(model, target_modules=[name])
    linear = ia3rt.patch(copy.deepcopy(model), target_modules="all-linear").sites
    assert {site.path.rpartition(".")[2] for site in linear} == {"linear1", "linear2"}
    config = peft.IA3Config(target_modules=["linear1", "linear2"], feedforward_modules=["linear2"])
    wrapped = peft.get_peft_model(copy.deepcopy(model), config).eval()
    for parameter in (p for name, p in wrapped.named_parameters() if "ia3_l" in name):
        nn.init.uniform_(parameter, 0.5, 1.5)
    x = torch.randn(2, 3, 8)
    truth = scaled(model, peft_vectors(wrapped, "default"))(x.double()).detach().float()
    runtime = ia3rt.patch(wrapped)
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(runtime.model(x), truth, rtol=1e-4, atol=1e-5)
        runtime.set_adapter(None)
        torch.testing.assert_close(runtime.model(x), model(x), rtol=1e-4, atol=1e-5)

"""Where a vector could not act, as nobody calls its layer, that is an error that names the layer, and nothing else."""

from types import MethodType

import pytest
import torch
from mlps import IDS, make, patched, truths
from tiny import logits
from torch import nn
from torch.nn import functional as F
from where import TRITON

import ia3rt

PATH = "model.layers.1.mlp.down_proj"


def computes_the_same(layer):
    layer.forward = lambda x: F.linear(x, layer.weight, layer.bias)


def in_its_dict(layer):
    vars(layer)["forward"] = MethodType(nn.Linear.forward, layer)


def keeps_the_replaced_one_without_calling_it(layer):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias)

    layer.original_forward = layer.forward
    layer.forward = MethodType(forward, layer)


@pytest.mark.parametrize("backend", ["torch", TRITON])
@pytest.mark.parametrize("change", [computes_the_same, in_its_dict, keeps_the_replaced_one_without_calling_it])
def test_a_forward_set_on_a_layer_after_patch(change, backend):
    runtime = patched(make("llama"), backend)
    runtime.set_adapter("b")
    before = logits(runtime.model, IDS)
    layer = runtime.model.get_submodule(PATH)
    change(layer)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"'{PATH}' has a forward of its own, set by other code after patch"):
            logits(runtime.model, IDS)
    del layer.forward
    assert torch.equal(logits(runtime.model, IDS), before)


def test_a_forward_under_accelerates_hook_that_is_not_the_class_s():
    """Before patch: the hook calls what it replaced, which would stay."""
    import accelerate

    model = make("llama")
    layer = model.get_submodule(PATH)
    computes_the_same(layer)
    accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.ModelHook())
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=f"'{PATH}' has a forward of its own"):
        ia3rt.patch(model)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_also_under_torch_compile():
    runtime = patched(make("llama"))
    runtime.set_adapter("b")
    torch._dynamo.reset()
    compiled = torch.compile(runtime.model, backend="eager")
    logits(compiled, IDS)
    computes_the_same(runtime.model.get_submodule(PATH))
    with pytest.raises(Exception, match=f"'{PATH}' has a forward of its own"):
        logits(compiled, IDS)
    torch._dynamo.reset()


def test_also_in_a_copy_of_the_model():
    import copy

    runtime = patched(make("llama"))
    copied = copy.deepcopy(runtime)
    copied.set_adapter("b")
    computes_the_same(copied.model.get_submodule(PATH))
    with pytest.raises(ValueError, match=f"'{PATH}' has a forward of its own"):
        logits(copied.model, IDS)
    logits(runtime.model, IDS)


def test_another_module_in_the_layers_place():
    runtime = patched(make("llama"))
    mlp = runtime.model.model.layers[1].mlp
    layer, mlp.down_proj = mlp.down_proj, nn.Linear(48, 32)
    with pytest.raises(ValueError, match=f"a Linear was put in the place of '{PATH}' after patch"):
        logits(runtime.model, IDS)
    mlp.down_proj = layer
    logits(runtime.model, IDS)


def test_layers_that_were_taken_out_wear_nothing_and_are_no_error():
    runtime = patched(make("llama"))
    truth = truths(runtime, make("llama"))["b"]
    runtime.set_adapter("b")
    for each in (runtime.model, truth):
        each.model.layers = each.model.layers[:1]
    torch.testing.assert_close(logits(runtime.model, IDS).double(), logits(truth, IDS), rtol=1e-4, atol=1e-5)


def reads(self, x):
    return F.linear(F.silu(self.gate_proj(x)) * self.up_proj(x), self.down_proj.weight, self.down_proj.bias)


def test_a_forward_set_around_a_layer_that_reads_its_weight():
    runtime = patched(make("llama"))
    mlp = runtime.model.model.layers[1].mlp
    mlp.forward = MethodType(reads, mlp)
    with pytest.raises(ValueError, match=f"reads of LlamaMLP .* reads the weight of '{PATH}' and never"):
        logits(runtime.model, IDS)


class Attention(nn.Module):
    """Hands the weights of its projections to an operation, as WavLM's attention does."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        q, k = F.linear(x, self.q_proj.weight), torch.cat([x @ self.k_proj.weight.t()])
        return F.scaled_dot_product_attention(q, k, self.v_proj(x))


class Overriding(Attention):
    """Calls what the class that it is made from reads, and reads what that calls."""

    def forward(self, x):
        return self.k_proj(x) + x @ self.v_proj.weight


def decorated(function):
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class Decorated(Attention):
    """Reads in a method that a decorated forward calls; what it calls is decorated too."""

    @decorated
    def forward(self, x):
        return self.keys(x) + self.values(x)

    def keys(self, x):
        return F.linear(x, self.k_proj.weight)

    @decorated
    def values(self, x):
        return self.v_proj(x).to(self.v_proj.weight.dtype)


@pytest.mark.parametrize(
    ("cls", "read", "called"),
    [(Attention, "k_proj", "v_proj"), (Overriding, "v_proj", "k_proj"), (Decorated, "k_proj", "v_proj")],
)
def test_a_class_that_reads_the_weight_of_a_layer(cls, read, called):
    sentence = f"'{read}' cannot wear a vector: {cls.__name__} reads its weight and never calls it"
    with pytest.raises(ValueError, match=sentence):
        ia3rt.patch(cls(), target_modules=["k_proj", "v_proj"])
    for names in (None, "all-linear"):  # found by structure, and all that can
        runtime = ia3rt.patch(cls(), target_modules=names)
        paths = [site.path for site in runtime.sites]
        assert called in paths and read not in paths
    runtime = ia3rt.patch(cls())
    with pytest.raises(ValueError, match=f"adapter 'a' does not fit: module {sentence}"):
        runtime.add_adapter("a", {(read, "out"): torch.rand(8)})


def test_multihead_attention_and_its_kin_in_transformers():
    from transformers import WavLMConfig, WavLMModel
    from transformers.models.detr.modeling_detr import DetrMHAttentionMap

    size = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    wavlm = WavLMModel(WavLMConfig(**size, conv_dim=(8,), conv_stride=(5,), conv_kernel=(10,)))
    with pytest.raises(ValueError, match="WavLMAttention reads its weight"):
        ia3rt.patch(wavlm, target_modules=["k_proj"])
    with pytest.raises(ValueError, match="DetrMHAttentionMap reads its weight"):
        ia3rt.patch(DetrMHAttentionMap(16, 2), target_modules=["k_proj"])
    for attention in (nn.MultiheadAttention(16, 2), type("Own", (nn.MultiheadAttention,), {})(16, 2)):
        with pytest.raises(ValueError, match="'attention.out_proj'.* wears no vector|reads its weight"):
            ia3rt.patch(nn.ModuleDict({"attention": attention}), target_modules=["out_proj"])
    attention = nn.MultiheadAttention(16, 2)
    attention.out_proj = nn.Linear(16, 16)
    with pytest.raises(ValueError, match="MultiheadAttention reads its weight and never calls it"):
        ia3rt.patch(nn.ModuleDict({"attention": attention}), target_modules=["out_proj"])


def test_a_block_that_reads_the_weights_of_its_mlp():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = nn.ModuleDict({"fc1": nn.Linear(8, 8), "fc2": nn.Linear(8, 8)})

        def forward(self, x):
            return F.linear(F.linear(x, self.mlp.fc1.weight).relu(), self.mlp.fc2.weight)

    with pytest.raises(ValueError, match="module '0.mlp.fc2' cannot wear a vector: Block reads its weight"):
        ia3rt.patch(nn.Sequential(Block()), target_modules=["fc2"])


def test_a_layer_whose_weight_is_only_looked_at_or_made_is_none_of_them():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)
            self.start()

        def start(self):
            nn.init.zeros_(self.fc2.weight)

        def forward(self, layer, x):
            return getattr(self, layer)(x.to(self.fc2.weight.dtype))

    assert len(ia3rt.patch(Holder()).sites) == 1

    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    sites = [site.path for site in ia3rt.patch(T5ForConditionalGeneration(config)).sites]
    assert "decoder.block.0.layer.2.DenseReluDense.wo" in sites

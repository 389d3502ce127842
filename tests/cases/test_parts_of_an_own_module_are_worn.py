"""Who uses a part of a module, and never calls the module, uses the part of what is worn there.

PEFT's wrapper around such a module gives what the active adapter's copy has. The truth is PEFT.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import peft
import pytest
import torch
from heads import SIZES, model_of, output, randomize, token_ids
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, SpeechT5Config, SpeechT5ForTextToSpeech

import ia3rt

IDS = token_ids()
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


class Head(nn.Module):
    """A head that can be used in many ways."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.out, self.more = nn.Linear(8, 8), nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8))
        self.scale = nn.Parameter(torch.ones(8))
        self.register_buffer("shift", torch.zeros(8))

    def logits(self, h: Tensor) -> Tensor:
        made: Tensor = self.more(self.out(torch.relu(self.dense(h)))) * self.scale + self.shift
        return made

    def forward(self, h: Tensor) -> Tensor:
        return self.logits(h)


USES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a method": lambda head, h: head.logits(h),
    "a module": lambda head, h: head.dense(h) + head.more[0](h),
    "a weight": lambda head, h: F.linear(h, head.out.weight) * head.scale,
    "a buffer": lambda head, h: h * head.shift,
    "by name": lambda head, h: getattr(head, "out")(h),  # noqa: B009
}


class Model(nn.Module):
    def __init__(self, head: nn.Module, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.k_proj, self.head, self.use = nn.Linear(8, 8), head, use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.head, self.k_proj(x))


def made(use: str | Callable[[Any, Tensor], Tensor], head: type[nn.Module] = Head) -> tuple[Model, Any]:
    """A model, and PEFT's with an adapter a on it."""
    torch.manual_seed(0)
    model = Model(head(), USES[use] if isinstance(use, str) else use).eval()
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], modules_to_save=["head"])
    wrapped = peft.get_peft_model(copy.deepcopy(model), config, adapter_name="a").eval()
    randomize(wrapped, 1)
    wrapped.base_model.model.head.modules_to_save["a"].__dict__["_buffers"].update(
        {name: tensor + 2 for name, tensor in model.head.named_buffers()}
    )
    return model, wrapped


@pytest.mark.parametrize("use", USES)
def test_all_rows_wear_it_as_in_peft(use: str) -> None:
    model, wrapped = made(use)
    with torch.no_grad():
        right = {"a": wrapped(X), None: model(X)}
        runtime = ia3rt.patch(wrapped)
        for name in ("a", None, "a"):
            runtime.set_adapter(name)
            torch.testing.assert_close(runtime.model(X), right[name], rtol=1e-5, atol=1e-6)
        with runtime.disable_adapter():
            assert torch.equal(runtime.model(X), right[None])
        assert not torch.allclose(right["a"], right[None], atol=0.1)
        runtime.unpatch()
        assert torch.equal(wrapped(X), right["a"])


@pytest.mark.parametrize("use", USES)
def test_where_rows_wear_different_ones_it_is_refused(use: str) -> None:
    _, wrapped = made(use)
    runtime = ia3rt.patch(wrapped)
    with runtime.route(["a", None, "a"]), pytest.raises(ValueError, match="different modules 'head', and '.*' of it"):
        runtime.model(X)
    with runtime.route(["a", "a", "a"]), torch.no_grad():
        rows = runtime.model(X)
    assert torch.equal(rows, runtime.model(X))


def test_what_is_only_asked_of_a_weight_is_told_by_row() -> None:
    """As models ask for its dtype, to convert what they give the module."""

    def use(head: Any, h: Tensor) -> Tensor:
        assert head.weight.shape == (8, 8) and head.bias.dim() == 1 and len(head.weight) == 8
        result: Tensor = head(h.to(head.weight.device, head.weight.dtype))
        return result

    model, wrapped = made(use, lambda: nn.Linear(8, 8))  # type: ignore[arg-type]
    with torch.no_grad():
        right = {"a": wrapped(X), None: model(X)}
        runtime = ia3rt.patch(wrapped)
        with runtime.route(["a", None, "a"]):
            rows = runtime.model(X)
    for row, name in enumerate(["a", None, "a"]):
        torch.testing.assert_close(rows[row], right[name][row], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "use",
    [lambda head, h: head[1](head[0](h)), lambda head, h: next(iter(head))(h), lambda head, h: head[:1](h)],
)
def test_modules_of_a_container(use: Any) -> None:
    """PEFT's wrapper has no items; the truth is the model with the adapter's own in it."""

    def container() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    torch.manual_seed(0)
    model = Model(container(), use).eval()
    right = copy.deepcopy(model)
    right.head = container()
    base = model(X)
    runtime = ia3rt.patch(model, target_modules=["k_proj"])
    runtime.add_adapter("a", modules={"head": right.head.state_dict()})
    assert torch.equal(model(X), base)
    runtime.set_adapter("a")
    assert torch.equal(model(X), right(X))
    with (
        runtime.route(["a", None, None]),
        pytest.raises(ValueError, match="different modules 'head', and what .* gives"),
    ):
        model(X)


def test_a_list_of_modules_that_is_never_called() -> None:
    torch.manual_seed(0)
    model = Model(nn.ModuleList([nn.Linear(8, 8)]), lambda head, h: sum(each(h) for each in head)).eval()
    right = copy.deepcopy(model)
    nn.init.normal_(right.head[0].weight)
    runtime = ia3rt.patch(model, target_modules=["k_proj"])
    runtime.add_adapter("a", modules={"head": right.head.state_dict()})
    runtime.set_adapter("a")
    assert torch.equal(model(X), right(X))


def test_gradients_reach_the_part_that_is_trained() -> None:
    _, wrapped = made("a method")
    theirs = copy.deepcopy(wrapped)
    runtime = ia3rt.patch(wrapped)
    parameters = {id(parameter) for parameter in runtime.train_adapter("a")}
    for model in (theirs, runtime.model):
        model(X).pow(2).sum().backward()
    head = theirs.base_model.model.head.modules_to_save["a"]
    for name, parameter in head.named_parameters():
        mine = attrgetter(name)(runtime.model.head)
        assert id(mine) in parameters
        torch.testing.assert_close(mine.grad, parameter.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("use", ["a method", "a weight"])
def test_also_under_torch_compile(use: str) -> None:
    model, wrapped = made(use)
    with torch.no_grad():
        right = {"a": wrapped(X), None: model(X)}
    runtime = ia3rt.patch(wrapped)
    torch._dynamo.reset()
    compiled = torch.compile(runtime.model, backend="eager")
    with torch.no_grad():
        for name in ("a", None, "a"):
            runtime.set_adapter(name)
            torch.testing.assert_close(compiled(X), right[name], rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


def test_adapters_go_on_changing_the_models_own() -> None:
    """Another adapter's own begins as the model's, and one inside of it too, whatever is worn meanwhile."""
    _, wrapped = made("a method")
    runtime = ia3rt.patch(wrapped)
    model = runtime.model
    worn = model(X)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    runtime.add_adapter("b", config={"modules_to_save": ["head"]})
    runtime.add_adapter("c", config={"modules_to_save": ["out"]})
    modules = {**runtime.get_adapter("b").modules, **runtime.get_adapter("c").modules}
    assert sorted(modules) == ["head", "head.out"]
    for path, tensors in modules.items():
        assert all(torch.equal(tensor, state[f"{path}.{name}"]) for name, tensor in tensors.items())
    assert torch.equal(model(X), worn)
    runtime.set_adapter("c")
    assert not torch.equal(model(X), worn)
    runtime.set_adapter("a")
    copied = copy.deepcopy(model)
    assert torch.equal(copied(X), worn)
    runtime.set_adapter(None)
    assert torch.equal(copied(X), worn)
    runtime.set_adapter("a")
    for name in ("b", "c"):
        runtime.delete_adapter(name)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(runtime.unpatch()(X), worn)


def test_by_its_path_a_part_is_the_models_own() -> None:
    """As its name in state_dict() is: functional_call puts tensors there, and transformers ties weights so."""
    _, wrapped = made("a method")
    model = ia3rt.patch(wrapped).model
    worn = model(X)
    own = dict(model.named_parameters())
    assert all(model.get_parameter(name) is parameter for name, parameter in own.items())
    changed = {name: parameter + 1 if name.startswith("head") else parameter for name, parameter in own.items()}
    assert torch.equal(torch.func.functional_call(model, changed, (X,)), worn)
    tied = model_of("a tied lm_head")
    base = output(tied, IDS)
    runtime = ia3rt.patch(tied)
    runtime.add_adapter("a", modules={"model.embed_tokens": {"weight": torch.randn(99, 32)}})
    runtime.set_adapter("a")
    right = output(tied, IDS)
    tied.tie_weights()
    assert torch.equal(output(tied, IDS), right)
    runtime.set_adapter(None)
    assert torch.equal(output(tied, IDS), base)


def test_embeddings_that_are_asked_of_the_model() -> None:
    torch.manual_seed(0)
    bert = BertForSequenceClassification(BertConfig(**SIZES)).eval()
    names = ["bert.embeddings"]
    config = peft.IA3Config(target_modules=["key"], feedforward_modules=[], modules_to_save=names)
    wrapped = peft.get_peft_model(bert, config).eval()
    randomize(wrapped, 1)
    with torch.no_grad():
        embeds = wrapped.get_input_embeddings()(IDS)
        right = wrapped(inputs_embeds=embeds).logits
        model = ia3rt.patch(wrapped).model
        assert torch.equal(model.get_input_embeddings()(IDS), embeds)
        assert torch.equal(model(inputs_embeds=embeds).logits, right)
        assert torch.equal(output(model, IDS), right)


def test_a_model_that_calls_parts_of_its_postnet() -> None:
    layers = {f"{side}_{name}": 1 for side in ("encoder", "decoder") for name in ("layers",)}
    sizes = {f"{s}_{n}": v for s in ("encoder", "decoder") for n, v in (("attention_heads", 4), ("ffn_dim", 48))}
    units = dict(
        speech_decoder_prenet_units=16, speech_decoder_postnet_units=16, num_mel_bins=8, speaker_embedding_dim=8
    )
    still = dict(positional_dropout=0.0, speech_decoder_prenet_dropout=0.0)
    torch.manual_seed(0)
    model = SpeechT5ForTextToSpeech(SpeechT5Config(vocab_size=81, hidden_size=32, **layers, **sizes, **units, **still))
    names = ["speech_decoder_postnet"]
    config = peft.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[], modules_to_save=names)
    wrapped = peft.get_peft_model(model.eval(), config).eval()
    randomize(wrapped, 1)

    def spoken(speaker: Any) -> Tensor:
        settings = dict(speaker_embeddings=torch.ones(1, 8), minlenratio=0.2, maxlenratio=0.6)
        result: Tensor = speaker.generate(input_ids=torch.arange(4, 12)[None], **settings)
        return result

    right = spoken(wrapped.get_base_model())
    assert torch.equal(spoken(ia3rt.patch(wrapped).model), right)

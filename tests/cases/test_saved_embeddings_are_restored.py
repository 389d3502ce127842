"""Embeddings that PEFT saved with an adapter, of a vocabulary that was resized or not: worn by all rows, or by none.

PEFT writes them for save_embedding_layers=True, and by itself where the vocabulary has grown. The truth is the model
that was saved.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from heads import SIZES, VOCABULARY, output, randomize, token_ids
from torch import Tensor
from transformers import GenerationMixin, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import ia3rt

IDS = token_ids()
GROWN = VOCABULARY + 4
T5 = dict(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)


def model_of(tied: bool, rows: int = VOCABULARY) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied)).eval()
    if rows != VOCABULARY:
        model.resize_token_embeddings(rows)
    return model


def trained(tied: bool, rows: int, folder: Path, **options: Any) -> peft.PeftModel:
    """A model with embeddings of its own, saved with an adapter."""
    model = model_of(tied, rows)
    with torch.no_grad():
        for embedding in dict.fromkeys((model.model.embed_tokens.weight, model.lm_head.weight)):
            embedding.add_(torch.randn(embedding.shape, generator=torch.Generator().manual_seed(len(embedding))) / 10)
    wrapped = peft.get_peft_model(model, peft.IA3Config(task_type="CAUSAL_LM")).eval()
    randomize(wrapped, 1)
    wrapped.save_pretrained(folder, save_embedding_layers=True, **options)
    return wrapped


def new_tokens() -> Tensor:
    ids = IDS.clone()
    ids[:, 2] = GROWN - 1
    return ids


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def tied(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.parametrize("loaded_into", [VOCABULARY, GROWN], ids=["as it was", "resized"])
def test_a_grown_vocabulary_is_worn_with_its_adapter(tied: bool, loaded_into: int, tmp_path: Path) -> None:
    theirs = trained(tied, GROWN, tmp_path / "a")
    model = model_of(tied, loaded_into)
    base = output(model, IDS)
    runtime = ia3rt.patch(model)
    runtime.load_adapter(tmp_path / "a")
    assert torch.equal(output(model, IDS), base)
    runtime.set_adapter("a")
    assert torch.equal(output(model, new_tokens()), output(theirs, new_tokens()))
    with runtime.route(["a", "a", "a"]):
        assert torch.equal(output(model, IDS), output(theirs, IDS))
    runtime.set_adapter(None)
    assert torch.equal(output(model, IDS), base)
    assert torch.equal(output(runtime.unpatch(), IDS), base)


def test_tokens_are_generated_as_by_the_model_that_was_saved(tied: bool, tmp_path: Path) -> None:
    theirs = trained(tied, GROWN, tmp_path / "a")
    model = model_of(tied)
    runtime = ia3rt.patch(model)
    runtime.load_adapter(tmp_path / "a")
    runtime.set_adapter("a")
    # Up to transformers 5.17 beams are cut by the config's vocabulary, and a larger one is an error there.
    by_config = "vocab_size = self.config" in inspect.getsource(GenerationMixin._beam_search)
    for settings in ({}, {"num_beams": 3})[: 1 if by_config else 2]:
        asked = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None, **settings)
        assert torch.equal(model.generate(new_tokens(), **asked), theirs.generate(input_ids=new_tokens(), **asked))


def test_peft_loads_them_again(tied: bool, tmp_path: Path) -> None:
    theirs = trained(tied, GROWN, tmp_path / "a")
    runtime = ia3rt.patch(model_of(tied))
    runtime.load_adapter(tmp_path / "a")
    runtime.save_adapter("a", tmp_path / "again")
    again = peft.PeftModel.from_pretrained(model_of(tied, GROWN), tmp_path / "again").eval()
    assert torch.equal(output(again, new_tokens()), output(theirs, new_tokens()))


def test_one_of_two_that_are_tied_is_worn_by_both(tmp_path: Path) -> None:
    """PEFT loads a tied model's embeddings into the one tensor that both are."""
    from safetensors.torch import load_file, save_file

    theirs = trained(True, GROWN, tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if "lm_head" not in key}, file)
    model = model_of(True)
    runtime = ia3rt.patch(model)
    runtime.load_adapter(tmp_path / "a")
    runtime.set_adapter("a")
    assert torch.equal(output(model, IDS), output(theirs, IDS))


def test_a_t5s_are_worn_by_encoder_and_decoder(tmp_path: Path) -> None:
    def t5() -> T5ForConditionalGeneration:
        torch.manual_seed(0)
        return T5ForConditionalGeneration(T5Config(**T5)).eval()

    def logits(model: Any) -> Tensor:
        with torch.no_grad():
            made: Tensor = model(input_ids=IDS, decoder_input_ids=IDS).logits
        return made

    changed = t5()
    with torch.no_grad():
        changed.shared.weight.add_(torch.randn(changed.shared.weight.shape) / 10)
    theirs = peft.get_peft_model(changed, peft.IA3Config(task_type="SEQ_2_SEQ_LM")).eval()
    randomize(theirs, 1)
    theirs.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    model = t5()
    runtime = ia3rt.patch(model)
    runtime.load_adapter(tmp_path / "a")
    runtime.set_adapter("a")
    torch.testing.assert_close(logits(model), logits(theirs))


def test_some_rows_cannot_wear_them(tied: bool, tmp_path: Path) -> None:
    trained(tied, GROWN, tmp_path / "a")
    model = model_of(tied)
    runtime = ia3rt.patch(model)
    runtime.load_adapter(tmp_path / "a")
    runtime.add_adapter("b")
    runtime.set_adapter("b")
    before = output(model, IDS)
    for worn in (["a", None, "a"], ["a", "b", "a"], [None, None, ["a", "b"]]):
        with pytest.raises(
            ValueError, match="'a' has saved embeddings at '.*': they are the vocabulary of the whole mo"
        ):
            runtime.route(worn)
    assert torch.equal(output(model, IDS), before)
    with runtime.route([["a", "b"], "a", {"a": 0.5, "b": 0.5}]):
        assert output(model, IDS).shape[-1] == GROWN


def test_embeddings_that_are_the_models_own_bring_nothing(tied: bool, tmp_path: Path) -> None:
    """As PEFT saves them for save_embedding_layers=True; rows may wear such an adapter as any other."""
    wrapped = peft.get_peft_model(model_of(tied), peft.IA3Config(task_type="CAUSAL_LM")).eval()
    randomize(wrapped, 1)
    wrapped.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    model = model_of(tied)
    runtime = ia3rt.patch(model)
    runtime.load_adapter(tmp_path / "a")
    base = output(model, IDS)
    with runtime.route(["a", None, "a"]):
        rows = output(model, IDS)
    torch.testing.assert_close(rows[1], base[1])
    torch.testing.assert_close(rows[0], output(wrapped, IDS)[0])


def test_a_loss_by_another_vocabulary_is_refused(tmp_path: Path) -> None:
    """transformers flattens logits by its config's vocabulary: an error of shapes, or a wrong loss where it divides."""
    theirs = trained(False, GROWN, tmp_path / "a")
    model = model_of(False)
    runtime = ia3rt.patch(model)
    runtime.load_adapter(tmp_path / "a")
    runtime.set_adapter("a")
    with pytest.raises(
        ValueError, match=rf"has {GROWN} saved embeddings, .* has {VOCABULARY}: call model.resize_token"
    ):
        model(IDS, labels=IDS)
    runtime.set_adapter(None)
    model(IDS, labels=IDS)
    model = model_of(False, GROWN)
    runtime = ia3rt.patch(model)
    runtime.load_adapter(tmp_path / "a")
    runtime.set_adapter("a")
    assert torch.equal(model(IDS, labels=IDS).loss, theirs(IDS, labels=IDS).loss)


def test_they_are_merged_into_a_model_of_their_size_and_taken_out(tied: bool, tmp_path: Path) -> None:
    theirs = trained(tied, GROWN, tmp_path / "a")
    model = model_of(tied)
    runtime = ia3rt.patch(model)
    runtime.load_adapter(tmp_path / "a")
    with pytest.raises(ValueError, match="the model's .* call model.resize_token_embeddings.103. before patch"):
        runtime.merge_adapter("a")
    model = model_of(tied, GROWN)
    base = output(model, IDS)
    runtime = ia3rt.patch(model)
    runtime.load_adapter(tmp_path / "a")
    runtime.merge_adapter("a")
    torch.testing.assert_close(output(model, IDS), output(theirs, IDS), rtol=1e-4, atol=1e-5)
    runtime.unmerge_adapter()
    runtime.set_adapter(None)
    assert torch.equal(output(model, IDS), base)


def test_they_are_not_trained(tmp_path: Path) -> None:
    """PEFT trains the vectors only, whatever it saved."""
    trained(False, GROWN, tmp_path / "a")
    model = model_of(False, GROWN)
    runtime = ia3rt.patch(model)
    runtime.load_adapter(tmp_path / "a")
    assert all(parameter.dim() == 1 for parameter in runtime.train_adapter("a"))

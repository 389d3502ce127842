"""Rows that wear their mix from a token on: beside PEFT, whose base model runs first and an adapter over its cache."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy
import pytest
import torch
import transformers
from packaging.version import Version
from tiny import (
    FAMILIES,
    VOCABULARY,
    generated,
    logits,
    patched,
    peft_model,
    peft_vectors,
    save_each,
    scaled,
    tiny_model,
    token_ids,
)
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    XLNetConfig,
    XLNetLMHeadModel,
)
from where import home

import ia3rt

IDS = token_ids()
MASK = torch.ones_like(IDS)
ROWS = ["b", None, ["c", "d"]]
STARTS = [4, 2, 6]
GREEDY = dict(max_new_tokens=6, do_sample=False)


class Both:
    """A patched model, and on the CPU PEFT's over the same weights with the same adapters."""

    def __init__(self, family: str, folder, dtype: torch.dtype = torch.float32, **options: object) -> None:
        model = tiny_model(family, dtype)
        self.peft = peft_model(model, family)
        self.runtime = ia3rt.patch(model.to(home(options.get("backend"))), **options)
        for path in save_each(self.peft, folder):
            self.runtime.load_adapter(path)
        self.model = model

    def wear(self, spec: object) -> None:
        """PEFT's rows wear a product, or nothing."""
        if spec is None:
            self.peft.base_model.disable_adapter_layers()
        else:
            self.peft.base_model.enable_adapter_layers()
            self.peft.base_model.set_adapter([spec] if isinstance(spec, str) else spec)

    def truth(self, row: Tensor, spec: object, start: int, cache: DynamicCache | None = None) -> Tensor:
        """The logits of one row [1, tokens] by PEFT: the base model over what comes before, then the adapter."""
        cache = DynamicCache() if cache is None else cache  # an empty one counts as false
        past, parts = cache.get_seq_length(), []
        border = min(max(start - past, 0), row.shape[1])
        for worn, piece in ((None, row[:, :border]), (spec, row[:, border:])):
            if piece.shape[1]:
                self.wear(worn)
                with torch.no_grad():
                    parts.append(self.peft(piece, past_key_values=cache, use_cache=True).logits)
        return torch.cat(parts, 1)

    def greedy(self, row: Tensor, spec: object, start: int, tokens: int = 6) -> Tensor:
        """What follows one row [1, tokens], token by token."""
        cache = DynamicCache()
        scores, found = self.truth(row, spec, start, cache), []
        for _ in range(tokens):
            found.append(scores[:, -1:].argmax(-1))
            scores = self.truth(found[-1], spec, start, cache)
        return torch.cat([row, *found], 1)


@pytest.fixture(params=FAMILIES)
def both(request, tmp_path, torch_backend) -> Both:
    return Both(request.param, tmp_path)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)


def truths(both: Both, starts: Sequence[int], ids: Tensor = IDS) -> Tensor:
    return torch.cat([both.truth(ids[i : i + 1], ROWS[i], starts[i]) for i in range(3)])


def greedy_truths(both: Both, starts: Sequence[int], ids: Tensor = IDS) -> Tensor:
    return torch.cat([both.greedy(ids[i : i + 1], ROWS[i], starts[i]) for i in range(3)])


@pytest.mark.parametrize("starts", [STARTS, [1, 0, 3], [7, 9, 2], [3, 3, 3]], ids=str)
def test_every_position_is_what_recomputing_gives(both, starts) -> None:
    with both.runtime.route(ROWS, start=starts):
        found = logits(both.model, IDS)
    close(found, truths(both, starts))
    with both.runtime.route(ROWS):
        assert not torch.allclose(found, logits(both.model, IDS), atol=1e-2)


def test_in_float64(tmp_path, torch_backend) -> None:
    """Beside the paper's formula, multiplied into weights: PEFT computes vectors in float32, Llama its norms."""
    both = Both("gpt2", tmp_path, torch.float64)
    plain = tiny_model("gpt2", torch.float64)
    with both.runtime.route(["b", None, "d"], start=STARTS):
        found = logits(both.model, IDS)
    for row, (name, start) in enumerate(zip(["b", None, "d"], STARTS, strict=True)):
        one, cache = IDS[row : row + 1], DynamicCache()
        adapted = plain if name is None else scaled(plain, peft_vectors(both.peft, name))
        with torch.no_grad():
            before = plain(one[:, :start], past_key_values=cache, use_cache=True).logits
            after = adapted(one[:, start:], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(found[row : row + 1], torch.cat([before, after], 1), rtol=1e-12, atol=1e-13)


def test_by_the_kernels(tmp_path) -> None:
    both = Both("llama", tmp_path, backend="triton")
    with both.runtime.route(ROWS, start=STARTS):
        close(logits(both.model, IDS), truths(both, STARTS))
    with both.runtime.route(["b"], start=5), torch.no_grad():
        close(logits(both.model, IDS[:1]), both.truth(IDS[:1], "b", 5))
        tokens = generated(both.model, IDS[:1], MASK[:1], max_new_tokens=2, do_sample=False)
    assert torch.equal(tokens, both.greedy(IDS[:1], "b", 5, 2))


def test_one_row_and_a_number_for_all(both) -> None:
    with both.runtime.route(["b"], start=4):
        close(logits(both.model, IDS[:1]), both.truth(IDS[:1], "b", 4))
        close(logits(both.model, IDS[1:2]), both.truth(IDS[1:2], "b", 4))
    with both.runtime.route(ROWS, start=4):
        close(logits(both.model, IDS), truths(both, [4, 4, 4]))
    with both.runtime.route(["b", None, ["c", "d"]], torch.tensor([2, 0, 1]), start=[6, 4, 0]):
        close(logits(both.model, IDS[[2, 0, 1]])[:2], truths(both, [4, 0, 6])[[2, 0]])


@pytest.mark.parametrize("pieces", [(3, 4), (2, 2, 3), (1,) * 7, (6, 1)], ids=str)
def test_a_prompt_in_pieces(both, pieces) -> None:
    cache, parts = DynamicCache(), []
    with torch.no_grad(), both.runtime.route(ROWS, start=STARTS):
        for piece in IDS.split(pieces, 1):
            parts.append(both.model(piece, past_key_values=cache, use_cache=True).logits)
    close(torch.cat(parts, 1), truths(both, STARTS))


@pytest.mark.parametrize("starts", [STARTS, [9, 0, 7], [20, 5, 8]], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(use_cache=False),
        dict(cache_implementation="static"),
        dict(prefill_chunk_size=3),
        dict(prompt_lookup_num_tokens=2),
    ],
    ids=str,
)
def test_generation(both, starts, settings) -> None:
    expected = greedy_truths(both, starts)
    if "prompt_lookup_num_tokens" in settings:  # of one row only
        for row, spec in enumerate(ROWS):
            with both.runtime.route([spec], start=[starts[row]]):
                found = both.model.generate(IDS[row : row + 1], attention_mask=MASK[:1], **GREEDY, **settings)
            assert torch.equal(found[0], expected[row])
        return
    with both.runtime.route(ROWS, start=starts):
        found = both.model.generate(IDS, attention_mask=MASK, **GREEDY, **settings)
    assert torch.equal(found, expected)


def test_assisted_generation(both) -> None:
    assistant = tiny_model("llama" if type(both.model).__name__.startswith("Llama") else "gpt2")
    with both.runtime.route(["b"], start=9):
        found = both.model.generate(IDS[:1], attention_mask=MASK[:1], assistant_model=assistant, **GREEDY)
    assert torch.equal(found, both.greedy(IDS[:1], "b", 9))


@pytest.mark.parametrize("settings", [dict(num_beams=3), dict(num_beams=4, num_return_sequences=2)], ids=str)
def test_beams_are_pefts_over_the_base_models_cache(both, settings) -> None:
    settings = dict(GREEDY, **settings)
    with both.runtime.route(ROWS, start=STARTS):
        found = both.model.generate(IDS, attention_mask=MASK, **settings)
    copies = len(found) // 3
    for row, (spec, start) in enumerate(zip(ROWS, STARTS, strict=True)):
        one, cache = IDS[row : row + 1], DynamicCache()
        both.truth(one[:, :start], None, start, cache)
        cache.batch_repeat_interleave(settings["num_beams"])
        both.wear(spec)
        expected = both.peft.generate(input_ids=one, attention_mask=MASK[:1], past_key_values=cache, **settings)
        assert torch.equal(found[row * copies : (row + 1) * copies], expected)


def test_one_base_cache_serves_all_adapters(both) -> None:
    """A document that the base model read once, and three questions about it."""
    document, questions = token_ids(1, 9), token_ids(3, 4)
    cache, calls = DynamicCache(), []
    with torch.no_grad():
        both.model(document, past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(3)
    whole = torch.cat([document.expand(3, -1), questions], 1)
    hook = both.model.get_input_embeddings().register_forward_hook(lambda _, args, out: calls.append(args[0].shape[1]))
    with both.runtime.route(ROWS, start=9):
        found = both.model.generate(whole, attention_mask=torch.ones_like(whole), past_key_values=cache, **GREEDY)
    hook.remove()
    assert calls[0] == 4, "the document must not be read again"
    assert torch.equal(found, greedy_truths(both, [9, 9, 9], whole))


def test_shorter_questions_are_padded_behind_the_document(both) -> None:
    document, asked, lengths = token_ids(1, 9), token_ids(3, 4), [4, 2, 3]
    cache = DynamicCache()
    with torch.no_grad():
        both.model(document, past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(3)
    mask = torch.ones(3, 13, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, 9 : 13 - length] = 0
    whole = torch.cat([document.expand(3, -1), asked], 1) * mask
    with both.runtime.route(ROWS, start=9):
        found = both.model.generate(whole, attention_mask=mask, past_key_values=cache, **GREEDY)
    for row, spec in enumerate(ROWS):
        prompt = whole[row : row + 1, mask[row].bool()]
        assert torch.equal(found[row, -6:], both.greedy(prompt, spec, 9)[0, -6:])


def test_positions_count_the_padding(both) -> None:
    """Left padding: row 2 has two tokens less, and its start is counted in input_ids."""
    padded = torch.cat([torch.zeros(3, 2, dtype=torch.long), IDS], 1)
    padded[2] = torch.cat([torch.zeros(4, dtype=torch.long), IDS[2, :5]])
    mask = padded.ne(0).long()
    with both.runtime.route(ROWS, start=numpy.array([6, 4, 7])):
        found = both.model.generate(padded, attention_mask=mask, **GREEDY)
    for row, start in enumerate([4, 2, 3]):
        prompt = padded[row : row + 1, mask[row].bool()]
        assert torch.equal(found[row, -6:], both.greedy(prompt, ROWS[row], start)[0, -6:])


def test_gradients_are_pefts(both) -> None:
    (trained,) = {"b"}
    labels = IDS[:1, 1:]
    both.runtime.train_adapter(trained)
    with both.runtime.route([trained], start=4):
        scores = both.model(IDS[:1]).logits
    nn.functional.cross_entropy(scores[0, :-1], labels[0]).backward()
    cache = DynamicCache()
    before = both.truth(IDS[:1, :4], None, 4, cache)
    both.wear(trained)
    after = both.peft(IDS[:1, 4:], past_key_values=cache, use_cache=True).logits
    nn.functional.cross_entropy(torch.cat([before, after], 1)[0, :-1], labels[0]).backward()
    names = dict(both.model.named_parameters())
    compared = 0
    for name, parameter in both.peft.named_parameters():
        if f"ia3_l.{trained}" in name:
            path = name.removeprefix("base_model.model.").removesuffix(f".ia3_l.{trained}")
            (ours,) = [p for own, p in names.items() if own.startswith(path) and own.endswith(f"_{trained}")]
            close(ours.grad.flatten(), parameter.grad.flatten())
            compared += bool(parameter.grad.any())
    assert compared


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_state_that_counts_no_tokens_is_counted_by_generate(use_cache, torch_backend) -> None:
    """Mamba's and RWKV's: the base model's state, gone on with by a model with scaled weights."""
    torch.manual_seed(0)
    size = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2)
    models = {
        ("out_proj", "in"): MambaForCausalLM(MambaConfig(**size, state_size=4, pad_token_id=0, eos_token_id=None)),
        ("key", "out"): RwkvForCausalLM(RwkvConfig(**size, attention_hidden_size=32, pad_token_id=0)),
    }
    for (name, side), model in models.items():
        model.generation_config.eos_token_id = None
        plain = copy.deepcopy(model.eval())
        feedforward = [name] if side == "in" else []
        runtime = ia3rt.patch(model, target_modules=[name], feedforward_modules=feedforward)
        vectors = {site.key: torch.rand(site.width) * 2 for site in runtime.sites}
        runtime.add_adapter("a", vectors)
        for start in (3, 9):
            rows = ["a"] if side == "out" else ["a", None]  # transformers' RWKV mixes rows up in a step of several
            with runtime.route(rows, start=start):
                found = model.generate(IDS[: len(rows)], use_cache=use_cache, max_new_tokens=4, do_sample=False)
            adapted, row = scaled(plain, vectors).float(), IDS[:1]
            for _ in range(4):  # each time anew: the base model's state of the tokens before, and the others over it
                first = plain(row[:, :start], use_cache=True)
                kept = {n: first[n] for n in ("state", "cache", "cache_params") if first.get(n) is not None}
                scores = first.logits
                for token in row[:, start:].unbind(1):
                    step = adapted(token.unsqueeze(1), use_cache=True, **kept)
                    kept, scores = {n: step[n] for n in kept}, step.logits
                row = torch.cat([row, scores[:, -1:].argmax(-1)], 1)
            assert torch.equal(found[0], row[0])
            expected = plain.generate(IDS[1:2], max_new_tokens=4, do_sample=False)
            assert torch.equal(found[1:], expected[: len(rows) - 1])


def test_a_state_of_unknown_length_is_refused(torch_backend) -> None:
    torch.manual_seed(0)
    model = MambaForCausalLM(
        MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, state_size=4)
    ).eval()
    runtime = ia3rt.patch(model, target_modules=["out_proj"], feedforward_modules=["out_proj"])
    runtime.add_adapter("a", {site.key: torch.rand(site.width) for site in runtime.sites})
    with torch.no_grad():
        output = model(IDS[:1], use_cache=True)
        name = "cache" if "cache" in output else "cache_params"  # as earlier transformers call it
        kept, before = output[name], copy.deepcopy(output[name])
        with runtime.route(["a"], start=9), pytest.raises(ValueError, match="does not say how many they were"):
            model(IDS[:1, :1], **{name: kept})
        with runtime.route(["a"]):
            expected = model(IDS[:1, :1], **{name: kept}).logits
        runtime.set_adapter("a")
        assert torch.equal(model(IDS[:1, :1], **{name: before}).logits, expected)


def test_xlnet_that_goes_over_tokens_twice_is_refused(torch_backend) -> None:
    torch.manual_seed(0)
    config = XLNetConfig(vocab_size=VOCABULARY, d_model=32, n_layer=1, n_head=2, d_inner=48, mem_len=20)
    runtime = ia3rt.patch(XLNetLMHeadModel(config).eval())
    runtime.add_adapter("a", {site.key: torch.rand(site.width) for site in runtime.sites})
    with runtime.route(["a", None], start=9), pytest.raises(ValueError, match="does not say how many they were"):
        runtime.model(IDS[:2], mems=runtime.model(IDS[:2], use_mems=True).mems)


def test_an_input_as_long_as_the_text_is_not_taken_for_its_tokens(torch_backend) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=99, n_embd=32, n_layer=1, n_head=4, n_positions=64, add_cross_attention=True)
    model = GPT2LMHeadModel(config).eval()
    runtime = patched(model)
    ids, states = torch.arange(4, 18).view(2, 7), torch.randn(2, 7, 32)
    index = torch.tensor([[0] * 3 + [1] * 4] * 2)
    for route in (dict(mixes=["a", None], index=index), dict(mixes=["a", "b"], start=3)):
        with runtime.route(**route), pytest.raises(ValueError, match=r"encoder_hidden_states \(2, 7, 32\) has as many"):
            model(ids, encoder_hidden_states=states)
    with runtime.route(["a", "b"]):
        model(ids, encoder_hidden_states=states)


def test_what_has_no_one_sequence_of_tokens_is_refused(torch_backend) -> None:
    config = T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    runtime = ia3rt.patch(T5ForConditionalGeneration(config))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has two sequences of tokens"):
        runtime.route([None, None], start=2)
    size = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8)
    runtime = ia3rt.patch(ViTForImageClassification(ViTConfig(**size, patch_size=4)).eval())
    runtime.add_adapter("a", {site.key: torch.rand(site.width) for site in runtime.sites})
    with runtime.route(["a", None], start=2), pytest.raises(ValueError, match=r"\(2, 3, 8, 8\) of .* is no text"):
        runtime.model(torch.rand(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("start", "match"),
    [
        ([1, 2], "start has 2 positions, and the route 3 rows"),
        ([1, 2, 3, 4], "start has 4 positions"),
        ([1, -2, 3], "start has -2 for row 1"),
        (-1, "start has -1 for row 0"),
        ([1, 2.0, 3], r"start has 2\.0 for row 1"),
        ([1, 2, True], "start has True for row 2"),
        (2.5, r"got 2\.5"),
        ("123", "got '123'"),
    ],
    ids=str,
)
def test_a_start_that_is_none_leaves_everything_as_it_was(both, start, match) -> None:
    both.runtime.set_adapter("c")
    before = logits(both.model, IDS)
    with pytest.raises(ValueError, match=match):
        both.runtime.route(ROWS, start=start)
    assert torch.equal(logits(both.model, IDS), before) and both.runtime.active_adapters == ["c"]


def test_what_start_does_not_go_with_is_refused(both) -> None:
    index = torch.zeros(3, 7, dtype=torch.long)
    with pytest.raises(ValueError, match="give one of them"):
        both.runtime.route(ROWS, index, start=2)
    with pytest.raises(ValueError, match="give start or images"):
        both.runtime.route(ROWS, images=[0, 2], start=2)
    compiled = torch.compile(both.model, backend="eager")
    with both.runtime.route(ROWS, start=2), pytest.raises(ValueError, match="disable_compile=True"):
        compiled(IDS)


def test_an_adapters_own_head_is_refused(tmp_path, torch_backend) -> None:
    both = Both("llama", tmp_path)
    config = dict(peft_type="IA3", modules_to_save=["lm_head"], target_modules=["k_proj"], feedforward_modules=[])
    vectors = {site.key: torch.rand(site.width) for site in both.runtime.sites}
    both.runtime.add_adapter("head", vectors, config, {"lm_head": {"weight": torch.rand(VOCABULARY, 64)}})
    for rows in (["head"], ["head", "b", "head"]):
        with pytest.raises(ValueError, match="own module 'lm_head'.* nor from a start on"):
            both.runtime.route(rows, start=2)
    with both.runtime.route(["head"], start=0):
        logits(both.model, IDS[:1])


def test_without_a_start_nothing_is_different(both) -> None:
    """The very route, so that what runs is what ran without `start`."""
    for start in (None, 0, [0, None, 0]):
        with both.runtime.route(ROWS, start=start):
            route = both.runtime._routing.route
            assert route.start is None and not route.by_token and len(route.mixes) == 3


def test_an_adapter_that_is_deleted_meanwhile(both) -> None:
    with both.runtime.route(ROWS, start=STARTS):
        with pytest.warns(UserWarning, match="was active and is deleted"):
            both.runtime.delete_adapter("b")
        found = logits(both.model, IDS)
    close(found[0:1], both.truth(IDS[:1], None, 4))
    close(found[2:], both.truth(IDS[2:], ROWS[2], STARTS[2]))


def test_a_bank_that_grows_and_a_copy(both) -> None:
    with both.runtime.route(ROWS, start=STARTS):
        expected = logits(both.model, IDS)
        for number in range(12):
            both.runtime.add_adapter(f"more{number}")
        assert torch.equal(logits(both.model, IDS), expected)
        assert torch.equal(logits(copy.deepcopy(both.model), IDS), expected)


def test_gradient_checkpointing_wears_it_again(tmp_path, torch_backend) -> None:
    both = Both("llama", tmp_path)  # which has no dropout
    parameters = both.runtime.train_adapter("b")
    with both.runtime.route(ROWS, start=STARTS):
        loss = both.model(IDS, labels=IDS, use_cache=False).loss
    expected = torch.autograd.grad(loss, parameters)
    both.model.train()
    both.model.gradient_checkpointing_enable()
    with both.runtime.route(ROWS, start=STARTS):
        loss = both.model(IDS, labels=IDS, use_cache=False).loss
    for found, each in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
        close(found, each)


def test_images_are_before_or_after_a_start_and_not_in_it(torch_backend) -> None:
    """Where only the text wears vectors, an image's tokens are as any others; in the part that sees none are known."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    sight = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(
        vision_config=sight.to_dict(), text_config=text.to_dict(), image_token_index=5, image_token_id=5,
        image_seq_length=4, vision_feature_layer=-1,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id = 0
    ids = torch.tensor([[7, 5, 5, 5, 5, 9, 11, 13], [8, 5, 5, 5, 5, 19, 21, 3]])
    given = dict(input_ids=ids, pixel_values=torch.rand(2, 3, 8, 8), attention_mask=torch.ones_like(ids))
    runtime = ia3rt.patch(model)
    runtime.add_adapter("a", {site.key: torch.rand(site.width) * 3 for site in runtime.sites})
    settings = dict(max_new_tokens=4, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        cache = DynamicCache()
        model(**{**given, "input_ids": ids[:, :6], "attention_mask": None}, past_key_values=cache, use_cache=True)
        runtime.set_adapter("a")
        expected = model(input_ids=ids[:, 6:], past_key_values=cache, use_cache=True).logits
        runtime.set_adapter(None)
        with runtime.route(["a", "a"], start=6):
            close(model(**given).logits[:, 6:], expected)
            assert torch.equal(model.generate(**given, **settings)[:, 8], expected[:, -1].argmax(-1))
    runtime.unpatch()
    runtime = ia3rt.patch(model, target_modules=["k_proj", "v_proj"], feedforward_modules=[])
    runtime.add_adapter("a", {site.key: torch.rand(site.width) for site in runtime.sites})
    for rows in (1, 2):
        some = {name: each[:rows] for name, each in given.items()}
        with runtime.route(["a"] * rows, start=6), pytest.raises(ValueError) as refused:
            model(**some)
        with runtime.route(["a"] * rows, start=6), pytest.raises(ValueError) as refused_ahead:
            model.generate(**some, **settings)
        in_forward, in_generate = str(refused.value), str(refused_ahead.value)
        assert "vision_tower" in in_forward or "in an image" in in_forward
        # Earlier transformers' generate() has the images seen by the forward over text, and not ahead of it.
        is_ahead = Version(transformers.__version__) >= Version("5.24")
        assert re.search("vision_tower.*over text", in_generate) if is_ahead else in_generate == in_forward


def test_a_captured_graph_is_not_replayed_at_other_tokens(both) -> None:
    """As on a GPU, without one: what a graph reads is lent to it as it is captured."""
    with both.runtime.route(ROWS):
        both.runtime._routing.capture(both.runtime._routing.context.wearing.worn)
    with pytest.raises(ValueError, match="a CUDA graph of 3 rows was captured here"):
        both.runtime.route(ROWS, start=2)
    with both.runtime.route(ROWS[:2], start=2):
        logits(both.model, IDS[:2])


def latent_model() -> DeepseekV3ForCausalLM:
    """Its cache holds what kv_b_proj computes keys and values from, of all tokens anew in each step."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, v_head_dim=8, qk_nope_head_dim=8,
        n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16, pad_token_id=0,
        first_k_dense_replace=1,
    )  # fmt: skip
    return DeepseekV3ForCausalLM(config).eval()


@contextmanager
def scaled_from(model: nn.Module, vectors: dict[tuple[str, str], Tensor], start: int) -> Iterator[None]:
    """Multiplies vectors to the tokens from a position on, by hooks."""

    def scaled_part(x: Tensor, vector: Tensor) -> Tensor:
        return torch.cat([x[..., :start, :], x[..., start:, :] * vector], -2)

    hooks = []
    for (path, side), vector in vectors.items():
        module = model.get_submodule(path)
        if side == "in":
            hooks.append(module.register_forward_pre_hook(lambda _, args, v=vector: (scaled_part(args[0], v),)))
        else:
            hooks.append(module.register_forward_hook(lambda _, args, out, v=vector: scaled_part(out, v)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def test_a_layer_that_computes_on_the_cache_again_is_refused(torch_backend) -> None:
    model = latent_model()
    plain = copy.deepcopy(model)
    runtime = ia3rt.patch(model)
    here = {site.key: torch.rand(site.width) * 2 for site in runtime.sites}
    assert any("kv_b_proj" in path for path, _ in here)
    runtime.add_adapter("a", here)
    runtime.add_adapter("mlp", {key: vector for key, vector in here.items() if "kv_b_proj" not in key[0]})
    ids = IDS[:2]
    with torch.no_grad():
        for rows in (["a", "a"], ["a", None], ["a"]):
            some = ids[: len(rows)]
            with runtime.route(rows, start=3):
                with pytest.raises(ValueError, match=r"kv_b_proj.*tokens of its cache again"):
                    model.generate(some, attention_mask=MASK[: len(rows)], **GREEDY)
                found = model(some, use_cache=False).logits
            for row, name in enumerate(rows):
                with scaled_from(plain, {} if name is None else here, 3):
                    close(found[row], plain(some[row : row + 1], use_cache=False).logits[0])
        with runtime.route(["mlp", None], start=3):  # where nothing acts there it is as anywhere
            tokens = model.generate(ids, attention_mask=MASK[:2], **GREEDY)
            slow = model.generate(ids, attention_mask=MASK[:2], use_cache=False, **GREEDY)
        assert torch.equal(tokens, slow)
        with runtime.route(["a", None], start=3), pytest.raises(ValueError, match="tokens of its cache again"):
            model.generate(ids, attention_mask=MASK[:2], **GREEDY)


@pytest.mark.parametrize("start", [torch.tensor([4, 2, 6]), [torch.tensor(4), 2, 6]], ids=["tensor", "scalars"])
def test_positions_may_be_tensors(both, start) -> None:
    with both.runtime.route(ROWS, start=start):
        close(logits(both.model, IDS), truths(both, STARTS))
    with both.runtime.route(ROWS, start=2**70):
        close(logits(both.model, IDS), truths(both, [9, 9, 9]))


def test_continuous_batching_knows_no_route(both) -> None:
    """It runs in a thread of its own."""
    config = GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=0)
    prompts = [row.tolist() for row in IDS[:2]]
    for entered in (both.runtime.route(["b", None]), both.runtime.disable_adapter()):
        with entered, pytest.raises(ValueError, match="runs in a thread of its own"):
            both.model.generate_batch(prompts, generation_config=config)
    manager = both.model.init_continuous_batching(generation_config=config)
    for entered in (both.runtime.route(["b", None]), both.runtime.disable_adapter()):
        with entered:
            for add in (lambda: manager.add_request(prompts[0]), lambda: manager.add_requests(prompts)):
                with pytest.raises(ValueError, match="runs in a thread of its own"):
                    add()
    assert manager.add_request(prompts[0])

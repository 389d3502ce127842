"""Routes within `generate`: what repeats, drops or tries rows again goes on with the mixes they had."""

from copy import deepcopy
from types import MethodType

import pytest
import torch
from tiny import generated, logits, patched, tiny_model, token_ids
from torch import Tensor
from transformers import (
    DiaConfig,
    DiaForConditionalGeneration,
    LogitsProcessor,
    MusicgenConfig,
    MusicgenDecoderConfig,
    MusicgenForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import ia3rt

IDS = token_ids()
MASK = torch.ones_like(IDS)
SIZE = dict(encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48)


def whisper() -> ia3rt.Runtime:
    torch.manual_seed(0)
    tokens = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3)
    config = WhisperConfig(
        **SIZE, **tokens, vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=2, max_target_positions=40,
        num_mel_bins=8, max_source_positions=50, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval()
    settings = dict(no_timestamps_token_id=50, is_multilingual=False, return_timestamps=True)
    for key, value in dict(**settings, max_initial_timestamp_index=1).items():
        setattr(model.generation_config, key, value)
    runtime = ia3rt.patch(model)
    generator = torch.Generator().manual_seed(3)
    for name in "ab":
        vectors = {s.key: 1 + torch.randn(s.width, generator=generator) for s in runtime.sites}
        runtime.add_adapter(name, vectors)
    return runtime


def same(actual: Tensor, expected: Tensor) -> None:
    count = min(len(actual), len(expected))
    assert torch.equal(actual[:count], expected[:count])


@pytest.mark.parametrize("ends_first", [0, 1])
@pytest.mark.parametrize(
    "settings",
    [
        dict(num_beams=2),
        dict(num_beams=1),
        dict(do_sample=True, num_return_sequences=2),
        dict(temperature=(0.0, 0.0), compression_ratio_threshold=0.9, logprob_threshold=-4.5),
        dict(cache_implementation="static", disable_compile=True),
    ],
    ids=["beams", "greedy", "sequences", "tries again", "static"],
)
def test_whispers_long_form(ends_first, settings) -> None:
    runtime, names = whisper(), ("a", "b")
    audio, mask = torch.randn(2, 8, 200), torch.ones(2, 200, dtype=torch.long)
    mask[ends_first, 103:] = 0

    def transcribe() -> Tensor:
        torch.manual_seed(4)
        return runtime.model.generate(
            input_features=audio, attention_mask=mask, return_timestamps=True, max_new_tokens=8, **settings
        )

    with runtime.route(list(names)):
        routed = transcribe()
    copies, different = len(routed) // 2, 0
    for row, name in enumerate(names):
        runtime.set_adapter(name)
        alone = transcribe()
        if settings.get("do_sample"):
            continue  # draws depend on all rows
        for copy in range(copies):
            same(routed[row * copies + copy], alone[row * copies + copy])
        different += not torch.equal(alone, routed)
    if settings.get("do_sample"):
        with runtime.route([names[0]] * 2):
            equal = transcribe()
        runtime.set_adapter(names[0])
        same(equal.flatten(), transcribe().flatten())
    else:
        assert different


@pytest.mark.parametrize("chunk", [2, 3])
def test_a_prompt_in_pieces_has_its_tokens_mixes(chunk) -> None:
    runtime = ia3rt.patch(tiny_model())
    for name in "ab":
        runtime.add_adapter(name, {site.key: torch.rand(site.width) * 2 for site in runtime.sites})
    index = torch.tensor([[0, 0, 1, 0, 1, 1, 0], [1] * 7, [0, 1, 0, 1, 0, 1, 1]])
    settings = dict(attention_mask=MASK, max_new_tokens=4, do_sample=False)
    with runtime.route(["a", "b"], index):
        whole = runtime.model.generate(IDS, **settings)
        pieces = runtime.model.generate(IDS, prefill_chunk_size=chunk, **settings)
    assert torch.equal(whole, pieces)
    with runtime.route(["a", None, "b"]):
        assert torch.equal(
            runtime.model.generate(IDS, **settings),
            runtime.model.generate(IDS, prefill_chunk_size=chunk, **settings),
        )


def test_a_prompt_of_other_tokens_than_the_route_is_an_error() -> None:
    runtime = ia3rt.patch(tiny_model())
    runtime.add_adapter("a", {site.key: torch.rand(site.width) for site in runtime.sites})
    for length in (5, 9):
        index, message = torch.zeros(3, length, dtype=torch.long), f"the route has {length} tokens a row, but .* has 7"
        with runtime.route(["a", None], index), pytest.raises(ValueError, match=message):
            runtime.model.generate(IDS, attention_mask=MASK, max_new_tokens=2)


@pytest.mark.parametrize(("guidance", "rows"), [(3.0, 12), (1.0, 6)])
def test_a_model_that_repeats_rows_in_another_order_is_refused(guidance: float, rows: int) -> None:
    """MusicGen has a row for each codebook, and its guidance puts all of them once more behind all."""
    torch.manual_seed(0)
    decoder = MusicgenDecoderConfig(
        vocab_size=32, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=4, num_codebooks=2,
        pad_token_id=32, bos_token_id=32, max_position_embeddings=64,
    )  # fmt: skip
    from transformers import EncodecConfig

    text = T5Config(vocab_size=99, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    audio = EncodecConfig(hidden_size=8, num_filters=4, codebook_size=32, codebook_dim=8, num_lstm_layers=1)
    model = MusicgenForConditionalGeneration(
        MusicgenConfig(text_encoder=text.to_dict(), audio_encoder=audio.to_dict(), decoder=decoder.to_dict())
    ).eval()
    model.generation_config.decoder_start_token_id = 32
    runtime = ia3rt.patch(model, target_modules=r"decoder.*(k_proj|v_proj)", feedforward_modules=[])
    runtime.add_adapter("a", {site.key: torch.rand(site.width) for site in runtime.sites})
    settings = dict(attention_mask=MASK, guidance_scale=guidance, max_new_tokens=3, do_sample=False)
    message = f"the route has 3 rows, but the batch has {rows}: .* set_adapter"
    with runtime.route(["a", None, "a"]), pytest.raises(ValueError, match=message):
        model.generate(IDS % 99, **settings)
    runtime.set_adapter("a")
    assert len(model.generate(IDS % 99, **settings)) == 3


def test_guidance_that_runs_each_row_twice_is_refused() -> None:
    """Dia's, which puts all rows without their text behind all; without guidance its rows are the prompts."""
    torch.manual_seed(0)
    heads = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=2, head_dim=8)
    cross = dict(cross_num_attention_heads=2, cross_num_key_value_heads=2, cross_head_dim=8, cross_hidden_size=16)
    tokens = dict(eos_token_id=61, pad_token_id=62, bos_token_id=63)
    config = DiaConfig(
        encoder_config=dict(**heads, num_hidden_layers=1, vocab_size=128),
        decoder_config=dict(**heads, **cross, **tokens, num_hidden_layers=2, vocab_size=64, num_channels=2),
        delay_pattern=[0, 1],
        **tokens,
    )
    model = DiaForConditionalGeneration(config).eval()
    runtime = ia3rt.patch(model)
    runtime.add_adapter("a", {site.key: torch.rand(site.width) for site in runtime.sites})
    settings = dict(attention_mask=MASK, max_new_tokens=4, do_sample=False)
    with runtime.route(["a", None, "a"]):
        assert len(model.generate(IDS, **settings)) == 3
        with pytest.raises(ValueError, match="the route has 3 rows, but the batch has 6: .* set_adapter"):
            model.generate(IDS, guidance_scale=3.0, **settings)
    runtime.set_adapter("a")
    assert len(model.generate(IDS, guidance_scale=3.0, **settings)) == 3


def test_a_generation_is_of_one_mix_whatever_another_thread_sets() -> None:
    import threading

    runtime = ia3rt.patch(tiny_model())
    for name in "ab":
        runtime.add_adapter(name, {site.key: torch.rand(site.width) * 2 for site in runtime.sites})

    class Switches(LogitsProcessor):
        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            other = threading.Thread(target=runtime.set_adapter, args=("b",))
            other.start()
            other.join()
            return scores

    settings = dict(attention_mask=MASK, max_new_tokens=6, do_sample=False)
    runtime.set_adapter("a")
    expected = runtime.model.generate(IDS, **settings)
    assert torch.equal(runtime.model.generate(IDS, logits_processor=[Switches()], **settings), expected)
    assert runtime.active_adapters == ["b"]
    assert not torch.equal(runtime.model.generate(IDS, **settings), expected)


def test_what_is_set_by_what_generate_calls_shows_at_once() -> None:
    runtime = ia3rt.patch(tiny_model())
    for name in "ab":
        runtime.add_adapter(name, {site.key: torch.rand(site.width) * 2 for site in runtime.sites})

    class Switches(LogitsProcessor):
        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            runtime.set_adapter("b")
            return scores

    settings = dict(attention_mask=MASK, do_sample=False, use_cache=False)
    with runtime.route(["a", None, "a"]):
        tokens = runtime.model.generate(IDS, logits_processor=[Switches()], max_new_tokens=2, **settings)
    runtime.set_adapter("b")
    assert torch.equal(tokens[:, -1], logits(runtime.model, tokens[:, :-1])[:, -1].argmax(-1))


@pytest.mark.parametrize("is_copy", [False, True], ids=["original", "copy"])
def test_a_generate_that_stood_on_the_model_itself_is_followed_and_stays(is_copy) -> None:
    def mine(self: PreTrainedModel, *args: object, **kwargs: object) -> Tensor:
        assert self is model
        return type(self).generate(self, *args, num_beams=2, max_new_tokens=3, **kwargs)

    model = tiny_model()
    model.generate = MethodType(mine, model)
    runtime = patched(model)
    if is_copy:
        model = deepcopy(model)
        runtime = ia3rt.patch(model)
    rows = []
    for row, name in enumerate(["a", None, "b"]):
        runtime.set_adapter(name)
        rows.append(generated(model, IDS[row : row + 1], MASK[:1])[0])
    with runtime.route(["a", None, "b"]):
        assert torch.equal(generated(model, IDS, MASK), torch.stack(rows))
    runtime.unpatch()
    assert vars(model)["generate"] == MethodType(mine, model)
    assert torch.equal(generated(model, IDS[1:2], MASK[:1])[0], rows[1])


def test_a_generate_that_is_set_on_a_patched_model_stays_after_unpatch() -> None:
    model, calls = tiny_model(), []
    right = generated(model, IDS, MASK, max_new_tokens=2)
    runtime = patched(model)
    inner = model.generate

    def counting(*args: object, **kwargs: object) -> Tensor:
        calls.append(1)
        return inner(*args, **kwargs)

    model.generate = counting
    assert torch.equal(generated(model, IDS, MASK, max_new_tokens=2), right)
    runtime.unpatch()
    assert torch.equal(generated(model, IDS, MASK, max_new_tokens=2), right)
    assert len(calls) == 2

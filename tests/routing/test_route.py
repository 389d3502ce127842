"""A mix per row and per token, in a forward and through generate()."""

import pytest
import torch
from tiny import FAMILIES, VOCABULARY, logits, peft_model, save_each, tiny_model, token_ids
from transformers import T5Config, T5ForConditionalGeneration

import ia3rt

ROWS = ["b", None, ["c", "d"]]
IDS = token_ids(rows=3)
MASK = torch.ones_like(IDS)


@pytest.fixture(params=FAMILIES)
def runtime(request, tmp_path):
    runtime = ia3rt.patch(tiny_model(request.param))
    for folder in save_each(peft_model(tiny_model(request.param), request.param), tmp_path):
        runtime.load_adapter(folder)
    return runtime


@pytest.fixture
def model(runtime):
    return runtime.model


def alone(runtime, spec, run):
    """What `run` gives while every row wears `spec`."""
    runtime.set_adapter(spec)
    result = run()
    runtime.set_adapter(None)
    return result


def test_each_row_wears_its_mix(runtime, model):
    with runtime.route(ROWS):
        mixed = logits(model, IDS)
    for row, spec in enumerate(ROWS):
        expected = alone(runtime, spec, lambda: logits(model, IDS))
        torch.testing.assert_close(mixed[row], expected[row], rtol=1e-5, atol=1e-6)


def test_an_index_routes_rows_to_few_mixes(runtime, model):
    with runtime.route(ROWS):
        expected = logits(model, IDS)
    with runtime.route([["c", "d"], "b", None], torch.tensor([1, 2, 0])):
        assert torch.equal(logits(model, IDS), expected)


def test_each_token_wears_its_mix(runtime, model):
    """Causal: a prefix in one mix is what it is alone, so only the tokens after it show the second mix."""
    index = torch.tensor([[0] * 4 + [1] * 3] * 3)
    with runtime.route(["b", "c"], index):
        mixed = logits(model, IDS)
    prefix = alone(runtime, "b", lambda: logits(model, IDS))
    torch.testing.assert_close(mixed[:, :4], prefix[:, :4], rtol=1e-5, atol=1e-6)

    def rest():  # the second part over the cache that the first left
        runtime.set_adapter("b")
        first = model(IDS[:, :4], use_cache=True)
        runtime.set_adapter("c")
        cache = first.get("cache", first.get("past_key_values"))
        return model(IDS[:, 4:], past_key_values=cache).logits

    with torch.no_grad():
        torch.testing.assert_close(mixed[:, 4:], rest(), rtol=1e-4, atol=1e-5)


def test_a_token_route_fits_a_forward_of_its_shape_only(runtime, model):
    inner = getattr(model, model.base_model_prefix)
    with torch.no_grad(), runtime.route(["b", "c"], torch.randint(2, IDS.shape)):
        torch.testing.assert_close(model.lm_head(inner(IDS)[0]), model(IDS).logits)
        module = model.get_submodule(runtime.sites[0].path)
        with pytest.raises(ValueError, match="each token wears a mix of its own, and .* outside of a forward"):
            module(torch.rand(3, 7, 64))


@pytest.mark.parametrize(
    ("settings", "copies"),
    [
        (dict(do_sample=False), 1),
        (dict(do_sample=False, use_cache=False), 1),
        (dict(do_sample=False, cache_implementation="static"), 1),
        (dict(do_sample=True), 1),
        (dict(do_sample=True, num_return_sequences=2), 2),
        (dict(do_sample=False, num_beams=3), 1),
        (dict(do_sample=False, num_beams=4, num_return_sequences=2), 2),
    ],
    ids=str,
)
def test_generation_of_a_routed_batch_is_that_of_its_rows(runtime, model, settings, copies):
    """Greedy and beams give each row what it gives where all wear its mix; sampling, its distribution's draws."""
    settings = dict(attention_mask=MASK, max_new_tokens=6, **settings)

    def generate():
        torch.manual_seed(3)
        return model.generate(IDS, **settings)

    with runtime.route(ROWS):
        mixed = generate()
    assert len(mixed) == copies * len(ROWS)
    different = 0
    for row, spec in enumerate(ROWS):
        same = alone(runtime, spec, generate)
        chosen = slice(row * copies, (row + 1) * copies)
        assert torch.equal(mixed[chosen], same[chosen])
        different += not torch.equal(mixed, same)
    assert different, "the mixes have to show"


def test_left_padding_changes_no_row(runtime, model):
    padded = torch.cat([torch.zeros(3, 2, dtype=torch.long), IDS], dim=1)
    padded[2] = torch.cat([torch.zeros(4, dtype=torch.long), IDS[2, :5]])
    mask = padded.ne(0).long()
    with runtime.route(ROWS):
        tokens = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for row, spec in enumerate(ROWS):
        runtime.set_adapter(spec)
        prompt = padded[row : row + 1, mask[row].bool()]
        expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
        assert torch.equal(tokens[row, -6:], expected[0, -6:])


def test_assisted_decoding_gives_the_greedy_tokens(runtime, model):
    assistant = tiny_model("llama" if type(model).__name__.startswith("Llama") else "gpt2")
    one = IDS[:1]
    settings = dict(attention_mask=MASK[:1], max_new_tokens=8, do_sample=False)
    with runtime.route([["c", "d"]]):
        plain = model.generate(one, **settings)
        assisted = model.generate(one, assistant_model=assistant, **settings)
    assert torch.equal(plain, assisted)


def test_what_a_row_generates_wears_the_mix_of_its_last_token(runtime, model):
    index = torch.tensor([[0] * 6 + [1]] * 3)
    settings = dict(attention_mask=MASK, max_new_tokens=5, do_sample=False)
    for beams in (1, 2):
        with runtime.route(["b", "c"], index):
            cached = model.generate(IDS, num_beams=beams, **settings)
            uncached = model.generate(IDS, num_beams=beams, use_cache=False, **settings)
        assert torch.equal(cached, uncached)
    longer = torch.cat([index, torch.ones(3, 5, dtype=torch.long)], dim=1)
    with runtime.route(["b", "c"], index):
        tokens = model.generate(IDS, **settings)
    with runtime.route(["b", "c"], longer):
        assert torch.equal(logits(model, tokens)[:, 6:-1].argmax(-1), tokens[:, 7:])


@pytest.mark.parametrize("rows", [1, 2, 4, 6])
def test_a_route_of_another_length_than_the_batch_is_an_error_before_anything_runs(runtime, model, rows):
    ran = []
    hook = model.get_input_embeddings().register_forward_hook(lambda *_: ran.append(1))
    with runtime.route(["b"] * rows):
        message = f"the route has {rows} rows, but the batch has 3"
        with pytest.raises(ValueError, match=message):
            model(IDS)
        with pytest.raises(ValueError, match=message):
            model(inputs_embeds=torch.zeros(3, 5, 64))
        if rows != 6:  # six rows for three prompts of two beams: the routes of a batch that was expanded by hand
            with pytest.raises(ValueError, match=f"the route has {rows} rows × 2 sequences each, but the batch has 6"):
                model.generate(IDS, attention_mask=MASK, num_beams=2, max_new_tokens=2)
    hook.remove()
    assert not ran


def test_outside_generate_rows_are_not_repeated(runtime, model):
    with runtime.route(["b", "c"]), pytest.raises(ValueError, match="2 rows, but the batch has 4"):
        model(token_ids(rows=4))


@pytest.mark.parametrize("tokens", [6, 8])
def test_a_token_route_of_another_length_is_an_error(runtime, model, tokens):
    message = f"the route has {tokens} tokens a row, but the batch has 7"
    with runtime.route(["b"], torch.zeros(3, tokens, dtype=torch.long)), pytest.raises(ValueError, match=message):
        model(IDS)


def test_contexts_nest_and_end_after_an_error(runtime, model):
    runtime.set_adapter("d")
    outer = logits(model, IDS)
    with pytest.raises(KeyError), runtime.route(["b", "c", "d"]):
        with runtime.disable_adapter():
            assert runtime.active_adapters == []
        assert runtime.active_adapters == ["b", "c", "d"]
        raise KeyError
    assert torch.equal(logits(model, IDS), outer)


def test_an_encoder_decoder_is_routed_in_both_parts():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(config).eval()
    runtime = ia3rt.patch(model)
    for name in "bc":
        runtime.add_adapter(name, {site.key: torch.rand(site.width) * 3 - 1 for site in runtime.sites})
    settings = dict(attention_mask=MASK, max_new_tokens=6, do_sample=False, num_beams=3)
    with runtime.route(["b", None, "c"]):
        mixed = model.generate(IDS, **settings)
    for row, spec in enumerate(["b", None, "c"]):
        assert torch.equal(mixed[row], alone(runtime, spec, lambda: model.generate(IDS, **settings))[row])


def test_rows_cannot_be_routed_inside_the_experts_of_a_mixture():
    experts = torch.nn.ModuleDict({"experts": torch.nn.ModuleList([torch.nn.Linear(4, 4)])})
    runtime = ia3rt.patch(experts, target_modules=["0"], feedforward_modules=["0"])
    runtime.add_adapter("b", {"experts.0": torch.rand(4)})
    with pytest.raises(ValueError, match="inside a mixture's experts"):
        runtime.route(["b", None])
    runtime.set_adapter("b")

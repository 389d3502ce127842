"""The same checkpoints through PEFT and through ia3rt."""

import pytest
import torch
from tiny import DTYPES, FAMILIES, logits, peft_model, peft_vectors, save_each, scaled, tiny_model, token_ids

import ia3rt

SUM = {"b": 0.25, "d": -0.7}
SPECS = ["b", ["b", "c", "d"]]
ROWS = ["b", None, ["c", "d"], SUM]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module", params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def pair(family, dtype, tmp_path_factory):
    """A PEFT model with three adapters, and an ia3rt Runtime over the same model that loaded their files."""
    model = tiny_model(family, dtype)
    wrapped = peft_model(model, family)
    runtime = ia3rt.patch(model)
    for folder in save_each(wrapped, tmp_path_factory.mktemp("adapters")):
        runtime.load_adapter(folder)
    wrapped.base_model.add_weighted_adapter(["b", "d"], list(SUM.values()), "sum")
    return wrapped, runtime


def peft_set(wrapped, spec):
    """Activates in PEFT what `spec` means in ia3rt."""
    names = ["sum"] if isinstance(spec, dict) else [spec] if isinstance(spec, str) else spec
    wrapped.base_model.set_adapter(names)


def peft_logits(wrapped, spec, ids):
    if spec is None:
        with wrapped.disable_adapter():
            return logits(wrapped, ids)
    peft_set(wrapped, spec)
    return logits(wrapped, ids)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_mix_is_pefts_to_the_bit(pair, spec):
    wrapped, runtime = pair
    runtime.set_adapter(spec)
    assert torch.equal(logits(runtime.model, token_ids()), peft_logits(wrapped, spec, token_ids()))


def test_linear_is_pefts_weighted_sum(pair, family, dtype):
    wrapped, runtime = pair
    runtime.set_adapter(SUM)
    ours, pefts = logits(runtime.model, token_ids()), peft_logits(wrapped, SUM, token_ids())
    if dtype == torch.float32:
        assert torch.equal(ours, pefts)
    else:  # PEFT rounds the summed vector to the model's dtype: ours has to be as near to the truth
        vectors = {name: peft_vectors(wrapped, name) for name in SUM}
        sums = {key: sum(SUM[name] * vectors[name][key] for name in SUM) for key in vectors["b"]}
        truth = logits(scaled(tiny_model(family, dtype), sums), token_ids())
        assert (ours - truth).norm() <= 1.5 * (pefts - truth).norm()


def test_each_row_of_a_mixed_batch_is_pefts_row(pair, dtype):
    wrapped, runtime = pair
    ids = token_ids(rows=len(ROWS))
    with runtime.route(ROWS):
        mixed = logits(runtime.model, ids)
    # A row of a batch is another matmul than a batch of one row: the unadapted model differs by as much.
    close = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    for row, spec in enumerate(ROWS):
        expected = peft_logits(wrapped, spec, ids[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], expected, rtol=close, atol=close)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_greedy_generation_is_pefts_token_for_token(pair, spec):
    wrapped, runtime = pair
    runtime.set_adapter(spec)
    peft_set(wrapped, spec)
    ids = token_ids()
    settings = dict(attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert torch.equal(runtime.model.generate(input_ids=ids, **settings), wrapped.generate(input_ids=ids, **settings))


def test_a_site_that_an_adapter_lacks_is_ones_where_peft_takes_it_as_zero(tmp_path):
    model = tiny_model()
    both = peft_model(model, "llama", "b")
    keys_only = peft_model(model, "llama", "k", target_modules=["k_proj"], feedforward_modules=[])
    runtime = ia3rt.patch(model)
    for wrapped in (both, keys_only):
        for folder in save_each(wrapped, tmp_path):
            runtime.load_adapter(folder)
    runtime.set_adapter({"b": 1.0, "k": 0.0})
    torch.testing.assert_close(logits(model, token_ids()), peft_logits(both, "b", token_ids()), rtol=1e-5, atol=1e-5)
    runtime.set_adapter(ia3rt.Mix(("b", "k"), (0.0, 1.0), "linear"))
    torch.testing.assert_close(
        logits(model, token_ids()), peft_logits(keys_only, "k", token_ids()), rtol=1e-5, atol=1e-5
    )

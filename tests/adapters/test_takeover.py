"""patch(peft_model): its IA³ adapters are taken over; whatever else it holds is refused and stays as it was."""

import peft
import pytest
import torch
from tiny import FAMILIES, logits, peft_model, tiny_model, token_ids

import ia3rt

IDS = token_ids()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_outputs_go_on_as_they_were(family):
    wrapped = peft_model(tiny_model(family), family)
    wrapped.base_model.set_adapter(["b", "d"])
    active = logits(wrapped, IDS)
    runtime = ia3rt.patch(wrapped)
    assert runtime.adapters == ["b", "c", "d"]
    assert runtime.active_adapters == ["b", "d"]
    assert torch.equal(logits(runtime.model, IDS), active)
    assert torch.equal(logits(wrapped, IDS), active), "the PeftModel still runs the model under it"
    assert not any("base_layer" in name for name, _ in runtime.model.named_modules())
    assert runtime.unpatch() is wrapped
    assert torch.equal(logits(wrapped, IDS), active)


def test_disabled_adapters_stay_disabled():
    wrapped = peft_model(tiny_model(), "llama")
    wrapped.base_model.disable_adapter_layers()
    base = logits(wrapped, IDS)
    runtime = ia3rt.patch(wrapped)
    assert runtime.active_adapters == []
    assert torch.equal(logits(runtime.model, IDS), base)


def test_a_taken_over_adapter_is_saved_with_its_config(tmp_path):
    runtime = ia3rt.patch(peft_model(tiny_model(), "llama"))
    runtime.save_adapter("c", tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert loaded.peft_config["default"].task_type == "CAUSAL_LM"
    runtime.set_adapter("c")
    assert torch.equal(logits(loaded, IDS), logits(runtime.model, IDS))


def _merged(wrapped):
    wrapped.merge_adapter()


def _diverged(wrapped):
    with torch.no_grad():
        next(p for name, p in wrapped.named_parameters() if "ia3_l.c" in name).fill_(float("nan"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _lora(), r"'default' is of type LORA: ia3rt takes over IA3 .* merge_and_unload\(\) makes it part of"),
        (lambda: _lora().base_model, r"'default' is of type LORA: .* merge_and_unload\(\)"),
        (
            lambda: _lora().get_base_model(),
            r"in a peft.tuners.lora.layer.Linear: .* merge_and_unload\(\) makes it part",
        ),
        (
            lambda: _prompt(),
            "'default' is of type PROMPT_TUNING: ia3rt takes over IA3 adapters only; patch a model wit",
        ),
        (lambda: _after(_merged), r"adapters \['b'\] are merged at .*: call unmerge_adapter"),
        (lambda: _after(_diverged), "'c' has a NaN or inf at model.layers.0"),
    ],
    ids=["lora", "lora's part", "lora's model", "prompt", "merged", "nan"],
)
def test_what_is_not_ia3_is_refused_and_stays_as_it_was(make, message):
    wrapped = make()
    modules = [(name, id(module), type(module)) for name, module in wrapped.named_modules()]
    attributes = [set(vars(module)) for module in wrapped.modules()]
    before = logits(wrapped, IDS)
    with pytest.raises(ValueError, match=message):
        ia3rt.patch(wrapped)
    assert [(name, id(module), type(module)) for name, module in wrapped.named_modules()] == modules
    assert [set(vars(module)) for module in wrapped.modules()] == attributes
    torch.testing.assert_close(logits(wrapped, IDS), before, equal_nan=True, rtol=0, atol=0)


def _lora():
    return peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"]))


def _prompt():
    return peft.get_peft_model(tiny_model(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def _after(change):
    wrapped = peft_model(tiny_model(), "llama")
    change(wrapped)
    return wrapped


@pytest.mark.parametrize("how", ["merge_and_unload", "unload"])
def test_what_the_error_says_of_another_type_leads_on(how):
    plain = getattr(_lora(), how)()
    before = logits(plain, IDS)
    assert ia3rt.patch(plain).active_adapters == []
    assert torch.equal(logits(plain, IDS), before)


def test_layers_that_peft_still_wraps_are_refused():
    wrapped = peft_model(tiny_model(), "llama")
    with pytest.raises(ValueError, match="PEFT wraps 'model.layers.0.self_attn.k_proj': pass the PeftModel itself"):
        ia3rt.patch(wrapped.get_base_model())

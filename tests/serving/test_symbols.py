"""The plugin says at once, and in a sentence, when vLLM is not as it knows it."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points

import pytest
import vllm
from vllm.lora import model_manager
from vllm.lora.layers import ColumnParallelLinearWithLoRA

from ia3rt.serving.vllm import symbols


def test_this_vllm_is_known() -> None:
    assert symbols.is_tested(vllm.__version__)
    symbols.check_symbols()


@pytest.mark.parametrize(
    ("version", "tested"),
    [
        *(("0.32.0", True), ("0.32.7+cpu", True), ("0.33.0", True)),
        *(("0.31.9", False), ("0.34.0", False), ("1.0", False), ("dev", False)),
    ],
)
def test_versions(version, tested) -> None:
    assert symbols.is_tested(version) == tested


def test_a_missing_name_is_told(monkeypatch) -> None:
    monkeypatch.delattr(model_manager.LoRAModelManager, "_set_adapter_mapping")
    with pytest.raises(symbols.ChangedVLLMError, match=r"LRUCacheLoRAModelManager\._set_adapter_mapping"):
        symbols.check_symbols()


def test_another_signature_is_told(monkeypatch) -> None:
    monkeypatch.setattr(ColumnParallelLinearWithLoRA, "slice_lora_b", lambda self, lora_b, rank: lora_b)
    with pytest.raises(
        symbols.ChangedVLLMError, match=r"slice_lora_b takes \(self, lora_b, rank\), not \(self, lora_b\)"
    ):
        symbols.check_symbols()


def test_what_instances_have_no_more_is_told(monkeypatch) -> None:
    class Changed:
        """A scheduler that calls its set of requests that fail something else."""

        def __init__(self) -> None:
            self.requests = self.kv_cache_manager = self.failing_reqs = None

        def reads(self) -> object:
            return self.encoder_cache_mismatch_reqs

    monkeypatch.setattr(symbols, "SYMBOLS", ())
    symbols.check_symbols()
    monkeypatch.setattr("vllm.v1.core.sched.scheduler.Scheduler", Changed)
    with pytest.raises(symbols.ChangedVLLMError, match=r"Scheduler has no attribute encoder_cache_mismatch_reqs"):
        symbols.check_symbols()


def test_vllm_finds_the_plugin_and_may_call_it_twice() -> None:
    (plugin,) = (entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "ia3rt")
    register = plugin.load()
    register()
    utils = importlib.import_module("vllm.lora.utils")
    classes = utils._all_lora_classes
    serving = importlib.import_module("vllm.entrypoints.serve.engine.serving").BaseServing
    check = serving._check_model
    register()
    assert utils._all_lora_classes is classes and serving._check_model is check

"""What the plugin needs of vLLM beyond its documented API, and the check that it is still there.

vLLM has no interface for another kind of adapter, so the plugin extends classes that vLLM may change at any time. It
then has to say so when it is loaded, and not serve something wrong.
"""

from __future__ import annotations

import importlib
import inspect
from typing import NamedTuple

TESTED = ((0, 32), (0, 33))
"""Versions of vLLM from the first (inclusive) to the second (exclusive) are those that the tests ran on."""


class Symbol(NamedTuple):
    """A name, and the parameters that it must take in this order, if it is called or overridden."""

    module: str
    name: str
    parameters: tuple[str, ...] | None = None


_ADD_REQUEST = ("self", "request_id", "prompt", "params", "arrival_time", "lora_request", "tokenization_kwargs")
SYMBOLS = (
    Symbol("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager._load_adapter", ("self", "lora_request")),
    Symbol("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager.add_adapter", ("self", "lora_request")),
    Symbol("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager._manager_cls"),
    Symbol("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager._apply_adapters", ("self", "lora_requests")),
    Symbol("vllm.v1.worker.lora_model_runner_mixin", "LRUCacheWorkerLoRAManager"),
    Symbol("vllm.v1.worker.worker_base", "WorkerWrapperBase.execute_model", ("self", "scheduler_output")),
    Symbol(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.update_from_output",
        ("self", "scheduler_output", "model_runner_output"),
    ),
    Symbol("vllm.v1.core.kv_cache_manager", "KVCacheManager.evict_blocks", ("self", "block_ids")),
    Symbol("vllm.v1.core.kv_cache_manager", "KVCacheManager.get_block_ids", ("self", "request_id")),
    Symbol("vllm.lora.model_manager", "DEFAULT_LANGUAGE_WRAPPER_KEY"),
    Symbol("vllm.lora.model_manager", "LRUCacheLoRAModelManager.activate_adapter", ("self", "lora_id")),
    Symbol("vllm.lora.model_manager", "LRUCacheLoRAModelManager.get_adapter", ("self", "adapter_id")),
    Symbol("vllm.lora.model_manager", "LRUCacheLoRAModelManager._create_merged_loras_inplace", ("self", "lora_model")),
    Symbol("vllm.lora.model_manager", "LRUCacheLoRAModelManager._set_adapter_mapping", ("self", "mapping")),
    Symbol(
        "vllm.lora.model_manager",
        "LRUCacheLoRAModelManager.create_dummy_lora",
        ("self", "lora_id", "rank", "embedding_modules"),
    ),
    Symbol("vllm.lora.layers", "LoRAMapping", ("index_mapping", "prompt_mapping", "is_prefill", "type")),
    Symbol("vllm.lora.layers.base_linear", "BaseLinearLayerWithLoRA.apply", ("self", "x", "bias")),
    Symbol("vllm.lora.layers.base_linear", "BaseLinearLayerWithLoRA._apply_lora_to_output", ("self", "x", "output")),
    Symbol(
        "vllm.lora.layers.base_linear",
        "BaseLinearLayerWithLoRA.create_lora_weights",
        ("self", "max_loras", "lora_config", "model_config"),
    ),
    Symbol("vllm.lora.layers", "ColumnParallelLinearWithLoRA.slice_lora_b", ("self", "lora_b")),
    Symbol("vllm.lora.layers", "MergedColumnParallelLinearWithLoRA.slice_lora_b", ("self", "lora_b")),
    Symbol("vllm.lora.layers", "MergedQKVParallelLinearWithLoRA.can_replace_layer"),
    Symbol("vllm.lora.layers", "QKVParallelLinearWithLoRA.slice_lora_b", ("self", "lora_b")),
    Symbol("vllm.lora.layers", "RowParallelLinearWithLoRA.slice_lora_a", ("self", "lora_a")),
    Symbol("vllm.lora.layers", "ReplicatedLinearWithLoRA.can_replace_layer"),
    Symbol("vllm.lora.utils", "_all_lora_classes"),
    Symbol("vllm.lora.utils", "get_adapter_absolute_path", ("lora_path",)),
    Symbol("vllm.lora.request", "LoRARequest"),
    Symbol("vllm.config", "ParallelConfig._api_process_rank"),
    Symbol("vllm.config", "ParallelConfig._api_process_count"),
    Symbol("vllm.exceptions", "LoRAAdapterNotFoundError"),
    Symbol("vllm.model_executor.layers.linear", "ColumnParallelLinear.forward"),
    Symbol("vllm.model_executor.layers.linear", "ReplicatedLinear.forward"),
    Symbol("vllm.model_executor.layers.linear", "RowParallelLinear.forward"),
    Symbol("vllm.model_executor.layers.linear", "UnquantizedLinearMethod"),
    Symbol("vllm.model_executor.layers.linear", "LinearMethodBase.apply", ("self", "layer", "x", "bias")),
    Symbol(
        "vllm.model_executor.layers.attention",
        "Attention.forward",
        ("self", "query", "key", "value", "output_shape", "output_dtype"),
    ),
    Symbol(
        "vllm.model_executor.layers.attention",
        "MLAAttention.forward",
        ("self", "q", "kv_c_normed", "k_pe", "output_shape", "q_dcp_replicated"),
    ),
    Symbol("vllm.model_executor.models.utils", "PPMissingLayer"),
    Symbol("vllm.v1.core.kv_cache_utils", "_gen_lora_extra_hash_keys", ("request",)),
    Symbol("vllm.entrypoints.serve", "create_error_response"),
    Symbol("vllm.entrypoints.serve.engine.serving", "BaseServing._check_model", ("self", "request")),
    Symbol(
        "vllm.entrypoints.serve.engine.serving",
        "BaseServing._maybe_get_adapters",
        ("self", "request", "supports_default_mm_loras"),
    ),
    Symbol(
        "vllm.entrypoints.openai.models.serving",
        "OpenAIServingModels.load_lora_adapter",
        ("self", "request", "base_model_name"),
    ),
    Symbol("vllm.entrypoints.openai.models.serving", "OpenAIServingModels.resolve_lora", ("self", "lora_name")),
    Symbol("vllm.entrypoints.openai.models.serving", "OpenAIServingModels.model_name", ("self", "lora_request")),
    Symbol("vllm.entrypoints.openai.models.serving", "OpenAIServingModels.show_available_models", ("self",)),
    Symbol("vllm.entrypoints.openai.models.serving", "OpenAIServingModels.unload_lora_adapter", ("self", "request")),
    Symbol("vllm.utils.counter", "AtomicCounter.inc", ("self", "num")),
    Symbol("vllm.v1.engine.output_processor", "RequestState"),
    Symbol(
        "vllm.entrypoints.openai.models.serving",
        "OpenAIServingModels._check_load_lora_adapter_request",
        ("self", "request"),
    ),
    Symbol("vllm.entrypoints.serve.middleware.authenticate", "GUARDED_PREFIX"),
    Symbol("vllm.entrypoints.launchers.app", "init_entrypoints_middleware", ("args", "app", "supported_tasks")),
    Symbol("vllm.entrypoints.pooling.base.serving", "PoolingBaseServing._check_model", ("self", "request")),
    Symbol("vllm.entrypoints.speech_to_text.realtime.connection", "RealtimeConnection._check_model", ("self", "model")),
    Symbol("vllm.entrypoints.serve.exception_handling.handlers.validation", "_MAX_ERROR_INPUT_CHARS"),
    Symbol("vllm.entrypoints.serve.exception_handling.utils", "sanitize_message", ("message",)),
    Symbol("vllm.exceptions", "GracefulHTTPError", ("message", "http_status")),
    Symbol("vllm.exceptions", "VLLMClientError"),
    Symbol("vllm.exceptions", "VLLMNotFoundError"),
    Symbol("vllm.v1.engine.async_llm", "AsyncLLM.add_lora", ("self", "lora_request")),
    Symbol("vllm.v1.engine.async_llm", "AsyncLLM.remove_lora", ("self", "lora_id")),
    Symbol(
        "vllm.v1.engine.async_llm",
        "AsyncLLM.add_request",
        (
            *_ADD_REQUEST,
            "trace_headers",
            "priority",
            "data_parallel_rank",
            "session_id",
            "prompt_text",
            "reasoning_ended",
            "reasoning_parser_kwargs",
            "kv_hints",
        ),
    ),
    Symbol("vllm.v1.engine.exceptions", "EngineDeadError"),
    Symbol("vllm.v1.engine.llm_engine", "LLMEngine.add_lora", ("self", "lora_request")),
    Symbol("vllm.v1.engine.llm_engine", "LLMEngine.remove_lora", ("self", "lora_id")),
    Symbol(
        "vllm.v1.engine.llm_engine",
        "LLMEngine.add_request",
        (*_ADD_REQUEST, "trace_headers", "priority", "session_id", "prompt_text", "kv_hints"),
    ),
    Symbol(
        "vllm.entrypoints.serve.middleware.authenticate",
        "AuthenticationMiddleware.__call__",
        ("self", "scope", "receive", "send"),
    ),
    Symbol(
        "vllm.plugins.lora_resolvers.filesystem_resolver",
        "FilesystemResolver.resolve_lora",
        ("self", "base_model_name", "lora_name"),
    ),
    Symbol(
        "vllm.plugins.lora_resolvers.filesystem_resolver",
        "FilesystemResolver._get_lora_req_from_path",
        ("self", "lora_name", "lora_path", "base_model_name"),
    ),
)


class ChangedVLLMError(ImportError):
    """The installed vLLM is not as the plugin knows it."""


def check_symbols() -> None:
    """Looks every name up.

    Raises:
        ChangedVLLMError: with a sentence that says which one has changed, and which versions were tested.
    """
    for symbol in SYMBOLS:
        where = f"{symbol.module}.{symbol.name}"
        try:
            found = importlib.import_module(symbol.module)
            for part in symbol.name.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            raise ChangedVLLMError(f"ia3rt cannot serve IA³ adapters in {_version()}: it has no {where}") from error
        if symbol.parameters is not None:
            given = tuple(inspect.signature(found).parameters)  # type: ignore[arg-type]
            if given != symbol.parameters:
                raise ChangedVLLMError(
                    f"ia3rt cannot serve IA³ adapters in {_version()}: {where} takes ({', '.join(given)}), not "
                    f"({', '.join(symbol.parameters)})"
                )


def is_tested(version: str) -> bool:
    """Whether a version of vLLM, such as "0.32.0+cpu", is one that the tests ran on."""
    numbers = version.split("+")[0].split(".")[:2]
    return all(part.isdigit() for part in numbers) and TESTED[0] <= tuple(map(int, numbers)) < TESTED[1]


def _version() -> str:
    import vllm

    first, last = (".".join(map(str, version)) for version in TESTED)
    return f"vLLM {vllm.__version__} (tested: from {first} to before {last})"

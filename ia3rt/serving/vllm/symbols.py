"""What the plugin needs of vLLM beyond its documented API, and the check that it is still there.

vLLM has no interface for another kind of adapter, so the plugin extends classes that vLLM may change at any time. It
then has to say so when it is loaded, and not serve something wrong.
"""

from __future__ import annotations

import dis
import importlib
import inspect
from types import CodeType
from typing import NamedTuple

TESTED = ((0, 32), (0, 34))
"""Versions of vLLM from the first (inclusive) to the second (exclusive) are those that the tests ran on: 0.32 as it is
published for CPUs, and the Python of 0.33 on the compiled operations of that."""


class Symbol(NamedTuple):
    """A name, and the parameters that it must take in this order, if it is called or overridden."""

    module: str
    name: str
    parameters: tuple[str, ...] | None = None


class Instances(NamedTuple):
    """A class, and what its instances have that is read or written here."""

    module: str
    name: str
    attributes: tuple[str, ...]


_ADD_REQUEST = ("self", "request_id", "prompt", "params", "arrival_time", "lora_request", "tokenization_kwargs")
SYMBOLS = (
    Symbol("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager._load_adapter", ("self", "lora_request")),
    Symbol("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager.add_adapter", ("self", "lora_request")),
    Symbol("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager._manager_cls"),
    Symbol("vllm.lora.worker_manager", "WorkerLoRAManager.set_active_adapters", ("self", "requests", "mapping")),
    Symbol("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager._apply_adapters", ("self", "lora_requests")),
    Symbol("vllm.v1.worker.lora_model_runner_mixin", "LRUCacheWorkerLoRAManager"),
    Symbol("vllm.v1.worker.worker_base", "WorkerWrapperBase.execute_model", ("self", "scheduler_output")),
    Symbol("vllm.v1.worker.worker_base", "WorkerBase.sample_tokens", ("self", "grammar_output")),
    Symbol("vllm.v1.outputs", "AsyncModelRunnerOutput.get_output", ("self",)),
    Symbol(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner.execute_model",
        ("self", "scheduler_output", "intermediate_tensors"),
    ),
    Symbol(
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner.execute_model",
        (
            *("self", "scheduler_output", "intermediate_tensors", "dummy_run", "skip_attn_for_dummy_run"),
            *("is_profile", "context_len", "valid_dummy_state_slots", "randomize_inputs"),
        ),
    ),
    Symbol("vllm.sequence", "IntermediateTensors"),
    Symbol(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.update_from_output",
        ("self", "scheduler_output", "model_runner_output"),
    ),
    Symbol("vllm.v1.core.kv_cache_manager", "KVCacheManager.evict_blocks", ("self", "block_ids")),
    Symbol("vllm.v1.core.kv_cache_manager", "KVCacheManager.get_block_ids", ("self", "request_id")),
    Symbol(
        "vllm.lora.lora_model", "LoRAModel", ("lora_model_id", "rank", "loras", "is_3d_lora_weight", "modules_to_save")
    ),
    Symbol("vllm.lora.model_manager", "DEFAULT_LANGUAGE_WRAPPER_KEY"),
    Symbol("vllm.lora.model_manager", "LRUCacheLoRAModelManager._deactivate_adapter", ("self", "lora_id")),
    Symbol("vllm.lora.model_manager", "LRUCacheLoRAModelManager.add_adapter", ("self", "lora")),
    Symbol("vllm.lora.model_manager", "LRUCacheLoRAModelManager.remove_adapter", ("self", "adapter_id")),
    Symbol("vllm.lora.model_manager", "LRUCacheLoRAModelManager.remove_all_adapters", ("self",)),
    Symbol("vllm.lora.model_manager", "LRUCacheLoRAModelManager.remove_oldest_adapter", ("self",)),
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
    Symbol("vllm.lora.layers", "LoRAMappingType.LANGUAGE"),
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
    Symbol("vllm.model_executor.layers.attention", "CrossAttention"),
    Symbol("vllm.model_executor.models.utils", "PPMissingLayer"),
    Symbol("vllm.forward_context", "get_forward_context", ()),
    Symbol("vllm.forward_context", "is_forward_context_available", ()),
    Symbol("vllm.v1.core.kv_cache_utils", "_gen_lora_extra_hash_keys", ("request",)),
    Symbol("vllm.model_executor.models.utils", "WeightsMapper._map_name", ("self", "key")),
    Symbol("vllm.model_executor.models.utils", "WeightsMapper.get_rename_mapper", ("self",)),
    Symbol("vllm.entrypoints.serve", "create_error_response", ("message", "err_type", "status_code", "param")),
    Symbol("vllm.entrypoints.serve.engine.serving", "BaseServing._check_model", ("self", "request")),
    Symbol("vllm.entrypoints.serve.engine.serving", "BaseServing._is_model_supported", ("self", "model_name")),
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
    Symbol("vllm.envs", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
    Symbol("vllm.envs", "VLLM_BATCH_INVARIANT"),
    Symbol("vllm.envs", "VLLM_CACHE_ROOT"),
    Symbol("vllm.envs", "VLLM_USE_MODELSCOPE"),
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


INSTANCES = (
    Instances(
        "vllm.v1.core.sched.scheduler", "Scheduler", ("encoder_cache_mismatch_reqs", "kv_cache_manager", "requests")
    ),
    Instances(
        "vllm.v1.outputs",
        "ModelRunnerOutput",
        (
            *("req_ids", "req_id_to_index", "sampled_token_ids", "pooler_output"),
            *("prompt_logprobs_dict", "prompt_token_id_logprobs_dict"),
        ),
    ),
    Instances("vllm.v1.core.block_pool", "BlockPool", ("num_gpu_blocks",)),
    Instances("vllm.v1.core.kv_cache_manager", "KVCacheManager", ("block_pool",)),
    Instances("vllm.v1.request", "Request", ("num_preemptions",)),
    Instances("vllm.model_executor.layers.attention", "Attention", ("kv_sharing_target_layer_name",)),
    Instances("vllm.model_executor.layers.attention", "MLAAttention", ("kv_b_proj",)),
    Instances("vllm.model_executor.models.interfaces", "SupportsMultiModal", ("_tower_model_names",)),
    Instances("vllm.forward_context", "ForwardContext", ("batch_descriptor",)),
    Instances("vllm.config", "ParallelConfig", ("prefill_context_parallel_size", "use_ubatching")),
    Instances("vllm.config", "CacheConfig", ("kv_sharing_fast_prefill",)),
    Instances("vllm.v1.engine.output_processor", "RequestState", ("lora_name", "lora_request")),
    Instances(
        "vllm.lora.model_manager",
        "LRUCacheLoRAModelManager",
        (
            *("_registered_adapters", "lora_index_to_id", "lora_slots", "capacity", "modules", "packed_modules"),
            *("punica_wrapper_mapping", "mm_mapping", "supports_mm", "max_num_batched_tokens", "model", "device"),
            *("is_pooling_model", "_last_mapping"),
        ),
    ),
    Instances(
        "vllm.lora.layers",
        "MergedQKVParallelLinearWithLoRA",
        ("base_layer", "device", "input_size", "n_slices", "output_slices", "punica_wrapper", "tp_size"),
    ),
    Instances("vllm.lora.layers", "MergedColumnParallelLinearWithLoRA", ("output_sizes",)),
    Instances("vllm.lora.layers", "QKVParallelLinearWithLoRA", ("kv_proj_total_size", "q_proj_total_size")),
    Instances(
        "vllm.model_executor.layers.linear",
        "QKVParallelLinear",
        (
            *("bias", "head_size", "input_size", "output_size", "quant_method", "skip_bias_add"),
            *("total_num_heads", "total_num_kv_heads"),
        ),
    ),
    Instances(
        "vllm.entrypoints.openai.models.serving",
        "OpenAIServingModels",
        (
            *("engine_client", "lora_id_counter", "lora_requests", "lora_resolver_lock", "lora_resolvers"),
            *("model_config", "static_lora_modules"),
        ),
    ),
    Instances("vllm.plugins.lora_resolvers.filesystem_resolver", "FilesystemResolver", ("lora_cache_dir",)),
)


class ChangedVLLMError(ImportError):
    """The installed vLLM is not as the plugin knows it."""


def check_symbols() -> None:
    """Looks every name up.

    Raises:
        ChangedVLLMError: with a sentence that says which one has changed, and which versions were tested.
    """
    for symbol in SYMBOLS:
        found = _find(symbol.module, symbol.name)
        if symbol.parameters is not None:
            given = tuple(inspect.signature(found).parameters)  # type: ignore[arg-type]
            if given != symbol.parameters:
                raise ChangedVLLMError(
                    f"ia3rt cannot serve IA³ adapters in {_version()}: {symbol.module}.{symbol.name} takes "
                    f"({', '.join(given)}), not ({', '.join(symbol.parameters)})"
                )
    for instances in INSTANCES:
        kind = _find(instances.module, instances.name)
        for attribute in instances.attributes:
            if not _has(kind, attribute):  # type: ignore[arg-type]
                raise ChangedVLLMError(
                    f"ia3rt cannot serve IA³ adapters in {_version()}: {instances.module}.{instances.name} has no "
                    f"attribute {attribute}"
                )


def _find(module: str, name: str) -> object:
    try:
        found: object = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ChangedVLLMError(f"ia3rt cannot serve IA³ adapters in {_version()}: it has no {module}.{name}") from error
    return found


def _has(kind: type, attribute: str) -> bool:
    """Whether instances have an attribute: the class's, a dataclass's field, or one that a method sets."""
    if hasattr(kind, attribute) or attribute in getattr(kind, "__dataclass_fields__", {}):
        return True
    methods = (inspect.unwrap(each) for base in kind.__mro__ for each in vars(base).values() if callable(each))
    return any(_sets(method.__code__, attribute) for method in methods if hasattr(method, "__code__"))


def _sets(code: CodeType, attribute: str) -> bool:
    if attribute not in code.co_names:
        return False
    return any(each.opname == "STORE_ATTR" and each.argval == attribute for each in dis.get_instructions(code))


def is_tested(version: str) -> bool:
    """Whether a version of vLLM, such as "0.32.0+cpu", is one that the tests ran on."""
    numbers = version.split("+")[0].split(".")[:2]
    return all(part.isdigit() for part in numbers) and TESTED[0] <= tuple(map(int, numbers)) < TESTED[1]


def _version() -> str:
    import vllm

    first, last = (".".join(map(str, version)) for version in TESTED)
    return f"vLLM {vllm.__version__} (tested: from {first} to before {last})"

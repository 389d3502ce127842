"""Puts our classes where vLLM looks for its own."""

from __future__ import annotations

import functools

import vllm
from vllm.logger import init_logger
from vllm.lora import utils
from vllm.v1.worker import lora_model_runner_mixin

from ia3rt.serving.settings import is_key_for_all
from ia3rt.serving.vllm import (
    bodies,
    doors,
    failing,
    listing,
    loads,
    metrics,
    requested,
    resolvers,
    served,
    stages,
    symbols,
    told_engine,
)
from ia3rt.serving.vllm.layers import CLASSES
from ia3rt.serving.vllm.worker_manager import IA3WorkerManager

logger = init_logger(f"vllm.{__name__}")  # vLLM shows what is under its own name


@functools.cache
def register_once() -> None:
    """Rebinds vLLM's classes and methods to ours, which extend them."""
    if not symbols.is_tested(vllm.__version__):
        logger.warning("ia3rt's IA³ plugin was not tested on vLLM %s; its names are all there.", vllm.__version__)
    utils._all_lora_classes = tuple(CLASSES.get(known, known) for known in utils._all_lora_classes)
    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = IA3WorkerManager
    for each in (metrics, failing, stages, told_engine, served, loads, requested, listing, bodies, resolvers):
        each.install()
    if is_key_for_all():
        doors.install()

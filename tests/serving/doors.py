"""vLLM's own doors for loading adapters, and what stands behind them but the engine, in this process."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace

import httpx
from fastapi import FastAPI
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.entrypoints.serve.lora.api_router import attach_router

from ia3rt.serving.vllm.source import Source


class Engine:
    """Reads what it is told to, as a worker does, and refuses `wide` vectors, as a model of that width would.

    Attributes:
        loaded: the requests that it took.
        asked: all that it was given.
    """

    def __init__(self, model: str) -> None:
        self.model_config = SimpleNamespace(model=model, max_model_len=64, dtype="torch.float32")
        self.renderer = self.input_processor = None
        self.errored = False
        parallel = SimpleNamespace(_api_process_rank=0, _api_process_count=1)
        self.vllm_config = SimpleNamespace(parallel_config=parallel)
        self.loaded: list[object] = []
        self.asked: list[object] = []

    async def add_lora(self, request) -> bool:
        self.asked.append(request)
        source = Source.of(request.lora_path, request.lora_name)
        vectors = {} if source is None else source.vectors()
        if any(site.width != 4 for site in vectors):
            raise ValueError(f"adapter {request.lora_name!r} cannot be served: the served model's is 4 wide")
        self.loaded.append(request)
        return True

    async def collective_rpc(self, name: str) -> list[dict[str, float]]:
        return [{"slots": 1, "resident": 0, "loads": 0, "load_seconds": 0, "evictions": 0}]


class Doors:
    """A server without an engine."""

    def __init__(self, model: str = "base") -> None:
        self.engine = Engine(model)
        self.models = OpenAIServingModels(self.engine, [BaseModelPath(name="base", model_path=model)])
        self.app = FastAPI()
        self.app.state.openai_serving_models = self.models
        attach_router(self.app)

    def load(self, name: str, path: Path | str, **more: object) -> httpx.Response:
        return asyncio.run(self._post({"lora_name": name, "lora_path": str(path), **more}))

    async def _post(self, body: dict[str, object], seconds: float = 30) -> httpx.Response:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            headers = {"Content-Type": "application/json"}
            posted = client.post("/v1/load_lora_adapter", content=json.dumps(body), headers=headers)
            return await asyncio.wait_for(posted, seconds)

    def unload(self, name: str) -> None:
        del self.models.lora_requests[name]

    def check(self, model: str) -> tuple[int, str]:
        """The status and the sentence that a request for `model` is answered with before it comes to the engine."""
        serving = BaseServing.__new__(BaseServing)
        serving.models, serving.model_config, serving.request_logger = self.models, self.engine.model_config, None
        request = SimpleNamespace(model=model, model_extra=None)
        refused = asyncio.run(serving._check_model(request))
        return (200, "") if refused is None else (refused.error.code, refused.error.message)

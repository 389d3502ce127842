"""Asks vLLM's `LLM` or `AsyncLLM`, in a process of its own, one thing after another: offline_engine.py KIND ASKED.

ASKED is JSON: the model, the adapters by name, and what to ask for: a list of [how the request is made, its arguments],
where `user` is LoRARequest(name, number, path), and `named` our lora_request(model, adapters). The answers are printed
as one line of JSON: tokens, or an exception's type and sentence.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from vllm import LLM, AsyncEngineArgs, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM

from ia3rt.serving.vllm import lora_request

MARK = "answers: "
"""What the line of answers begins with, among all that vLLM says."""
OPTIONS: dict[str, Any] = dict(enable_lora=True, max_lora_rank=8, max_loras=2, max_cpu_loras=4, dtype="float32")
OPTIONS |= dict(max_model_len=128, enforce_eager=True)
PARAMETERS = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


def main(kind: str, asked: dict[str, Any]) -> None:
    prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]

    def made(how: str | None, *given: Any) -> LoRARequest | None:
        if how is None:
            return None
        return LoRARequest(*given) if how == "user" else lora_request(*given, asked["adapters"])

    def answers(ask: Callable[[LoRARequest | None], list[list[int]]]) -> list[Any]:
        found: list[Any] = []
        for how, *given in asked["requests"]:
            try:
                found.append(ask(made(how, *given)))
            except Exception as error:
                found.append([[base.__name__ for base in type(error).__mro__], str(error)])
        return found

    if kind == "LLM":
        llm = LLM(asked["model"], **OPTIONS)

        def ask(request: LoRARequest | None) -> list[list[int]]:
            done = llm.generate(prompts, PARAMETERS, lora_request=request, use_tqdm=False)
            return [list(output.outputs[0].token_ids) for output in done]

        print(MARK + json.dumps(answers(ask)), flush=True)
        return

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(asked["model"], **OPTIONS))
    loop = asyncio.new_event_loop()
    numbers = iter(range(10**6))

    async def one(prompt: Any, request: LoRARequest | None) -> list[int]:
        async for output in engine.generate(prompt, PARAMETERS, str(next(numbers)), lora_request=request):
            tokens = list(output.outputs[0].token_ids)
        return tokens

    async def both(request: LoRARequest | None) -> list[list[int]]:
        return await asyncio.gather(*(one(prompt, request) for prompt in prompts))

    print(MARK + json.dumps(answers(lambda request: loop.run_until_complete(both(request)))), flush=True)
    engine.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)

"""The other end of adapterhub.py: run by AdapterHub's own Python, which knows nothing of ia3rt.

A JSON message a line comes in at stdin, and an answer to each goes out at stdout.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what else is printed must not come between the answers
sys.path.pop(0)  # the folder of this file: it holds modules that are called as packages are

import adapters  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM, DynamicCache  # noqa: E402

LLAMA = "only models of Llama's shape are compared with AdapterHub"


class Worker:
    """The model, and what `run` does."""

    def __init__(self, folder: str, device: str, dtype: str) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self.model: Any = model.to(device).eval()
        self.device = device
        self.todo: Callable[[int], Any] = self.nothing
        self.checked: Callable[[int], Any] = self.nothing
        adapters.init(self.model)

    def nothing(self, turn: int) -> None:
        return

    def start(self, threads: int) -> None:
        torch.set_num_threads(threads)

    def add(self, name: str, folder: str) -> None:
        """An IA³ adapter with the vectors of a PEFT checkpoint.

        Its Llama's "intermediate" is down_proj's output, which IA³ does not scale; its "output" is up_proj's.
        """
        config = adapters.IA3Config(intermediate_lora=False, output_lora=True)
        self.model.add_adapter(name, config=config)
        modules = dict(self.model.named_modules())
        for key, vector in load_file(Path(folder) / "adapter_model.safetensors").items():
            path = key.removeprefix("base_model.model.").removesuffix(".ia3_l")
            is_input = vector.dim() > 1 and vector.shape[0] == 1
            if is_input and not path.endswith(".down_proj"):
                raise NotImplementedError(LLAMA)
            path = path.replace(".down_proj", ".up_proj") if is_input else path
            loras = getattr(modules[path], "loras", None)
            if loras is None or name not in loras:
                raise NotImplementedError(LLAMA)
            loras[name].lora_B.data = vector.reshape(-1, 1).to(self.device, torch.float32)

    def prefill(self, ids: list[list[int]], worn: list[str]) -> None:
        self.model.set_active_adapters(worn[0])
        tokens = torch.tensor(ids, device=self.device)
        self.todo = self.checked = lambda _: self.model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits

    def decode(self, ids: list[list[int]], worn: list[str]) -> None:
        self.model.set_active_adapters(worn[0])
        tokens = torch.tensor(ids, device=self.device)
        cache: Any = DynamicCache()
        self.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        prompts = [(layer.keys, layer.values) for layer in cache.layers]
        last = tokens[:, -1:].contiguous()

        def step(_: int) -> Any:
            for layer, (keys, values) in zip(cache.layers, prompts, strict=True):
                layer.keys, layer.values = keys, values
            return self.model(input_ids=last, past_key_values=cache, use_cache=True).logits

        self.todo = self.checked = step

    def generate(self, ids: list[list[int]], worn: list[str], tokens: int) -> None:
        self.decode(ids, worn)
        prompts = torch.tensor(ids, device=self.device)
        options = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        self.todo = lambda _: self.model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), **options)

    def switch(self, worn: list[str], ids: list[list[int]] | None) -> None:
        tokens = None if ids is None else torch.tensor(ids, device=self.device)

        def switched(turn: int) -> Any:
            self.model.set_active_adapters(worn[turn % len(worn)])
            if tokens is not None:
                return self.model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits

        self.todo = self.checked = switched

    def run(self, turn: int) -> dict[str, float]:
        self.wait()
        start = time.perf_counter()
        self.todo(turn)
        self.wait()
        return {"seconds": time.perf_counter() - start}

    def result(self, file: str) -> None:
        torch.save(self.checked(1).float().cpu(), file)

    def wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()


def main() -> None:
    worker = Worker(*sys.argv[1:])
    for line in sys.stdin:
        message = json.loads(line)
        try:
            with torch.inference_mode(message["op"] != "add"):
                answer = getattr(worker, message.pop("op"))(**message) or {}
        except NotImplementedError as error:
            answer = {"left_out": str(error)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=_answers, flush=True)


main()

"""The other end of adapterhub.py: run by AdapterHub's own Python, which knows nothing of ia3rt.

A JSON message a line comes in at stdin, and an answer to each goes out at stdout.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what else is printed must not come between the answers
sys.path.pop(0)  # the folder of this file: it holds modules that are called as packages are

import adapters  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

_spec = importlib.util.spec_from_file_location("subject", Path(__file__).with_name("subject.py"))
assert _spec is not None and _spec.loader is not None
_subject: Any = importlib.util.module_from_spec(_spec)
sys.modules["subject"] = _subject
_spec.loader.exec_module(_subject)

LLAMA = "only models of Llama's shape are compared with AdapterHub"


class Worker(_subject.Subject):  # type: ignore[misc]
    """AdapterHub's model; `way` is what `run` and `result` are about."""

    def __init__(self, folder: str, device: str, dtype: str) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        super().__init__(model.to(device).eval())
        self.device = device
        self.way: Any = None
        adapters.init(self.model)

    def wear(self, names: Sequence[str]) -> None:
        """set_active_adapters."""
        self.model.set_active_adapters(names[0])

    def start(self, threads: int) -> None:
        torch.set_num_threads(threads)

    def hold(self, name: str, folder: str) -> None:
        """Adds an IA³ adapter with the vectors of a PEFT checkpoint.

        Its Llama's "intermediate" is down_proj's output, which IA³ does not scale; its "output" is up_proj's.
        """
        config = adapters.IA3Config(intermediate_lora=False, output_lora=True)
        self.model.add_adapter(name, config=config)
        modules = dict(self.model.named_modules())
        for key, vector in load_file(Path(folder) / "adapter_model.safetensors").items():
            path = key.removeprefix("base_model.model.").removesuffix(".ia3_l")
            is_input = vector.dim() > 1 and vector.shape[0] == 1
            if is_input and not path.endswith(".down_proj"):
                raise _subject.LeftOut(LLAMA)
            path = path.replace(".down_proj", ".up_proj") if is_input else path
            loras = getattr(modules[path], "loras", None)
            if loras is None or name not in loras:
                raise _subject.LeftOut(LLAMA)
            loras[name].lora_B.data = vector.reshape(-1, 1).to(self.device, torch.float32)

    def make(self, what: str, **message: Any) -> None:
        """Makes a way; prompts come as lists."""
        tokens = {
            name: torch.tensor(message[name], device=self.device) for name in ("ids", "then") if message.get(name)
        }
        self.way = getattr(self, what)(**{**message, **tokens})

    def run(self, turn: int) -> dict[str, float]:
        wait: Callable[[], object] = torch.cuda.synchronize if self.device.startswith("cuda") else lambda: None
        wait()
        start = time.perf_counter()
        self.way.run(turn)
        wait()
        return {"seconds": time.perf_counter() - start}

    def result(self, file: str) -> None:
        torch.save(self.way.result().float().cpu(), file)


def main() -> None:
    worker = Worker(*sys.argv[1:])
    for line in sys.stdin:
        message = json.loads(line)
        try:
            answer = getattr(worker, message.pop("op"))(**message) or {}
        except _subject.LeftOut as error:
            answer = {"left_out": str(error)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=_answers, flush=True)


main()

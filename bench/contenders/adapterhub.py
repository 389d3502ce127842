"""AdapterHub, which pins another transformers, and so runs from an environment of its own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ia3rt.bench.contenders.subject import LeftOut, Subject, Way
from ia3rt.bench.interleaved import Seconds
from ia3rt.bench.workshop import Workshop

MOST = 100  # as for PEFT
WORKER = Path(__file__).with_name("adapterhub_worker.py")
NOTE = "in a process of its own, which takes its time itself; l_ff is put at up_proj's output, where it is the same"


class AdapterHub(Subject):  # type: ignore[misc]
    """A worker in AdapterHub's environment; a message a line to and fro.

    Args:
        workshop: whose model and adapters it takes.
        names: the adapters.
        python: of its environment.
    """

    does_no_more = "it is timed in forwards, generation and switching only"

    def __init__(self, workshop: Workshop, names: Sequence[str], python: Path) -> None:
        super().__init__(None)
        settings = workshop.settings
        self._results = Path(workshop.folder.name) / "adapterhub.pt"
        self._worker = subprocess.Popen(
            [python, WORKER, workshop.saved_model(), str(settings.device), str(settings.dtype).removeprefix("torch.")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            self._ask(op="start", threads=torch.get_num_threads())
            for name in names:
                self._ask(op="hold", name=name, folder=str(workshop.adapters.folder(name)))
        except BaseException:
            self.close()
            raise

    def prefill(self, ids: Tensor, worn: Sequence[str]) -> Way:
        """A forward."""
        return self._way("prefill", worn, ids=ids)

    def decode(self, ids: Tensor, worn: Sequence[str]) -> Way:
        """A step."""
        return self._way("decode", worn, ids=ids)

    def generate(self, ids: Tensor, worn: Sequence[str], tokens: int, static: bool = False) -> Way:
        """generate(), as its own transformers does it by default."""
        if static:
            raise LeftOut("it is not timed with a static cache: its transformers is another")
        return self._way("generate", worn, ids=ids, tokens=tokens)

    def switch(self, mixes: Sequence[Sequence[str]], then: Tensor | None = None, after: Tensor | None = None) -> Way:
        """set_active_adapters."""
        if after is not None:
            raise LeftOut("it is in another process, where nothing comes before what is timed")
        return self._way("switch", *mixes, mixes=mixes, then=then)

    def close(self) -> None:
        """Ends the worker."""
        assert self._worker.stdin is not None
        self._worker.stdin.close()
        self._worker.wait(timeout=60)

    def _way(self, what: str, *worn: Sequence[str], **message: Any) -> Way:
        if any(len(mix) != 1 for mix in worn):
            raise LeftOut("its stacks of IA³ adapters are not compared")
        plain = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in message.items()}
        if what != "switch":
            plain["worn"] = worn[0]
        self._ask(op="make", what=what, **plain)

        def run(turn: int) -> Seconds:
            return Seconds(self._ask(op="run", turn=turn)["seconds"])

        def result() -> Tensor:
            self._ask(op="result", file=str(self._results))
            tensor: Tensor = torch.load(self._results, weights_only=True)
            return tensor

        has_result = what != "switch" or message["then"] is not None
        return Way(run, result if has_result else None, note=NOTE)

    def _ask(self, **message: Any) -> dict[str, Any]:
        assert self._worker.stdin is not None and self._worker.stdout is not None
        try:
            self._worker.stdin.write(json.dumps(message) + "\n")
            self._worker.stdin.flush()
            line = self._worker.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError("AdapterHub's worker ended: does its environment hold the packages adapters and torch?")
        answer: dict[str, Any] = json.loads(line)
        if "left_out" in answer:
            raise LeftOut(answer["left_out"])
        if "error" in answer:
            raise RuntimeError(f"AdapterHub: {answer['error']}")
        return answer


def subject(workshop: Workshop, names: Sequence[str]) -> AdapterHub:
    """A worker with these adapters."""
    python = workshop.settings.adapterhub_python
    if python is None:
        raise LeftOut("it pins another transformers: give its own environment's Python with --adapterhub-python")
    if len(names) > MOST:
        raise LeftOut(f"it would add {len(names):,} adapters for minutes: it is timed with up to {MOST}")
    return AdapterHub(workshop, names, python)

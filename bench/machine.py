"""The machine, and the versions of what ran on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

import ia3rt

PACKAGES = ("torch", "transformers", "peft", "triton", "numpy")


def machine() -> dict[str, Any]:
    """The processor, the memory, the devices, and how busy it is now."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory("MemTotal"),
        "platform": platform.platform(),
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "torch_threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def versions() -> dict[str, str | None]:
    """The versions of Python, ia3rt and the packages that it is measured with; None where one is not installed."""
    return {
        "python": platform.python_version(),
        "ia3rt": ia3rt.__version__,
        **{name: _version(name) for name in PACKAGES},
    }


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device; None where the system does not say."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _memory("MemAvailable")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory(name: str) -> int | None:
    for line in _lines("/proc/meminfo"):
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    return None


def _lines(file: str) -> list[str]:
    try:
        return Path(file).read_text().splitlines()
    except OSError:  # not Linux
        return []

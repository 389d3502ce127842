"""Devices for machines that have none: memory:0 and memory:1, as device.cpp says."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils import cpp_extension

_SOURCE = Path(__file__).with_name("device.cpp")
NAMES = "memory:0", "memory:1"


def compiler() -> str | None:
    """What can compile it; None where nothing can."""
    return shutil.which(os.environ.get("CXX", "c++"))


def build(folder: Path) -> Path:
    """Compiles device.cpp, and gives what `use` takes."""
    library = folder / "devices_of_memory.so"
    libraries = Path(torch.__file__).parent / "lib"
    command = [compiler(), str(_SOURCE), "-o", str(library), "-shared", "-fPIC", "-std=c++20", "-O0", "-w"]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    command += [f"-I{path}" for path in cpp_extension.include_paths()]
    command += [f"-L{libraries}", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True, timeout=300)
    return library


def use(library: Path) -> None:
    """Lets this process have the devices. There is no way back: torch has room for one device from outside."""
    torch.utils.rename_privateuse1_backend("memory")
    torch.ops.load_library(str(library))
    library_of_c = ctypes.CDLL(str(library))
    torch._register_device_module("memory", _module(library_of_c.memory_current, library_of_c.memory_set_current))


def _module(current: Any, set_current: Any) -> ModuleType:
    """What torch and accelerate ask of a device, as torch.cuda."""

    class device:  # noqa: N801  (as torch.cuda.device)
        def __init__(self, device: Any) -> None:
            self._index = device if isinstance(device, int) else torch.device(device).index or 0

        def __enter__(self) -> None:
            self._before = current()
            set_current(self._index)

        def __exit__(self, *_: object) -> None:
            set_current(self._before)

    module = ModuleType("torch.memory")
    given: dict[str, Any] = dict(
        device=device,
        current_device=current,
        set_device=lambda which: set_current(which if isinstance(which, int) else torch.device(which).index or 0),
        device_count=lambda: len(NAMES),
        is_available=lambda: True,
        is_initialized=lambda: True,
        _is_in_bad_fork=lambda: False,
        synchronize=lambda *_: None,
        empty_cache=lambda: None,
        manual_seed=lambda _: None,
        manual_seed_all=lambda _: None,
        get_rng_state=lambda *_: torch.get_rng_state(),
        set_rng_state=lambda state, *_: torch.set_rng_state(state),
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
    )
    vars(module).update(given)
    return module

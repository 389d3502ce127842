"""Makes Triton build for an architecture what launchers launch, and stop there, or where the launch would leave Python.

The launchers run as they are, on tensors without data or on the CPU, and only Triton's driver is another. So arguments,
their specialisation and options are the shipped ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from ia3rt.kernels import configs

PROCESSORS = 132
"""An H100's; launchers ask for it to split sums."""


class _Driver:
    """As much of a Triton driver as a launch asks before it has its code."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _Device(_Driver):
    """And as much as it asks after that: everything but the call that launches."""

    def __init__(self, target: GPUTarget, launched: Callable[..., None]) -> None:
        super().__init__(target)
        from triton.backends.nvidia import driver

        self.launcher_cls = driver.CudaLauncher
        self.utils = _Utils(launched)
        if hasattr(driver, "make_launcher"):  # Triton 3.6 writes a launcher in C for each kernel
            extension = SimpleNamespace(launch=lambda *call: launched(*call[:7], *call[9:13], call[7:9], call[13:]))
            driver.compile_module_from_src, driver.library_dirs = lambda **_: extension, lambda: []
        else:  # the C extension's type, which is not there without a CUDA driver
            driver.PyKernelArg, driver.ARG_TUPLE, driver.ARG_KERNEL, driver.ARG_CONSTEXPR = dict, 0, 1, 2

    def allocate_default_profile_scratch(self, *_: object) -> None:
        return None


class _Utils:
    """The C extension."""

    def __init__(self, launched: Callable[..., None]) -> None:
        self.launch = launched

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return 0, hash(kernel), 32, 0, 1024  # module, function, registers, spills, threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10, "multiprocessor_count": PROCESSORS}

    def build_signature_metadata(self, signature: object) -> bytes:
        return b""

    def fill_tma_descriptor_tiled(self, *described: object) -> tuple[object, ...]:
        return described

    fill_tma_descriptor = fill_tma_descriptor_tiled  # in Triton 3.6


class Builder:
    """Builds for one architecture. There can be one in a process."""

    def __init__(self, arch: str, processors: int = PROCESSORS) -> None:
        target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)
        triton.runtime.driver.set_active(_Driver(target))
        _pretend(arch, processors)
        self._built: list[CompiledKernel] = []
        run = triton.JITFunction.run

        def build(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
            self._built.append(run(kernel, *args, grid=grid, warmup=True, **options))

        triton.JITFunction.run = build

    def build(self, launch: Callable[[], object]) -> list[CompiledKernel]:
        """Return the kernels that `launch` launches, in their order."""
        launch()
        built, self._built = self._built, []
        assert built, "nothing was launched"
        return built


def stop_at_launches(launched: Callable[..., None]) -> None:
    """Take the CPU for an H100, and call `launched` with what the C launcher would be called with.

    As a Builder, it can be done once in a process.
    """
    triton.runtime.driver.set_active(_Device(GPUTarget("cuda", 90, 32), launched))
    _pretend("sm_90")
    from ia3rt import ops
    from ia3rt.ops import _dispatch

    def backend(x: Tensor) -> str:
        return "triton" if x.dtype in _dispatch.TRITON_DTYPES else "torch"

    _dispatch.backend = ops.backend = backend  # type: ignore[assignment]
    torch.set_grad_enabled(False)


def _pretend(arch: str, processors: int = PROCESSORS) -> None:
    answers: dict[str, Callable[[torch.device], Any]] = {
        "arch_of": lambda device: arch,
        "processors_of": lambda device: processors,
    }
    # In the module that has them, and in those that took them from it before.
    took = [module for name, module in sys.modules.items() if name.startswith("ia3rt.kernels.")]
    for module in (configs, *took):
        for name in answers.keys() & vars(module).keys():
            setattr(module, name, answers[name])

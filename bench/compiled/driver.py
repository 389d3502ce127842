"""Makes Triton build for an architecture what launchers launch, and stop there.

The launchers run as they are, on tensors without data, and only Triton's driver is another: it names the target, and a
launch ends when its code is compiled. So arguments, their specialisation and options are the shipped ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
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


class Builder:
    """Builds for one architecture. There can be one in a process, made before any kernel is imported."""

    def __init__(self, arch: str) -> None:
        target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)
        triton.runtime.driver.set_active(_Driver(target))
        configs.arch_of = lambda device: arch
        configs.processors_of = lambda device: PROCESSORS
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

"""Contenders whose forward goes through torch.compile."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ia3rt.bench.contenders import base, ia3rt, peft
from ia3rt.bench.contenders.subject import LeftOut, Subject, Way, compile_each_model
from ia3rt.bench.models import clone
from ia3rt.bench.workshop import Workshop


class Compiled(Subject):  # type: ignore[misc]
    """A mixin: the forward is compiled when it is first called, for each shape of a batch by itself."""

    def __init__(self, *made: Any) -> None:
        super().__init__(*made)
        compiler = os.environ.get("CXX", "g++")
        if next(self.model.parameters()).device.type == "cpu" and shutil.which(compiler) is None:
            raise LeftOut(f"torch.compile needs a C++ compiler, and there is no {compiler}")
        compile_each_model()
        self.forward = torch.compile(self.model, dynamic=False)

    def generate(self, ids: Tensor, worn: Sequence[str], tokens: int, static: bool = False) -> Way:
        """Left out."""
        if static:
            raise LeftOut("with a static cache transformers compiles each contender's steps itself")
        raise LeftOut("generate() grows its cache, so that each step has a shape of its own to compile")


class Base(Compiled, base.Base):  # type: ignore[misc]
    """The unpatched model: what a compiled forward costs at least."""


class Peft(Compiled, peft.Peft):  # type: ignore[misc]
    """PEFT. It compiles again for each set of adapters that it wears, once; here the warm-up did."""

    def mixed(self, ids: Tensor, worn: Sequence[str]) -> Way:
        """Left out."""
        raise LeftOut("it would compile for each adapter and each number of its rows")


class Ia3rt(Compiled, ia3rt.Ia3rt):  # type: ignore[misc]
    """ia3rt."""


def base_subject(workshop: Workshop, names: Sequence[str]) -> Base:
    """A compiled base model."""
    return Base(clone(workshop.model))


def peft_subject(workshop: Workshop, names: Sequence[str]) -> Peft:
    """A compiled PeftModel with these adapters."""
    return Peft(peft.build(workshop, names))


def ia3rt_subject(workshop: Workshop, names: Sequence[str]) -> Ia3rt:
    """A compiled patched model with these adapters."""
    return Ia3rt(*ia3rt.build(workshop, names))

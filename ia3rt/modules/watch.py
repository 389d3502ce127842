"""One forward, watched: which layers it calls, whose weights it reads, and which of them run as drop-ins.

It is seen by what Python tells a profiler (sys.setprofile), of this thread alone: so the forward computes what any
other does, in the way of any other, and one that is not watched pays nothing.
"""

from __future__ import annotations

import dis
import functools
import sys
from collections.abc import Callable, Mapping
from itertools import pairwise
from types import CodeType, FrameType
from typing import Any

from torch import nn

from ia3rt.modules.experts import IA3Experts
from ia3rt.modules.fused_copies import check_unfused
from ia3rt.modules.layer import IA3Layer
from ia3rt.modules.readers import LOOKED_AT
from ia3rt.modules.swapping import Swapping
from ia3rt.modules.wearer import original_class
from ia3rt.routing.ended import calling_frame

# Whose reading is no computing: ours, of what moves weights about, and of compilers.
_MOVERS = ("ia3rt.modules.", "torch.distributed.", "torch._dynamo.", "torch._functorch.", "accelerate.", "deepspeed.")
_COMPILED = "compile_wrapper"  # what torch.compile puts around a function, in this file:
_COMPILED_IN = "torch/_dynamo/eval_frame.py"


class Watch:
    """Of one forward, in the thread that runs it.

    Args:
        layers: those that wear vectors, by path.
        modules: the model's, by path, as they are after the forward.
        note: called where all that the forward wanted of them was theirs.
        check_as_read: called where a compiler, or another profiler, hides what the forward does: raises `end`'s errors
            by what its code says.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        modules: Callable[[], Mapping[str, nn.Module]],
        note: Callable[[], object],
        check_as_read: Callable[[], None],
    ) -> None:
        self._paths = {id(vars(layer)): path for path, layer in layers.items()}
        self._layers = layers
        self._modules = modules
        self._note = note
        self._check_as_read = check_as_read
        self._hidden = False
        self._until: FrameType | None = None
        self._reached: set[str] = set()
        self._called: set[str] = set()
        self._read: dict[str, str] = {}
        self._sees = {
            id(nn.Module.__getattr__.__code__): self._see_read,
            id(nn.Module._call_impl.__code__): self._see_called,
            id(IA3Layer.ia3_forward.__code__): self._see_reached,
            id(IA3Experts.forward.__code__): self._see_reached,
            id(Swapping.forward.__code__): self._see_reached,
        }

    def start(self, ended: Callable[[], object]) -> None:
        """Begins to look, until the call of the model ends; calls `ended` where that calls no hooks."""
        if sys.getprofile() is not None:
            self._hidden = True
            return
        self._until, self._ended = calling_frame(), ended
        sys.setprofile(self._see)

    def end(self, completed: bool) -> None:
        """Ends it.

        Raises:
            ValueError: the forward called a layer, or read its weight or a copy of that, and the drop-in did not run.
        """
        self._stop()
        if not completed:
            return
        if self._hidden:
            self._check_as_read()
        else:
            self._check()
        self._note()

    def _check(self) -> None:
        unreached = {path: layer for path, layer in self._layers.items() if path not in self._reached}
        for path, layer in unreached.items():
            if path in self._called:
                own = "has a forward of its own, set by other code after patch(), which hides its vectors"
                other = "was called, and its class's forward did not run, which hides its vectors"
                raise ValueError(
                    f"module {path!r} {own if 'forward' in vars(layer) else other}: delete it, use a hook instead, or "
                    "let it call the forward that it replaces"
                )
            if path in self._read:
                raise ValueError(
                    f"{self._read[path]} reads the weight of {path!r} and never calls it, which hides its vectors: let "
                    "it call the module, or leave the module out with patch(exclude_modules=…)"
                )
        if unreached:
            check_unfused(self._modules(), unreached.values())

    def _stop(self) -> None:
        if self._until is not None:
            sys.setprofile(None)
            self._until = None

    def _see(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call":
            see = self._sees.get(id(code))
            if see is not None:
                see(frame)
            elif code.co_name == _COMPILED and code.co_filename.endswith(_COMPILED_IN):
                self._hidden = True
                self._stop()
        elif event == "return" and frame is self._until:
            self._stop()
            self._ended()

    def _path(self, frame: FrameType) -> str | None:
        return self._paths.get(id(vars(frame.f_locals["self"])))

    def _see_reached(self, frame: FrameType) -> None:
        path = self._path(frame)
        if path is not None:
            self._reached.add(path)

    def _see_called(self, frame: FrameType) -> None:
        path = self._path(frame)
        if path is not None:
            self._called.add(path)

    def _see_read(self, frame: FrameType) -> None:
        path = self._path(frame)
        reader = frame.f_back
        if path is None or path in self._read or reader is None:
            return
        module, name = frame.f_locals["self"], frame.f_locals["name"]
        is_tensor = module._parameters.get(name) is not None or module._buffers.get(name) is not None
        if is_tensor and not _is_movers(reader) and not _is_looked_at(reader) and not _is_within_a_layer(reader):
            self._read[path] = _in_words(reader)


def _is_movers(reader: FrameType) -> bool:
    return str(reader.f_globals.get("__name__", "")).startswith(_MOVERS)


def _is_within_a_layer(frame: FrameType | None) -> bool:
    """Whether a drop-in runs, which reads its weight, or that of another with its own."""
    while frame is not None:
        if frame.f_code is IA3Layer.ia3_forward.__code__:
            return True
        frame = frame.f_back
    return False


def _is_looked_at(reader: FrameType) -> bool:
    """Whether what is read is asked for no more than what it is like, as its dtype."""
    return _loaded_after(reader.f_code).get(reader.f_lasti) in LOOKED_AT


@functools.lru_cache(256)
def _loaded_after(code: CodeType) -> dict[int, Any]:
    """For each place in code, which attribute of what it gives is loaded next, if any."""
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "EXTENDED_ARG")]
    return {
        step.offset: following.argval
        for step, following in pairwise(steps)
        if following.opname in ("LOAD_ATTR", "LOAD_METHOD")
    }


def _in_words(reader: FrameType) -> str:
    code = reader.f_code
    around = reader.f_locals.get("self")
    of = f" of {original_class(type(around)).__name__}" if isinstance(around, nn.Module) else ""
    return f"{code.co_name}{of} ({code.co_filename}, line {reader.f_lineno})"

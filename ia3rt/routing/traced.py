"""Whether what is done now is also done later, by others than this code; or is not done at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._device import DeviceContext

_dynamo = torch._C._dynamo.eval_frame
_PROXIES = torch._C._TorchDispatchModeKey.PROXY
_transform = torch._C._functorch.peek_interpreter_stack
_modes = torch._C._len_torch_dispatch_stack
_functions, _function_mode = torch._C._len_torch_function_stack, torch._C._get_function_stack_at


def is_transformed() -> bool:
    """Whether torch.func transforms what is done (grad, jvp, vmap, functionalize): tensors stand for others then."""
    return _transform() is not None


def may_be_kept() -> bool:
    """Whether somebody sees what an operation gives, and may keep it.

    That is a transform, or a mode: one that logs, or selective checkpointing. A compiler sees what is done to it later.
    """
    if _transform() is not None:
        return True
    return not torch.compiler.is_compiling() and (_modes() > 0 or (_functions() > 0 and _is_function_seen()))


def _is_function_seen() -> bool:
    """Whether a function mode looks on: not the one that torch.set_default_device sets, which keeps nothing."""
    return any(type(_function_mode(place)) is not DeviceContext for place in range(_functions()))


def is_traced() -> bool:
    """Whether a compiler or an export reads this; not where such a one calls code that it does not read.

    `torch.compiler.is_compiling` is true there too.
    """
    return torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting()


def is_captured(x: Tensor) -> bool:
    """Whether a CUDA graph captures what is done with x."""
    return not is_traced() and x.is_cuda and torch.cuda.is_current_stream_capturing()


def is_by_proxies() -> bool:
    """Whether proxies record what is done, as in torch.export and make_fx; whether they have numbers is theirs."""
    if torch._C._get_dispatch_mode(_PROXIES) is not None:
        return True
    before_dispatch = torch._ops.mode_stack_state_for_pre_dispatch()  # type: ignore[no-untyped-call]
    return before_dispatch.get(0) is not None


def is_recorded() -> bool:
    """Whether what is done becomes a program that runs later, whatever is worn then: torch.export's, or a trace."""
    if torch.compiler.is_exporting():
        return True
    if torch.compiler.is_dynamo_compiling():  # which does not look into the others
        return False
    return torch._C._is_tracing() or is_by_proxies()


def has_no_numbers(x: Tensor) -> bool:
    """Whether only shapes are asked for: on the meta device, or in FakeTensorMode.

    Not where a program is recorded by shapes, which is to have numbers when it runs.
    """
    return x.is_meta or (isinstance(x, FakeTensor) and not is_recorded())


@contextmanager
def outside_export() -> Iterator[None]:
    """Lets what is called within be no part of a program that torch.export records."""
    was_exporting = torch.compiler._is_exporting_flag
    torch.compiler._is_exporting_flag = False
    try:
        yield
    finally:
        torch.compiler._is_exporting_flag = was_exporting


def leave_alone(code: CodeType) -> None:
    """Has torch's compiler run this code as it is, where compiled code comes to call it, and not compile it by itself.

    That is what torch's own `skip_code` does, without the second that importing the compiler takes.
    """
    _dynamo.set_code_exec_strategy(
        code, _dynamo._FrameExecStrategy(_dynamo._FrameAction.SKIP, _dynamo._FrameAction.DEFAULT)
    )

"""What went wrong, as one sentence: vLLM's processes wrap what a worker raised, twice, and add its traceback."""

from __future__ import annotations

import re

from ia3rt.serving.access import shown

_WRAPPED = re.compile(
    r"Worker failed with error (?P<quote>['\"])(?P<said>.+)(?P=quote), please check the stack trace above.*"
    r"|Call to \w+ method failed: (?P<called>.+)",
    re.DOTALL,
)


def named(name: str, says: str) -> str:
    """A sentence that names the adapter that it is about."""
    return says if repr(name) in says else f"adapter {shown(name)}: {says}"


def sentence_of(error: Exception) -> str:
    """What went wrong, without the traceback that vLLM appends to a worker's error, and without half characters."""
    lines = _unwrapped(str(error).strip()).splitlines()
    return lines[0].encode("utf-8", "backslashreplace").decode() if lines else type(error).__name__


def _unwrapped(message: str) -> str:
    """What a worker said, without what vLLM puts around it on its way: the method, and to look for a stack trace."""
    while (wrapped := _WRAPPED.match(message)) is not None:
        message = wrapped["said"] or wrapped["called"]
    return message

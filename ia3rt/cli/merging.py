"""`ia3rt merge`: a plain model, with adapters multiplied into its weights."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ia3rt.adapters.new_folder import check_new, new_folder
from ia3rt.cli.errors import UsageError, first_line
from ia3rt.cli.packages import quiet, require
from ia3rt.cli.progress import busy


@dataclass(frozen=True)
class Merged:
    """What was written.

    Attributes:
        architecture: the model's class.
        dtype: of its weights.
        has_processor: whether a tokenizer, or what else prepares its inputs, was written with it.
    """

    architecture: str
    dtype: str
    has_processor: bool


def merge(console: Console, model: str, adapters: Sequence[str], output: Path) -> Merged:
    """Loads a model, multiplies the adapters' product into its weights, and writes it with its tokenizer.

    Args:
        console: where to show that it is at work.
        model: a folder or a Hub id, of a class of transformers'. It is loaded in the dtype that it is stored in.
        adapters: folders or Hub ids; what they are to be otherwise than multiplied, `combine` makes one of them first.
        output: a folder that is not there yet.

    Raises:
        UsageError: there is no such model, or its class is none of transformers', or an adapter is given twice.
        FileNotFoundError: there is no such adapter.
        FileExistsError: the output is there already.
        ValueError: an adapter is damaged or does not fit the model, or the weights cannot be merged into. Nothing is
            written then.
        MissingPackageError: transformers is not installed.
    """
    require("transformers", "pip install 'transformers>=5'")
    check_new(output)
    for adapter in adapters:
        if adapters.count(adapter) > 1:
            raise UsageError("ADAPTER", f"{adapter!r} is given twice, and would be multiplied in twice: give it once")
    with busy(console, f"Loading {model}"):
        loaded = _load(model)
    import ia3rt

    runtime = ia3rt.patch(loaded)
    with busy(console, "Merging the adapters", len(adapters) + 1) as advance:
        for adapter in adapters:
            runtime.load_adapter(adapter, adapter)
            advance()
        runtime.merge_and_unload(list(adapters))
        advance()
    with busy(console, f"Writing {output}"), quiet(), new_folder(output) as folder:
        loaded.save_pretrained(folder)
        has_processor = _copy_processor(model, folder)
    return Merged(type(loaded).__name__, str(loaded.dtype).removeprefix("torch."), has_processor)


def _load(model: str) -> Any:
    with quiet():
        import transformers

        try:
            config = transformers.AutoConfig.from_pretrained(model)
            name = next(iter(config.architectures or ()), None)
        except (OSError, ValueError) as error:
            raise UsageError("MODEL", f"{model!r}: {first_line(error)}") from error
        cls: Any = getattr(transformers, name or "", None)
        if cls is None:
            raise UsageError("MODEL", f"{model!r} is of the class {name}, which transformers lacks: merge it in Python")
        try:
            return cls.from_pretrained(model, dtype="auto").eval()
        except (OSError, ValueError) as error:
            raise UsageError("MODEL", f"{model!r}: {first_line(error)}") from error


def _copy_processor(model: str, folder: Path) -> bool:
    """Writes the model's tokenizer, and what else prepares its inputs; whether it has one."""
    transformers: Any = importlib.import_module("transformers")  # Any: it is not typed

    try:
        transformers.AutoProcessor.from_pretrained(model).save_pretrained(folder)
    except (OSError, ValueError, ImportError, KeyError):  # none, or one that needs another package
        return False
    return True

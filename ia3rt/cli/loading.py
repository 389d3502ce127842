"""Loads a model whole: of a class of transformers', with every weight from its files."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from ia3rt.adapters.checkpoint import Checkpoint
from ia3rt.cli.errors import UsageError, first_line
from ia3rt.cli.models import check_model, why_not
from ia3rt.cli.packages import quiet
from ia3rt.cli.task_class import class_for_task

_MOST_NAMED = 4


@dataclass(frozen=True)
class Loaded:
    """A model, and what became of its files.

    Attributes:
        model: in eval mode.
        left_out: the weights in its files that its class has no place for, so that it is written without them.
    """

    model: Any
    left_out: tuple[str, ...]


def load_whole(model: str, adapters: Collection[Checkpoint]) -> Loaded:
    """Loads a model by the class that its config names, in the dtype that its config names. Runs no code of its own.

    Where an adapter brings a head that this class lacks, it is the class for the adapter's task.

    Args:
        model: a folder or a Hub id.
        adapters: what it is going to wear. What its files lack of their own modules is theirs.

    Raises:
        UsageError: there is no such model, its files are damaged, its class is none of transformers', or its files lack
            weights of that class, which transformers would draw at random.
    """
    check_model(model, "MODEL")
    with quiet():
        cls, config = _class_of(model)
        try:
            for_task = class_for_task(cls, config, adapters)
            cls = for_task or cls
            loaded, info = cls.from_pretrained(
                model,
                config=config if for_task else None,
                dtype="auto",
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are named below; transformers' error names none
            )
        except Exception as error:  # what a damaged file raises, or a package that is missing, is of any kind
            raise _unusable(model, error) from error
    wrong = [f"{key} has {tuple(seen)} and not {tuple(right)}" for key, seen, right in info["mismatched_keys"]]
    if wrong:
        raise UsageError("MODEL", f"{model!r} does not fit its own config: {some(wrong)}")
    own = {f"{path}.{name}" for adapter in adapters for path, state in adapter.modules.items() for name in state}
    missing = info["missing_keys"] - own
    if missing:
        raise UsageError(
            "MODEL",
            f"{model!r} lacks weights of {cls.__name__}, the class that it is loaded as: {some(missing)}. "
            "They would be random numbers: give a model that has them, or correct 'architectures' in its config.json",
        )
    if info["error_msgs"]:
        raise UsageError("MODEL", f"{model!r}: {some(info['error_msgs'])}")
    return Loaded(loaded.eval(), tuple(sorted(info["unexpected_keys"])))


def _class_of(model: str) -> tuple[Any, Any]:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # a config may hold anything
        raise _unusable(model, error) from error
    names = config.architectures
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise UsageError("MODEL", f"{model!r} has no 'architectures' in its config.json: merge it in Python")
    cls = getattr(transformers, names[0], None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise UsageError("MODEL", f"{model!r} is of the class {names[0]}, which transformers lacks: merge it in Python")
    return cls, config


def _unusable(model: str, error: Exception) -> UsageError:
    if "trust_remote_code" in str(error):
        return UsageError("MODEL", f"{model!r} needs code of its own, which is not run here: merge it in Python")
    if isinstance(error, OSError | ValueError | ImportError):
        return UsageError("MODEL", why_not(model, error))
    return UsageError("MODEL", f"{model!r} cannot be loaded: {type(error).__name__}: {first_line(error)}")


def some(names: Collection[str]) -> str:
    """The first of the names, and how many more there are."""
    shown = sorted(names)[:_MOST_NAMED]
    return ", ".join(shown) + (f" and {len(names) - len(shown):,} more" if len(names) > len(shown) else "")

"""What users give, models and tensors by name: what is none, or holds no numbers of a vector's, is told."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def check_mapping(given: object, what: str, to: str) -> None:
    """Checks that it is a mapping.

    Args:
        given: what a user gave.
        what: what it was given as, as an error names it.
        to: what its names have to mean.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(given, Mapping):
        raise TypeError(
            f"{what} must be a mapping of names to {to}, and what is given is of type {type(given).__name__}"
        )


def check_tensors(given: object, what: str) -> None:
    """Checks that it is a mapping of tensors.

    Args:
        given: what a user gave.
        what: what it was given as, as an error names it.

    Raises:
        TypeError: it is none, or one of them is no tensor.
    """
    check_mapping(given, what, "tensors")
    assert isinstance(given, Mapping)
    for name, each in given.items():
        if not isinstance(each, Tensor):
            raise TypeError(
                f"{what} must be tensors, and what is given at {name!r} is of type {type(each).__name__}: make one of "
                "it, as by torch.tensor(…, dtype=torch.float32)"
            )


def check_model(given: object, call: str) -> None:
    """Checks that it is a model.

    Args:
        given: what a user gave.
        call: to which function.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(given, nn.Module):
        raise TypeError(
            f"{call} takes a model, a torch.nn.Module, and what is given is of type {type(given).__name__}: give what "
            "from_pretrained(…) returns; that of a pipeline or a Runtime is its `model`"
        )


def check_floating(tensor: Tensor, what: str) -> None:
    """Checks that a vector's numbers are of a dtype that a vector may have.

    Args:
        tensor: the vector; of device meta too.
        what: what it is, as an error names it.

    Raises:
        ValueError: they are integers, truth values or complex.
    """
    if not tensor.is_floating_point():
        raise ValueError(f"{what} is of dtype {tensor.dtype}: expected a floating point one")

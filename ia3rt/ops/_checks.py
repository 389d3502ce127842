"""The checks of what all ops share: a site's slice of the bank, the mix table and the route."""

import torch
from torch import Tensor


def check_site(name: str, l: Tensor | None, width: int) -> None:  # noqa: E741
    if l is None:
        return
    if l.ndim != 2 or l.shape[1] != width:
        raise ValueError(f"{name} must be a bank slice of shape [capacity, {width}], not {list(l.shape)}")
    if l.stride(1) != 1 and width > 1:
        raise ValueError(f"{name} must have contiguous columns; its strides are {list(l.stride())}")


def check_routing(mixes: Tensor, route: Tensor) -> None:
    is_table = mixes.ndim == 2 and mixes.shape[1] >= 2 and mixes.shape[1] % 2 == 0
    if mixes.dtype != torch.int32 or not is_table or not mixes.is_contiguous():
        raise ValueError(
            f"mixes must be a contiguous int32 tensor [slots, 2 + 2K], not {mixes.dtype} {list(mixes.shape)}"
        )
    if route.dtype != torch.int32 or route.ndim != 1 or not route.is_contiguous():
        raise ValueError(f"route must be a contiguous int32 tensor [R], not {route.dtype} {list(route.shape)}")


def check_rows(rows: int, route: Tensor) -> None:
    if route.shape[0] == 0 or rows % route.shape[0]:
        raise ValueError(f"the {rows} rows of x cannot be divided among the {route.shape[0]} entries of route")

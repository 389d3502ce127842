"""A tiny model of convolutions, whose adapters are PEFT's."""

from __future__ import annotations

import copy

import peft
import torch
from tiny import randomize
from torch import Tensor, nn

IMAGE, CHANNELS = 6, 4
TARGETS = dict(target_modules=["same", "wide", "deep", "out"], feedforward_modules=["wide", "deep"])


class Convolutions(nn.Module):
    """Convolutions of one, two and three dimensions, some in groups, over images [rows, 3, 6, 6]; gives [rows, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.same = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=2)
        self.wide = nn.Conv2d(CHANNELS, 8, 3, stride=2, padding=1, groups=2, padding_mode="circular")
        self.deep = nn.Conv3d(4, 6, (1, 2, 2), groups=2)
        self.line = nn.Conv1d(6, 5, 3, padding=1)
        self.out = nn.Linear(5, 5)

    def forward(self, pixel_values: Tensor) -> Tensor:
        h = self.same(self.first(pixel_values).relu())
        h = self.wide(h).relu()
        h = self.deep(h.unflatten(1, (4, 2)))
        return self.out(self.line(h.flatten(2)).mean(-1))


def model(dtype: torch.dtype = torch.float32) -> Convolutions:
    """The same at each call."""
    torch.manual_seed(0)
    return Convolutions().to(dtype).eval()


def images(rows: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(1)).to(dtype)


def peft_model(plain: nn.Module, names: str = "bcd", **config: object) -> peft.PeftModel:
    """A PEFT model over a copy, with adapters of random vectors."""
    configs = {name: peft.IA3Config(**{**TARGETS, **config}) for name in names}
    wrapped = peft.get_peft_model(copy.deepcopy(plain), configs[names[0]], adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, configs[name])
    randomize(wrapped, seed=2)
    return wrapped.eval()

"""Block sizes that were measured on a card, one file a card in tuned/: `python -m ia3rt.bench tune` writes it.

A card without a file has the defaults of configs.py, which need no tuning.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

FOLDER = Path(__file__).parent / "tuned"
ROWS = (1, 16, 32, 64, 128, 256, 512, 1024, 4096)
"""The numbers of rows that are measured; others have the config of the next larger one."""


@dataclass(frozen=True)
class LinearConfig:
    """How the kernels of a linear layer are built and launched."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    """The row blocks that share a column of W while it is in L2."""
    num_warps: int
    num_stages: int
    piece: int
    """The columns of a tile that are scaled at a time: what is left of the registers beside the accumulator."""
    splits: int = 1
    """The programs that share the sum over K of one tile."""
    resident: int = 0
    """The programs of the persistent kernel (linear_tma.py) on a processor; 0: linear_kernel, a program a tile."""

    def build_options(self) -> dict[str, int]:
        """Return the kernels' compile-time arguments and the compiler's options."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "GROUP_M": self.group_m,
            "PIECE": self.piece,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,  # the default is not the same in every Triton
        }

    def in_words(self) -> str:
        """Return it for people to read."""
        words = f"{self.block_m}×{self.block_n}×{self.block_k}, {self.num_warps} warps, {self.num_stages} stages"
        return (
            words + (f", {self.splits} splits" if self.splits > 1 else "") + (", persistent" if self.resident else "")
        )

    def tiles(self, rows: int, N: int) -> int:
        """Return how many tiles y [rows, N] has."""
        return -(-rows // self.block_m) * -(-N // self.block_n)


class LinearShape(NamedTuple):
    """What a linear layer's config is chosen by."""

    rows: int
    """One of ROWS."""
    N: int
    K: int
    dtype: str
    per_row: bool
    scales_input: bool
    descriptors: bool
    layers: int
    """1, or 2 where one launch computes two layers."""


class GateUpShape(NamedTuple):
    """What gate_up.py's config is chosen by."""

    rows: int
    """One of ROWS."""
    N: int
    K: int
    dtype: str
    gated: bool
    per_row: bool
    descriptors: bool


class QuantisedShape(NamedTuple):
    """What linear_quantised.py's config is chosen by."""

    rows: int
    """One of ROWS."""
    N: int
    K: int
    dtype: str
    kind: str
    group_size: int
    per_row: bool


@dataclass(frozen=True)
class AttentionConfig:
    """How an attention kernel is built: rows and keys of a tile."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def build_options(self) -> dict[str, int]:
        """Return the kernel's constants and Triton's options."""
        return dict(BLOCK_M=self.block_m, BLOCK_N=self.block_n, num_warps=self.num_warps, num_stages=self.num_stages)


class AttentionShape(NamedTuple):
    """What the config of a prefill's attention is chosen by, where nothing but a causal mask says who sees whom."""

    rows: int
    """One of ROWS."""
    heads: int
    """Query heads of all sequences."""
    D: int
    dtype: str


def rounded_rows(rows: int) -> int:
    """Return the number of rows whose config `rows` rows have."""
    return next((bound for bound in ROWS if rows <= bound), ROWS[-1])


def dtype_name(dtype: torch.dtype) -> str:
    """Return "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def file_of(card: str) -> Path:
    """Return where a card's configs are."""
    return FOLDER / f"{''.join(c if c.isalnum() else '_' for c in card)}.json"


SHAPES: dict[str, tuple[type[Any], type[Any]]] = {
    "linear": (LinearShape, LinearConfig),
    "gate_up": (GateUpShape, LinearConfig),
    "linear_quantised": (QuantisedShape, LinearConfig),
    "attention": (AttentionShape, AttentionConfig),
}
"""By operation, what its configs are chosen by, and what they are."""


@functools.cache
def tuned_configs(card: str, operation: str) -> Mapping[Any, Any]:
    """Return what was measured on a card, by shape; None stands for torch's own matmul. A file may lack operations."""
    file = file_of(card)
    entries = json.loads(file.read_text("utf-8")).get(operation, []) if file.exists() else []
    shape_of, config_of = SHAPES[operation]
    return {
        shape_of(**entry["shape"]): None if entry["config"] is None else config_of(**entry["config"])
        for entry in entries
    }


def linear_configs(card: str) -> Mapping[LinearShape, LinearConfig | None]:
    """Return what was measured of linear layers on a card."""
    return tuned_configs(card, "linear")


def write_configs(card: str, configs: Mapping[str, Mapping[Any, Any]]) -> Path:
    """Add configs, by operation and shape, to a card's file, or replace those for the same shapes."""
    parts = [f'{{"card": {json.dumps(card)}']
    for operation in SHAPES:
        merged = {**tuned_configs(card, operation), **configs.get(operation, {})}
        entries = [
            {"shape": shape._asdict(), "config": None if config is None else asdict(config)}
            for shape, config in sorted(merged.items(), key=lambda item: item[0])
        ]
        if entries:
            lines = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
            parts.append(f'"{operation}": [\n{lines}\n]')
    file = file_of(card)
    file.parent.mkdir(exist_ok=True)
    file.write_text(", ".join(parts) + "}\n", "utf-8")
    tuned_configs.cache_clear()
    return file

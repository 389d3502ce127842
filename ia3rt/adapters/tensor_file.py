"""Reads a file of named tensors, a .safetensors or a pickle, and says what is wrong with one that cannot be read.

What a file declares is known before a number of it is read: names, dtypes and shapes, as tensors of the device meta. So
who wants none of it never reads it, however large it is.
"""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ia3rt.adapters.plain_file import opened

MOST_HEADER = 1 << 23
"""Bytes of a header: fifty thousand tensors have room in it. The format itself allows 100,000,000."""
MOST_KEY = 512
"""Characters of a tensor's name."""
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


def read_tensors(file: Path, accept: Callable[[Mapping[str, Tensor]], object]) -> dict[str, Tensor]:
    """The tensors of a file by name, in an order that does not change from one load to the next.

    A pickle that would run code is refused, never run.

    Args:
        file: a regular file.
        accept: is given, before a number is read, the tensors as the file declares them, of device meta. What it raises
            is raised.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or something else than its name says.
    """
    with opened(file) as (stream, size):
        begin = stream.read(32)
        if not begin:
            raise ValueError(f"{file} is damaged: it is empty, 0 bytes")
        if begin.startswith(b"version https://git-lfs"):
            raise ValueError(
                f"{file} is damaged: it is a pointer of Git LFS and not the file itself; run `git lfs pull`"
            )
        stream.seek(0)
        if file.suffix == ".safetensors":
            header = _header(file, stream, size)
            accept(_declared(file, header, size))
            return _safetensors(file, header, stream, size)
        accept(_pickle(file, stream, "meta"))
        return _pickle(file, stream, "cpu")


def _header(file: Path, stream: BinaryIO, size: int) -> bytes:
    """The bytes before the numbers: the length of the header in 8 bytes, and the header."""
    begin = stream.read(8)
    if begin.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        raise ValueError(
            f"{file} is damaged: it is a pickle of torch.save and no .safetensors file; name it as one, with the "
            "ending .bin"
        )
    length = int.from_bytes(begin, "little")
    if len(begin) < 8 or length > 100_000_000:  # the format's own limit
        raise ValueError(
            f"{file} is damaged: it does not begin with the length of a header, so it is no .safetensors file"
        )
    if length > MOST_HEADER:
        raise ValueError(f"{file} has a header of {length:,} bytes: {MOST_HEADER:,} are the most")
    header = begin + stream.read(length)
    if len(header) < 8 + length:
        raise ValueError(
            f"{file} is damaged: it ends within its header: {size:,} of at least {8 + length:,} bytes are there"
        )
    return header


def _declared(file: Path, header: bytes, size: int) -> dict[str, Tensor]:
    """The tensors that a header declares; their numbers fill the rest of the file."""
    try:
        entries = json.loads(header[8:])
        entries.pop("__metadata__", None)
        ends = [_end(entry) for entry in entries.values()]
    except (ValueError, AttributeError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: its header is broken: {error}") from error
    expected = len(header) + max(ends, default=0)
    if size != expected:
        says = "its end is missing" if size < expected else "it goes on after its last tensor"
        raise ValueError(f"{file} is damaged: {says}: {size:,} of {expected:,} bytes are there")
    declared = {}
    for name, entry in sorted(entries.items()):
        if len(name) > MOST_KEY:
            raise ValueError(f"{file} has a key of {len(name):,} characters: {MOST_KEY:,} are the most")
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{file} holds {name!r} of dtype {entry['dtype']!r}, which torch does not have")
        dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
        begin, end = entry["data_offsets"]
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{file} is damaged: {name!r} of shape {shape} has {end - begin:,} bytes of numbers")
        declared[name] = torch.empty(shape, dtype=dtype, device="meta")
    return declared


def _end(entry: Any) -> int:
    """Where a tensor's numbers end, in bytes from the header's end; raises where a header's entry is none."""
    begin, end = entry["data_offsets"]
    sizes = (*entry["shape"], begin, end)
    if not all(type(size) is int and 0 <= size < 1 << 62 for size in sizes) or not isinstance(entry["dtype"], str):
        raise ValueError(f"{entry} declares no tensor")
    last: int = end
    return last


def _safetensors(file: Path, header: bytes, stream: BinaryIO, size: int) -> dict[str, Tensor]:
    try:
        # Four times as fast as mapping so small a file.
        return dict(sorted(load(header + stream.read(size - len(header))).items()))
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _pickle(file: Path, stream: BinaryIO, device: str) -> dict[str, Tensor]:
    stream.seek(0)
    try:
        _check_stored(stream)
        tensors = torch.load(stream, map_location=device, weights_only=True)
    except (
        zipfile.BadZipFile,
        EOFError,
        OSError,  # of a file that was cut off, without its name
        RuntimeError,
        ValueError,
        KeyError,
        AttributeError,
        IndexError,
        TypeError,
        OverflowError,
    ) as error:
        raise ValueError(f"{file} is damaged or is no {file.suffix} file of tensors: {error}") from error
    except pickle.UnpicklingError as error:  # whose text advises to load it with code and all
        raise ValueError(
            f"{file} is damaged or is no {file.suffix} file of tensors alone: what would run code is not loaded"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise ValueError(f"{file} holds no mapping of names to tensors, but a {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{file} holds no mapping of names to tensors: {name!r} is a {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise ValueError(f"{file} holds {name!r} as a {tensor.layout} or quantised tensor: expected plain numbers")
        if len(name) > MOST_KEY:
            raise ValueError(f"{file} has a key of {len(name):,} characters: {MOST_KEY:,} are the most")
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _check_stored(stream: BinaryIO) -> None:
    """Refuses an archive that unpacks to more than it is: torch.save packs nothing."""
    if zipfile.is_zipfile(stream):
        stream.seek(0)
        with zipfile.ZipFile(stream) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise ValueError("it is compressed, which torch.save never does")
                if entry.filename.endswith(".pkl") and entry.file_size > MOST_HEADER:
                    raise ValueError(f"its names take {entry.file_size:,} bytes: {MOST_HEADER:,} are the most")
    stream.seek(0)

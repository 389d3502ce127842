"""What of a bank lies on one device: the columns of the sites that compute there."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from ia3rt.adapters.pieces import pieces


class DeviceTable:
    """A row an adapter, a column slice a site: a row's number, and a site's position, are the same on each device.

    Args:
        table: the vectors, [rows, the sum of `widths`].
        widths: each site's columns, in the order of the bank; 0 for one that lies on another device.
        whole: the same of all sites, wherever they lie.

    Attributes:
        table: as given.
        widths: as given.
        columns: by site, [rows, width]; without a column for one that lies elsewhere.
        stream: of a CUDA device, the one that forwards run in.
        is_read_by_streams: whether forwards ran in several streams of a CUDA device.
    """

    def __init__(self, table: Tensor, widths: Sequence[int], whole: Sequence[int]) -> None:
        self.table = table
        self.widths = list(widths)
        self.columns = torch.split(table, self.widths, dim=1)
        self.stream: torch.cuda.Stream | None = None
        self.is_read_by_streams = False
        self._runs = _runs(widths, whole)

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.table.device

    def read_in(self, stream: torch.cuda.Stream) -> None:
        """Says that forwards run in this stream of its CUDA device."""
        if self.stream is not stream:
            self.is_read_by_streams = self.is_read_by_streams or self.stream is not None
            self.stream = stream

    def as_read(self, before: DeviceTable) -> DeviceTable:
        """Itself, read as the one that it takes the place of."""
        self.stream, self.is_read_by_streams = before.stream, before.is_read_by_streams
        return self

    def wait_for_readers(self) -> None:
        """On a CUDA device, lets the current stream wait for what may still read a row that is written next."""
        if not self.table.is_cuda:
            return
        here = torch.cuda.current_stream(self.device)
        if self.is_read_by_streams:
            torch.cuda.synchronize(self.device)
        elif self.stream is not None and self.stream != here:
            here.wait_stream(self.stream)

    def written(self) -> torch.cuda.Event | None:
        """What is to be waited for before what was written now is read in another stream; None but on a CUDA device."""
        if not self.table.is_cuda:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def write(self, index: int, row: Tensor) -> None:
        """Writes what of an adapter lies here, and ones where `row` has no numbers.

        Args:
            index: the row of the table.
            row: all of the adapter, on the CPU; shorter than the bank's where that got sites since.
        """
        out, written = self.table[index], 0
        for begin, length in self._runs:
            numbers = row[begin : begin + length]
            there = out[written : written + len(numbers)]
            if self.table.is_cpu:
                for piece, source in zip(pieces(there), pieces(numbers), strict=True):
                    piece.copy_(source)
            else:
                there.copy_(numbers, non_blocking=row.is_pinned())
            written += len(numbers)
        if written < len(out):
            out[written:].fill_(1.0)


def _runs(widths: Sequence[int], whole: Sequence[int]) -> list[tuple[int, int]]:
    """Where in an adapter's row the numbers of some sites are, piece by piece: the first one's place, and how many."""
    runs, begin = [], 0
    for is_here, some in groupby(zip(widths, whole, strict=True), lambda pair: pair[0] == pair[1]):
        length = sum(width for _, width in some)
        if is_here:
            runs.append((begin, length))
        begin += length
    return runs

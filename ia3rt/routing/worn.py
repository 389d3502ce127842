"""What the rows of a forward wear: written once, and then only read."""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from ia3rt.adapters.bank import Bank
from ia3rt.adapters.outside_modes import outside_modes
from ia3rt.routing.composed import ComposedMixes, Scales
from ia3rt.routing.route import Backend, Route
from ia3rt.routing.streams import Streams, current_stream, current_streams
from ia3rt.routing.tables import MixTables, pack_mixes, used_rows
from ia3rt.routing.traced import is_traced

_KEPT = 4  # of each size and stream: a switch needs one besides the one that is worn
_KINDS = 32  # sizes and streams of which there may be some


class Memory:
    """The tables of one Worn. They go to another once it is gone, as making them takes longer than writing them.

    Attributes:
        composed: the mixes as torch applies them; nothing is in it where no module needs them.
        placed: the mixes as the kernels read them, on each device of the bank; nothing is in it on the torch backend.
        holder: the Worn whose numbers CUDA graphs read here; None once a switch has written others for them.
        route: what was written last; it holds the rows that it names, which a CUDA graph may read.
        streams: of CUDA devices, those that it was written in, by the device's place in the bank.
    """

    def __init__(self) -> None:
        self.composed = ComposedMixes()
        self.placed: tuple[MixTables, ...] = (MixTables(),)
        self.holder: weakref.ref[Worn] | None = None
        self.route: Route | None = None
        self.streams: Streams = ()

    @outside_modes
    def write(self, bank: Bank, route: Route, backend: Backend, composes: bool, streams: Streams) -> None:
        """Writes a route, in `streams`, the current ones; in place where one of as many rows was here before."""
        by_row = None if route.of_rows is None else route.of_rows.tolist()
        self.route, self.streams = route, streams
        self.composed.is_written = False
        if composes:
            self.composed.write(bank, route.mixes, by_row)
        if len(self.placed) != len(bank.tables):
            self.placed = tuple(MixTables() for _ in bank.tables)
        if backend == "triton":
            rows = 1 if route.index is None else route.index.numel()
            for place, (tables, here) in enumerate(zip(self.placed, bank.tables, strict=True)):
                stream = streams[place] if streams else None
                tables.write(here, route.mixes, rows, stream)
                tables.write_route([0] if by_row is None else by_row, stream)


class Worn:
    """What the rows of a forward wear: a snapshot, whatever is set after it.

    A backward pass, another thread or a forward that is repeated reads the same numbers: they stay as long as this.

    Attributes:
        route: what it is.
        rows: of the batch that it is for; None where all rows of any batch wear one mix.
        by_row: whether its rows may wear different mixes.
        is_of_one_row: whether `rows` is 1: a compiler that asks for the number itself compiles anew for each other one.
        length: of these rows, in tokens; None unless each token has a mix of its own.
        tokens: int64 [rows * length], the mix of each token, on the device of `tables`; None unless each has one.
        images: the row of each image of the batch, where the route or the batch says so.
        before_start: what is worn by a forward of tokens that all come before the route's start; None without one.
        after_start: the same of tokens that all come after it.
        is_behind: whether it is such a one.
        composed: the mixes as torch applies them.
        placed: the mixes as the kernels read them, on each device of the bank.
        tables: the first of these.
        spread: scales as they are multiplied to inputs, by what `RowScales.scale` looks them up, with the dimension of
            the rows.
        major: sites whose tensors lie row by row, by what `RowScales.are_major` looks them up.
        streams: of CUDA devices, those that the numbers were written in, by the device's place in the bank.
        lent: whether something else may still read the numbers once this is gone, as autograd, a CUDA graph and a
            program that was recorded do.
        is_recorded: whether a program is recorded that reads them.
    """

    # Most have none of these, and what is made by each switch is made by the microsecond.
    before_start: Worn | None = None
    after_start: Worn | None = None
    is_behind = False
    lent = is_recorded = False
    shelf: Shelf | None = None
    of: Worn | None = None
    """Whose numbers these are."""
    _acts: frozenset[int] | None = None
    _kept: weakref.ref[Worn] | None = None
    """It holds this one."""

    def __init__(self, route: Route, rows: int | None, composed: Scales, placed: tuple[MixTables, ...]) -> None:
        self.route = route
        self.rows = rows
        self.by_row = rows is not None
        self.is_of_one_row = rows == 1
        self.composed = composed
        self.placed = placed
        self.tables = placed[0]
        self.length: int | None = None
        self.tokens = self.tables.tokens
        self.images: Sequence[int] | None = None
        self.memory: Memory | None = None
        self.spread: dict[tuple[int, int, int], tuple[int, Tensor]] = {}
        self.major: set[tuple[int, int, int]] = set()
        self.streams: Streams = ()

    @property
    def is_left_to_compiler(self) -> bool:
        """Whether a compiler reads along that can read composed mixes, or a program is recorded.

        It fuses their multiplication into what it compiles anyway; a kernel would be launched by itself. A program of
        torch's operations runs where there are no kernels of ours.
        """
        return (is_traced() or self.is_recorded) and self.composed.is_written

    def compose(self, bank: Bank) -> None:
        """Composes the mixes where only the kernels' tables were written.

        Raises:
            RuntimeError: a CUDA graph is captured, which would compose the same mixes again at each replay.
        """
        if self.composed.is_written or not isinstance(self.composed, ComposedMixes):
            return
        if bank.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a layer that no kernel fits asks for the first time for what its rows wear, while a CUDA graph is "
                "captured: run one forward of this kind under this route before"
            )
        with bank.lock:
            if not self.composed.is_written:
                by_row = self.route.of_rows
                self.composed.write(bank, self.route.mixes, None if by_row is None else by_row.tolist())
                for stream in current_streams(bank):
                    if stream is not None:  # others wait for the stream that the kernels' tables were written in
                        stream.synchronize()

    def acts_at(self, position: int, bank: Bank) -> bool:
        """Whether any adapter of the route acts at a site."""
        if self._acts is None:
            keys = frozenset().union(*{adapter.keys for mix in self.route.mixes for adapter in mix.adapters})
            self._acts = frozenset(place for place, key in enumerate(bank.sites) if key in keys)
        return position in self._acts

    def by_token(self, tokens: Tensor, length: int, bank: Bank) -> Worn:
        """The same mixes over tokens [rows * length], which are brought to each device of `bank`."""
        made = self._over(
            tuple(
                tables.by_token(tokens.to(here.device)) for tables, here in zip(self.placed, bank.tables, strict=True)
            )
        )
        made.length = length
        return made

    def with_images(self, images: Sequence[int]) -> Worn:
        """The same for a batch with images, of which these are the rows."""
        made = self._over(self.placed)
        made.images = images
        return made

    def on(self, place: int) -> Worn:
        """The same as layers on one of several devices read it."""
        made = self._over((self.placed[place],))
        made.memory, made.spread, made.major = self.memory, self.spread, self.major
        return made

    def kept(self, bank: Bank) -> Worn:
        """The same as long as autograd may need it: of numbers that no switch and no load writes."""
        (self.of or self).lent = True
        if not self.tables.stays or not self.tables.bank:
            return self
        streams = current_streams(bank)
        kept = None if self._kept is None else self._kept()
        if kept is None or kept.streams != streams:  # or another stream would read what this one has not written yet
            used, mixes = used_rows(self.route.mixes)
            packed = pack_mixes(mixes, max(1, *(len(mix.rows) for mix in mixes)))
            placed = []
            with bank.lock:  # its tables and its sites belong together
                for tables, here in zip(self.placed, bank.tables, strict=True):
                    rows = here.table[torch.tensor(used, device=here.device)]
                    columns, numbers = torch.split(rows, here.widths, dim=1), packed.to(rows.device)
                    placed.append(MixTables.over(columns, numbers, tables.route.clone()))
                    placed[-1].tokens = tables.tokens
            kept = self._over(tuple(placed))
            kept.streams = streams
            self._kept = weakref.ref(kept)
        return kept

    @outside_modes
    def recorded(self, bank: Bank) -> Worn:
        """The same for a program that is recorded now, which keeps the numbers; in torch's operations."""
        self.compose(bank)
        kept = self.kept(bank)
        made = kept._over(kept.placed)
        made.is_recorded = True
        return made

    def _over(self, placed: tuple[MixTables, ...]) -> Worn:
        """The same numbers, with other tables for the kernels."""
        made = Worn(self.route, self.rows, self.composed, placed)
        made.of = self.of or self
        made.length, made.images, made._acts = self.length, self.images, self._acts
        made.is_behind, made.is_recorded = self.is_behind, self.is_recorded
        return made

    def order(self, bank: Bank) -> None:
        """Lets the current stream of each CUDA device wait for the one that this was written in."""
        of = self.of or self
        for place, (written, table) in enumerate(zip(of.streams, bank.tables, strict=False)):
            if written is None:
                continue
            here = current_stream(table.device)
            if here == written:
                continue
            here.wait_stream(written)
            table.is_read_by_streams = True
            of.lent = True  # memory that several streams read is left to torch's allocator
            tables, site = self.placed[place], bank.places.index(place) if bank.places else 0
            for written_there in (tables.mixes, tables.route, self.composed.scale(site)):
                if written_there.is_cuda:
                    written_there.record_stream(here)

    def write_to(self, memory: Memory, rows: int | None) -> None:
        """Writes the same into memory for a batch of so many rows; not what no such batch can wear."""
        shelf, index = self.shelf, self.route.index
        if shelf is None or self.memory is memory:
            return
        route = self.route
        if index is None and rows is not None:
            route = Route(route.mixes, torch.zeros(rows, dtype=torch.int64, device="cpu"))
        if route.by_token or (None if route.index is None else len(route.index)) != rows:
            return
        holder = None if memory.holder is None else memory.holder()
        if holder is not None:
            holder._move(shelf)  # others may wear it on, or it may be worn again
        memory.holder = None
        memory.write(shelf.bank, route, shelf.backend, shelf.composes, current_streams(shelf.bank))

    def lend(self) -> Memory | None:
        """Gives its memory to CUDA graphs, which read it at its address from now on; None where it has none."""
        if self.memory is not None:
            self.lent = True
            self.memory.holder = weakref.ref(self)
        return self.memory

    def within(self, memory: Memory) -> Worn:
        """The same numbers in memory that holds them already."""
        made = Worn(self.route, self.rows, memory.composed, memory.placed)
        made.images, made.streams, made.lent = self.images, memory.streams, True
        return made

    def _move(self, shelf: Shelf) -> None:
        """Takes other memory, and leaves the one that it has to CUDA graphs."""
        memory = shelf.written(self.route, self.rows)
        self.memory, self.composed, self.placed, self.tables = memory, memory.composed, memory.placed, memory.placed[0]
        self.spread, self.streams = {}, memory.streams

    def __deepcopy__(self, memo: object) -> None:
        """Nothing: a copy of the model has a bank of its own, and lays its own tables."""

    def __del__(self) -> None:
        """Gives the memory back."""
        if self.shelf is not None and self.memory is not None and not self.lent:
            self.shelf.put(self.rows, self.memory)


class Shelf:
    """Makes what is worn, of memory that is free, or new where there is none.

    Memory is free for who writes in the streams that it was written in: what still reads it there comes first, and what
    was read in another one is `lent`.
    """

    def __init__(self, bank: Bank, backend: Backend) -> None:
        self.bank = bank
        self.backend: Backend = backend
        self.composes = backend == "torch"
        self._free: OrderedDict[tuple[int | None, Streams], list[Memory]] = OrderedDict()
        self._tables = bank.tables  # that they are for

    def lay(self, route: Route) -> Worn:
        """What `route` is over the rows that it has."""
        rows = None if route.index is None else len(route.index)
        memory = self.written(route, rows)
        worn = Worn(route, rows, memory.composed, memory.placed)
        worn.memory, worn.shelf, worn.streams = memory, self, memory.streams
        return worn

    def written(self, route: Route, rows: int | None) -> Memory:
        """Memory with a route of so many rows in it."""
        streams = current_streams(self.bank)
        memory = self._take(rows, streams)
        memory.write(self.bank, route, self.backend, self.composes, streams)
        for here, stream in zip(self.bank.tables, streams, strict=False):
            if stream is not None:
                here.read_in(stream)
        return memory

    def put(self, rows: int | None, memory: Memory) -> None:
        """Takes memory for so many rows that nothing reads any more."""
        memory.route = None
        key = rows, memory.streams
        free = self._free.setdefault(key, [])
        if len(free) < _KEPT:
            free.append(memory)
        self._free.move_to_end(key)
        if len(self._free) > _KINDS:
            self._free.popitem(last=False)

    def _take(self, rows: int | None, streams: Streams) -> Memory:
        if self._tables is not self.bank.tables:
            self._free.clear()
            self._tables = self.bank.tables
        try:
            return self._free[rows, streams].pop()
        except (KeyError, IndexError):
            return Memory()

    def __deepcopy__(self, memo: dict[int, object]) -> Shelf:
        """One that is empty, over the copy of the bank."""
        made = Shelf(copy.deepcopy(self.bank, memo), self.backend)
        made.composes = self.composes
        return made

"""The host's side of a table: where the tensors of a launch lie, in one array of int64 on the device."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from itertools import accumulate, chain
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from ..layout import block_index

# Elements: parts of the flat buffers begin at multiples, and one Philox block has as many signs.
UNIT = 128

# Of tables that are kept. Allocations have at least the second of these.
_MOST_BYTES = 1 << 25
_LEAST_BYTES = 512

# What captured graphs read in every replay, and what that is copied from: for as long as the process lives.
_captured: list[Tensor] = []


class Stream(NamedTuple):
    """An array per tensor: where each begins, and the size of its elements in bytes."""

    addresses: tuple[int, ...]
    itemsize: int


class Parts(NamedTuple):
    """The parts of a flat buffer that belong to the tensors: where it begins, the size of its elements, and offsets."""

    address: int
    itemsize: int
    offsets: tuple[int, ...]


class Contents(NamedTuple):
    """What a table is made of, and known by.

    Attributes:
        lengths: the number of elements of each tensor.
        units: the size of a tile, in units.
        streams: the arrays that the kernel reads or writes.
        rows: which row of the counts and of per_row belongs to each tensor, for kernels that need them.
        indices: the index of each tensor's first element among all of the optimizer, for kernels that draw signs: units
            are Philox blocks then, and a tensor need not begin at the first element of one.
        shifts: of each tensor the base-2 logarithm of how many elements share one in streams by blocks.
    """

    lengths: tuple[int, ...]
    units: int
    streams: tuple[Stream | Parts, ...]
    rows: tuple[int, ...] = ()
    indices: tuple[int, ...] = ()
    shifts: tuple[int, ...] = ()


class Table(NamedTuple):
    """A table on the device: its fields one after the other, as tiles.py names them."""

    memory: Tensor
    entries: int
    units: int  # of a tile
    tiles: int


class Kept:
    """What earlier launches have copied to their device, as long as it takes no more than so many bytes.

    Gradients come to lie in a few places by turns, so most launches find what they need.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._bytes = 0
        self._tables: OrderedDict[Hashable, Table] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable, make: Callable[[], Table]) -> Table:
        """What was made for this key, or what is made now; that which was asked for longest ago makes room."""
        with self._lock:
            table = self._tables.pop(key, None)
            if table is None:
                table = make()
                self._bytes += _size(table)
            self._tables[key] = table
            while self._bytes > self._most_bytes and len(self._tables) > 1:
                self._bytes -= _size(self._tables.popitem(last=False)[1])
            return table


def _size(table: Table) -> int:
    return max(table.memory.nbytes, _LEAST_BYTES)


_kept = Kept(_MOST_BYTES)


def lengths_of(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """The number of elements of each."""
    return tuple(t.numel() for t in tensors)


def stream_of(tensors: Sequence[Tensor]) -> Stream:
    """The memory of dense tensors of one dtype; ValueError where one, such as a DTensor, has none of its own."""
    addresses = tuple(t.data_ptr() for t in tensors)
    if not all(addresses):
        for i, (t, address) in enumerate(zip(tensors, addresses, strict=True)):
            if address == 0 and t.numel() > 0:
                raise ValueError(f"tensor {i} is a {type(t).__name__}, which has no memory of its own")
    return Stream(addresses, tensors[0].element_size() if tensors else 0)


def parts_of(flat: Tensor, offsets: tuple[int, ...]) -> Parts:
    """The parts of a flat buffer that begin at these elements."""
    return Parts(flat.data_ptr(), flat.element_size(), offsets)


def blocks_at(
    flats: Sequence[Tensor], offsets: Sequence[int], block: int, blocked: int
) -> tuple[tuple[Parts, ...], tuple[int, ...]]:
    """The parts of buffers in which elements below blocked share one by blocks, and the shifts of their tensors."""
    places = tuple(block_index(offset, block, blocked) for offset in offsets)
    shifts = tuple((block if offset < blocked else 1).bit_length() - 1 for offset in offsets)
    return tuple(parts_of(flat, places) for flat in flats), shifts


def table_on(device: torch.device, contents: Contents) -> Table:
    """The table with these contents: that of an earlier launch where there was one on the same stream."""
    return _kept_on(device, contents, lambda: _table(device, contents))


def numbers_on(device: torch.device, numbers: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """Numbers on the device: those of an earlier launch where there were the same ones on the same stream."""
    return _kept_on(device, (dtype, numbers), lambda: Table(_copied(device, numbers, dtype), 0, 0, 0)).memory


def _kept_on(device: torch.device, key: Hashable, make: Callable[[], Table]) -> Table:
    if device.type != "cuda":
        return make()
    with torch.cuda.device(device):
        # A graph's memory is its own.
        if torch.cuda.is_current_stream_capturing():
            return make()
        # The copy is in the order of the stream that it is made on.
        stream = torch.cuda.current_stream(device).cuda_stream
        return _kept.get((device, stream, key), make)


def _copied(device: torch.device, numbers: Sequence[float], dtype: torch.dtype = torch.int64) -> Tensor:
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=dtype, device=device)
    # Pinned: nobody waits for the copy. The allocator gives the memory to nobody else before it is done.
    pinned = torch.tensor(numbers, dtype=dtype, device="cpu", pin_memory=True)
    copied = pinned.to(device, non_blocking=True)
    if torch.cuda.is_current_stream_capturing():
        _captured.extend((pinned, copied))
    return copied


def _table(device: torch.device, contents: Contents) -> Table:
    count = len(contents.lengths)
    skips = [index % UNIT for index in contents.indices] or [0] * count
    lengths = [length + skip if length else 0 for length, skip in zip(contents.lengths, skips, strict=True)]
    size = contents.units * UNIT
    first_tiles = list(accumulate((-(-length // size) for length in lengths), initial=0))
    numbers = contents.rows or [index // UNIT for index in contents.indices] or [0] * count
    shifts = contents.shifts or [0] * count
    fields = [first_tiles[:-1], skips, lengths, numbers, shifts, *(_addresses(s, skips) for s in contents.streams)]
    return Table(_copied(device, list(chain(*fields))), count, contents.units, first_tiles[-1])


def _addresses(stream: Stream | Parts, skips: Sequence[int]) -> list[int]:
    if isinstance(stream, Parts):
        starts = [stream.address + offset * stream.itemsize for offset in stream.offsets]
    else:
        starts = list(stream.addresses)
    return [start - skip * stream.itemsize for start, skip in zip(starts, skips, strict=True)]

"""The host's side of a table: where the tensors of a launch lie, in one array of int64 on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from torch import Tensor

# Elements: parts of the flat buffers begin at multiples, and one Philox block has as many signs.
UNIT = 128

# Tables that are kept: gradients come to lie in a few places by turns, and a step has a few launches per bucket.
_KEPT = 64

# What the graphs that were captured read from in every replay: for as long as the process lives.
_captured: list[Table] = []


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
        rows: which row of the counts belongs to each tensor, for kernels that need them.
        indices: the index of each tensor's first element among all of the optimizer, for kernels that draw signs: units
            are Philox blocks then, and a tensor need not begin at the first element of one.
        extra: numbers behind the table.
    """

    lengths: tuple[int, ...]
    units: int
    streams: tuple[Stream | Parts, ...]
    rows: tuple[int, ...] = ()
    indices: tuple[int, ...] = ()
    extra: tuple[int, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table on the device, its fields one after the other as tiles.py names them, then the extra numbers."""

    memory: Tensor
    count: int
    units: int  # of a tile
    tiles: int
    pinned: Tensor | None  # what the memory is copied from


def lengths_of(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """The number of elements of each."""
    return tuple(t.numel() for t in tensors)


def stream_of(tensors: Sequence[Tensor]) -> Stream:
    """The memory of dense tensors of one dtype."""
    return Stream(tuple(t.data_ptr() for t in tensors), tensors[0].element_size() if tensors else 0)


def parts_of(flat: Tensor, offsets: Sequence[int]) -> Parts:
    """The parts of a flat buffer that begin at these elements."""
    return Parts(flat.data_ptr(), flat.element_size(), tuple(offsets))


def table_on(device: torch.device, contents: Contents) -> Table:
    """The table with these contents: that of an earlier launch where there was one on the same stream."""
    if device.type != "cuda":
        return _build(device, contents)
    if torch.cuda.is_current_stream_capturing():
        _captured.append(_build(device, contents))
        return _captured[-1]
    return _kept(device, torch.cuda.current_stream(device).cuda_stream, contents)


@lru_cache(_KEPT)
def _kept(device: torch.device, stream: int, contents: Contents) -> Table:
    return _build(device, contents)


def _addresses(stream: Stream | Parts, skips: Sequence[int]) -> list[int]:
    if isinstance(stream, Parts):
        starts = [stream.address + offset * stream.itemsize for offset in stream.offsets]
    else:
        starts = list(stream.addresses)
    return [start - skip * stream.itemsize for start, skip in zip(starts, skips, strict=True)]


def _build(device: torch.device, contents: Contents) -> Table:
    count = len(contents.lengths)
    skips = [index % UNIT for index in contents.indices] or [0] * count
    lengths = [length + skip if length else 0 for length, skip in zip(contents.lengths, skips, strict=True)]
    size = contents.units * UNIT
    first_tiles = list(accumulate((-(-length // size) for length in lengths), initial=0))
    numbers = contents.rows or [index // UNIT for index in contents.indices] or [0] * count
    fields = [first_tiles[:-1], skips, lengths, numbers, *(_addresses(s, skips) for s in contents.streams)]
    words = list(chain(*fields, contents.extra)) or [0]
    if device.type != "cuda":
        return Table(torch.tensor(words, dtype=torch.int64), count, contents.units, first_tiles[-1], None)
    # Pinned: nobody waits for the copy. The allocator gives the memory to nobody else before it is done.
    pinned = torch.tensor(words, dtype=torch.int64, pin_memory=True)
    return Table(pinned.to(device, non_blocking=True), count, contents.units, first_tiles[-1], pinned)

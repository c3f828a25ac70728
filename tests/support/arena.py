"""Where PTX runs on the tensors of an operator's call: memory that is the host's and the device's (tests only).

Host and device share one address space: the memory of ptxrun's device is mapped where its device addresses say. So
pointers in a kernel's arguments hold as they are, and one that does not point into a tensor of the call is an access
out of bounds.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import ptxrun
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sassha_fused.settings import settings_of
from tests.support.cases import block_part

# What every launch is checked for.
CHECKS: dict[str, Any] = {"race": "full", "uninit": True, "strict": True}

ARENA_BYTES = 1 << 30
PAGE = 4096
# For scratch memory, beside a working copy of every tensor.
SPARE_BYTES = 1 << 22
# What lies between two allocations and belongs to none; less where there are very many.
GAP = 65536
MOST_GAP_BYTES = 1 << 22

# By the size of an element: a type, and its value with a 1 in every byte.
_ONES = {
    1: (torch.uint8, 0x01),
    2: (torch.int16, 0x0101),
    4: (torch.int32, 0x01010101),
    8: (torch.int64, 0x0101010101010101),
}
# The arguments that are flat buffers, and those of them that have a number for several elements: only the parts of
# parameters in them are theirs to read.
_FLAT = ("backup", "exp_avg", "exp_hessian", "averaged", "estimate")
_BY_BLOCKS = ("exp_hessian", "averaged")

_aten = torch.ops.aten
_UNWRITTEN = (
    _aten.empty.memory_format,
    _aten.new_empty.default,
    _aten.empty_like.default,
    # Other views of memory whose state is known.
    _aten.detach.default,
    _aten.view.default,
)
_WRITTEN = (_aten.clone.default, _aten._to_copy.default, _aten.copy_.default, _aten.lift_fresh.default)


@dataclass(frozen=True)
class Run:
    """A launch that ptxrun has executed without a finding: what it counted, and how many threads there were."""

    name: str
    blocks: int
    threads: int
    stats: ptxrun.Stats


@functools.cache
def _arena() -> np.ndarray:
    """Memory whose addresses are those that ptxrun's devices count from."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    address = libc.mmap(ptxrun.GBASE, ARENA_BYTES, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    assert address == ptxrun.GBASE, f"no memory is to be had at {ptxrun.GBASE:#x}: errno {ctypes.get_errno()}"
    return np.ctypeslib.as_array((ctypes.c_uint8 * ARENA_BYTES).from_address(address))


class Memory(ptxrun.Device):
    """The memory of one call, for storages of these sizes and a copy of each.

    Of what the host wrote, only the elements of tensors count as initialised.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        gap = max(PAGE, min(GAP, MOST_GAP_BYTES // max(len(sizes), 1) // PAGE * PAGE))
        super().__init__(capacity=0, gap=gap)
        capacity = SPARE_BYTES + 2 * sum(-(-size // PAGE) * PAGE + gap for size in sizes)
        assert capacity <= ARENA_BYTES, f"{capacity} bytes are more than the arena has"
        self.mem = _arena()[:capacity]
        self.init = np.zeros(capacity, bool)

    def alloc(self, nbytes: int, name: str | None = None) -> int:
        assert self.used + nbytes + 256 + self.gap <= self.mem.size, "the memory is full, and must not move"
        start = cast(int, super().alloc(nbytes, name))
        self._bytes(self.mem, start, nbytes).fill(0xFF)
        return start

    def storage(self, like: torch.UntypedStorage) -> int:
        """The address of a copy of a storage's bytes."""
        start = self.alloc(like.nbytes())
        torch.from_numpy(self._bytes(self.mem, start, like.nbytes())).copy_(_bytes_of(like))
        return start

    def tensor(self, like: Tensor, start: int) -> Tensor:
        """A tensor that lies in the storage at an address as another one lies in its own."""
        return self._view(self.mem, like, start)

    def mark_written(self, t: Tensor, start: int) -> None:
        """Notes that the elements of such a tensor, and nothing between them, may be read."""
        dtype, ones = _ONES[t.element_size()]
        self._view(self.init.view(np.uint8), t, start, dtype).fill_(ones)

    def write_back(self, storage: torch.UntypedStorage, start: int) -> None:
        """Copies what is at an address, guard zones and all, to the storage that it was copied from."""
        _bytes_of(storage).copy_(torch.from_numpy(self._bytes(self.mem, start, storage.nbytes())))

    def start_of(self, t: Tensor) -> int | None:
        """The address of a tensor's storage if it is in this memory."""
        address = t.untyped_storage().data_ptr()
        return address if ptxrun.GBASE <= address < ptxrun.GBASE + self.mem.size else None

    @staticmethod
    def _bytes(array: np.ndarray, start: int, nbytes: int) -> np.ndarray:
        return array[start - ptxrun.GBASE :][:nbytes]

    def _view(self, array: np.ndarray, like: Tensor, start: int, dtype: torch.dtype | None = None) -> Tensor:
        usable = like.untyped_storage().nbytes() // like.element_size() * like.element_size()
        memory = torch.from_numpy(self._bytes(array, start, usable)).view(dtype or like.dtype)
        return memory.as_strided(like.shape, like.stride(), like.storage_offset())


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(cast(Any, storage))


class OnDevice(TorchDispatchMode):
    """Whatever tensors the glue makes lie in the memory of the call too; fresh ones are not initialised."""

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory = memory

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function in _UNWRITTEN + _WRITTEN, f"{function}: how it changes what is initialised is not known"
        made: Tensor = function(*args, **(kwargs or {}))
        start = self.memory.start_of(made)
        if start is None:
            start = self.memory.storage(made.untyped_storage())
            made = self.memory.tensor(made, start)
        if function in _WRITTEN:
            self.memory.mark_written(made, start)
        return made


@contextmanager
def on_device(named: dict[str, Any]) -> Iterator[tuple[Memory, list[Any]]]:
    """The arguments of an operator by name, in memory of their own, where only their elements are initialised.

    What becomes of them, guard zones and all, is copied back at the end.
    """
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in _tensors(list(named.values()))}
    memory = Memory([storage.nbytes() for storage in storages.values()])
    starts = {key: memory.storage(storage) for key, storage in storages.items()}

    def start_of(t: Tensor) -> int:
        return starts[t.untyped_storage()._cdata]

    for argument, value in named.items():
        for t in _tensors(value):
            for piece in _parts(argument, t, named) if argument in _FLAT else [t]:
                memory.mark_written(piece, start_of(t))
    yield memory, _converted(list(named.values()), lambda t: memory.tensor(t, start_of(t)))
    for key, storage in storages.items():
        memory.write_back(storage, starts[key])
    # What still points to the memory, in cycles that are seldom looked for, keeps no bytes with it.
    memory.mem = memory.init = np.empty(0, bool)


def _parts(argument: str, flat: Tensor, named: dict[str, Any]) -> list[Tensor]:
    """The parts of a flat buffer that belong to the parameters of a call."""
    lists = named["params"] if "params" in named else named["products"]
    block = int(settings_of(named["settings"]).hessian_block) if argument in _BY_BLOCKS else 1
    blocked = named["blocked"] if argument in _BY_BLOCKS else 0
    return [
        block_part(flat, offset, like.numel(), block, blocked)
        for offset, like in zip(named["offsets"], lists, strict=True)
    ]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _converted(value: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return convert(value)
    return [_converted(item, convert) for item in value] if isinstance(value, (list, tuple)) else value

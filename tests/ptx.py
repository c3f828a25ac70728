"""The PTX that nvcc makes of csrc/cuda, run on the CPU by ptxrun at every launch of the real launchers (tests only).

The emulation of tests/emulation.py runs the torch glue and the launchers; each launch, instead of running what g++ made
of the kernel, runs what nvcc made of it. Host and device share one address space: the memory of ptxrun's device is
mapped where its device addresses say. So pointers in a kernel's arguments hold as they are, and one that does not point
into a tensor of the call is an access out of bounds.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import mmap
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import ptxrun
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sassha_fused.ops import NAMES, Operators
from tests import emulation
from tests.cases import part

BUILD = emulation.ROOT / "build" / "ptx"
ARCHITECTURE = "compute_90"
# Those of setup.py that change what is computed.
FLAGS = ("-std=c++17", "-O3", "-fmad=false")

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
# The arguments that are flat buffers: only the parts of parameters in them are theirs to read.
_FLAT = ("backup", "exp_avg", "exp_hessian", "estimate")

_aten = torch.ops.aten
_EMPTY = (_aten.new_empty.default, _aten.empty_like.default)
_WRITTEN = (_aten.clone.default, _aten._to_copy.default, _aten.copy_.default)


# ---------------------------------------------------------------------------------------------------------------------
# From source to kernels


def nvcc() -> str | None:
    """CUDA's compiler, looked for where setup.py looks."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next(filter(None, map(shutil.which, places)), None)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    return done.stdout


def build(csrc: Path = emulation.ROOT / "csrc", architecture: str = ARCHITECTURE) -> list[Path]:
    """The PTX of every file in csrc/cuda; what was compiled before, from the same headers, is not compiled again."""
    compiler = nvcc()
    assert compiler is not None, "nvcc was not found"
    BUILD.mkdir(parents=True, exist_ok=True)
    command = (compiler, "-ptx", *FLAGS, f"-arch={architecture}", "-ccbin", emulation.compiler().split()[0])
    shared = hashlib.sha256("\0".join((*command[1:], _run(compiler, "--version"))).encode())
    for header in sorted(csrc.rglob("*.h")):
        shared.update(f"\0{header.relative_to(csrc)}\0".encode() + header.read_bytes())
    found = []
    for source in sorted((csrc / "cuda").glob("*.cu")):
        key = shared.copy()
        key.update(source.read_bytes())
        path = BUILD / f"{source.stem}-{architecture}-{key.hexdigest()[:32]}.ptx"
        if not path.exists():
            unfinished = path.with_suffix(f".{os.getpid()}")
            _run(*command, f"-I{csrc}", str(source), "-o", str(unfinished))
            unfinished.rename(path)
        found.append(path)
    return found


@functools.cache
def kernels() -> dict[str, ptxrun.Kernel]:
    """Every kernel of csrc/cuda by its mangled name."""
    modules = [ptxrun.load(path.read_text()) for path in build()]
    return {name: module[name] for module in modules for name in module.kernels()}


# ---------------------------------------------------------------------------------------------------------------------
# Memory that is the host's and the device's


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


class _OnDevice(TorchDispatchMode):
    """Whatever tensors the glue makes lie in the memory of the call too; fresh ones are not initialised."""

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory = memory

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function in _EMPTY + _WRITTEN, f"{function}: how it changes what is initialised is not known"
        made: Tensor = function(*args, **(kwargs or {}))
        start = self.memory.start_of(made)
        if start is None:
            start = self.memory.storage(made.untyped_storage())
            made = self.memory.tensor(made, start)
        if function in _WRITTEN:
            self.memory.mark_written(made, start)
        return made


# ---------------------------------------------------------------------------------------------------------------------
# Operators


@dataclass(frozen=True)
class Run:
    """A launch that ptxrun has executed without a finding: what it counted, and how many threads there were."""

    name: str
    blocks: int
    threads: int
    stats: ptxrun.Stats


@dataclass
class Backend:
    """The operators of csrc/cuda as nvcc compiles them, on CPU tensors.

    A race (within a block, or between blocks), a read of memory that nothing has written or that lies outside of every
    tensor, a misaligned access or a barrier that not all threads reach raises ptxrun.PtxError.
    """

    runs: list[Run] = field(default_factory=list)

    def operators(self) -> Operators:
        """The five functions; each notes its launches in runs."""
        return cast(Operators, SimpleNamespace(**{name: functools.partial(self._call, name) for name in NAMES}))

    def _call(self, name: str, *arguments: Any) -> Tensor | None:
        emulation.emulated()
        operator = getattr(torch.ops.sassha_fused_emulated, name).default
        tensors = list(_tensors(arguments))
        storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}
        memory = Memory([storage.nbytes() for storage in storages.values()])
        starts = {key: memory.storage(storage) for key, storage in storages.items()}

        def start_of(t: Tensor) -> int:
            return starts[t.untyped_storage()._cdata]

        named = {declared.name: value for declared, value in zip(operator._schema.arguments, arguments)}
        for argument, value in named.items():
            for t in _tensors(value):
                parts = [t]
                if argument in _FLAT:
                    lists = named["params"] if "params" in named else named["products"]
                    parts = [part(t, offset, like) for offset, like in zip(named["offsets"], lists, strict=True)]
                for piece in parts:
                    memory.mark_written(piece, start_of(t))
        on_device = _converted(arguments, lambda t: memory.tensor(t, start_of(t)))
        with emulation.intercepted(functools.partial(self._launch, memory)), _OnDevice(memory):
            # Straight to the kernel, or the mode would see the operator itself and not what it calls.
            result = operator.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *on_device)
        for key, storage in storages.items():
            memory.write_back(storage, starts[key])
        return None if result is None else result.clone()

    def _launch(self, memory: Memory, launch: emulation.Launch) -> None:
        kernel = kernels()[launch.name]
        checks = {"race": "full", "uninit": True, "strict": True}
        stats = kernel.launch(launch.blocks, launch.threads, [launch.arguments], memory, **checks)
        self.runs.append(Run(launch.name, launch.blocks, launch.threads, stats))


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

"""The PTX that Triton makes of triton_kernels, run on the CPU by ptxrun at every launch of the operators (tests only).

The operators run as Python, as on a GPU up to the launch: the same checks, tables and numbers of programs. Each launch
runs what Triton compiled of the kernel for ARCHITECTURE, in the memory of tests/support/arena.py.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import ptxrun
import pytest
import torch
import triton
from torch import Tensor

from bench.ptx import FOLDER as BUILD
from bench.ptx import compile_all
from bench.triton_code import Compiled, Variant
from sassha_fused import triton_kernels
from sassha_fused.ops import NAMES, Operators
from sassha_fused.triton_kernels import block_average, hutchinson, norm, perturb, rademacher, update
from sassha_fused.triton_kernels import launch as starting
from sassha_fused.triton_kernels.table import Table
from tests.support import arena, garbage
from tests.support.turns import turn

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURE = "sm_90"
WARP_SIZE = 32
# So few that each program has several tiles of the longer lists.
MULTIPROCESSORS = 8

_GPU = torch.device("cuda")
# The modules that start kernels, or ask how.
_MODULES: tuple[ModuleType, ...] = (starting, norm, perturb, rademacher, hutchinson, block_average, update)


# ---------------------------------------------------------------------------------------------------------------------
# From source to kernels


def build() -> Path:
    """A folder with every variant compiled; what was compiled before, from the same sources, is not compiled again."""
    compiler = ROOT / "bench" / "triton_code.py"
    key = hashlib.sha256(f"{triton.__version__}\0{ARCHITECTURE}".encode())
    for source in (compiler, *sorted((ROOT / "triton_kernels").glob("*.py"))):
        key.update(f"\0{source.name}\0".encode() + source.read_bytes())
    folder = BUILD / f"{ARCHITECTURE}-{key.hexdigest()[:32]}"
    with turn(BUILD):
        if not folder.exists():
            unfinished = BUILD / "unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            compile_all(unfinished, (ARCHITECTURE,), cache=BUILD / "cache")
            unfinished.rename(folder)
    return folder


@functools.cache
def compiled() -> dict[str, Compiled]:
    """What was compiled, by the names of the variants."""
    return {entry.variant.name: entry for entry in Compiled.read(build())}


@functools.cache
def _loaded(name: str) -> Any:
    module = ptxrun.load((build() / compiled()[name].files["ptx"]).read_text())
    garbage.keep()
    return module


def _kernel(name: str) -> ptxrun.Kernel:
    """A new one each time, for it holds the registers of its last launch."""
    return _loaded(name)[compiled()[name].symbol]


# ---------------------------------------------------------------------------------------------------------------------
# What ptxrun lacks: a warp moves four matrices of 8 rows of 16 bytes, whose rows each eight threads in turn point to


def _matrix_moves(instruction: Any, name: str, modifiers: Any, operands: list[Any]) -> Callable[[Any, Any], None]:
    transposed = modifiers.has("trans")
    rest = ["sync", "aligned", "m8n8", "x4", "shared", "b16"]
    if modifiers.p != rest:
        raise ptxrun.PtxError(f"form of {name} not implemented: {modifiers.p}")
    vector, pointer = operands if name == "ldmatrix" else operands[::-1]
    row_address = ptxrun.address(pointer)
    whole = ptxrun.TY["b32"]
    registers = [ptxrun.putter(e, whole) if name == "ldmatrix" else ptxrun.getter(e, whole) for e in vector.e]

    def pieces(batch: Any, lanes: Any) -> Iterator[tuple[int, int, int, np.ndarray]]:
        """Of each register what lies together: its number, first bit and bytes, and each thread's address."""
        threads = batch.tids(lanes)
        batch.check_mask(instruction, threads, np.array([0xFFFFFFFF], np.uint32))
        rows = np.broadcast_to(row_address(batch, lanes), threads.shape).reshape(-1, 4, 8)
        if (rows % np.uint64(16)).any():
            batch.fault(instruction, threads[0], "misaligned row of a matrix")
        lane = np.arange(32)
        for j in range(4):
            if transposed:
                for half in range(2):
                    at = rows[:, j, lane % 4 * 2 + half] + (lane // 4 * 2).astype(np.uint64)
                    yield j, 16 * half, 2, at.reshape(-1)
            else:
                yield j, 0, 4, (rows[:, j, lane // 4] + (lane % 4 * 4).astype(np.uint64)).reshape(-1)

    def load(batch: Any, lanes: Any) -> None:
        values = np.zeros((4, len(batch.tids(lanes))), np.uint32)
        for j, bit, size, at in pieces(batch, lanes):
            (found,) = batch.load(instruction, "shared", at, size, 1, lanes)
            values[j] |= found.astype(np.uint32) << np.uint32(bit)
        for put, value in zip(registers, values, strict=True):
            put(batch, lanes, value)

    def store(batch: Any, lanes: Any) -> None:
        for j, bit, size, at in pieces(batch, lanes):
            value = np.broadcast_to(registers[j](batch, lanes), at.shape) >> np.uint32(bit)
            batch.store(instruction, "shared", at, size, [value.astype(f"u{size}")], lanes)

    return load if name == "ldmatrix" else store


for _name in ("ldmatrix", "stmatrix"):
    if _name not in ptxrun.OPS:
        ptxrun.op(_name)(_matrix_moves)


# ---------------------------------------------------------------------------------------------------------------------
# Operators


@dataclass
class Backend:
    """The operators of triton_kernels as Triton compiles them, on CPU tensors.

    A race (within a program, or between programs), a read of memory that nothing has written or that lies outside of
    every tensor, a misaligned access or a barrier that not all threads reach raises ptxrun.PtxError.
    """

    multiprocessors: int = MULTIPROCESSORS
    # Of those who want to know; what was counted of a launch takes much memory.
    runs: list[arena.Run] | None = None

    def operators(self) -> Operators:
        """The functions; each notes its launches in runs, if that is a list."""
        return cast(Operators, SimpleNamespace(**{name: functools.partial(self._call, name) for name in NAMES}))

    def _call(self, name: str, *arguments: Any) -> Tensor | None:
        operator = getattr(triton_kernels, name)
        named = dict(zip(inspect.signature(operator).parameters, arguments, strict=True))
        with arena.on_device(named) as (memory, on_device):
            with self._as_on_a_gpu(memory), arena.OnDevice(memory):
                result: Tensor | None = operator(*on_device)
            return None if result is None else result.clone()

    @contextmanager
    def _as_on_a_gpu(self, memory: arena.Memory) -> Iterator[None]:
        """Tiles and programs are those of a GPU, and launches come to this backend; for other tests nothing changes."""
        properties = SimpleNamespace(warp_size=WARP_SIZE, multi_processor_count=self.multiprocessors)
        units_on, programs, on_gpu = starting.units_on, starting.programs, SimpleNamespace(device=_GPU)

        def programs_on_gpu(table: Table, *registers: int) -> int:
            return programs(cast(Table, SimpleNamespace(memory=on_gpu, tiles=table.tiles)), *registers)

        instead: dict[Any, Any] = {
            starting.launch: functools.partial(self._launch, memory),
            units_on: lambda device, *rest: units_on(_GPU, *rest),
            programs: programs_on_gpu,
        }
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
            for module in _MODULES:
                for name, value in list(vars(module).items()):
                    if inspect.isfunction(value) and value in instead:
                        patch.setattr(module, name, instead[value])
            yield

    def _launch(
        self,
        memory: arena.Memory,
        kernel: Any,
        device: torch.device,
        programs: int,
        *arguments: Any,
        registers: int,
        **constants: Any,
    ) -> None:
        assert len(arguments) + len(constants) == len(kernel.arg_names)
        named = {name: getattr(value, "name", value) for name, value in constants.items()}
        entry = compiled()[Variant(kernel.__name__, named, registers).name]
        assert entry.variant.registers == registers
        code = _kernel(entry.variant.name)
        values = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
        for value, (name, kind, _) in zip(values, code.params):
            assert kind.startswith("f") or isinstance(value, int), f"{name} is {kind}, and given {value!r}"
        stats = code.launch(programs, entry.threads, values, memory, shared_bytes=entry.shared, **arena.CHECKS)
        if self.runs is not None:
            self.runs.append(arena.Run(entry.variant.name, programs, entry.threads, stats))

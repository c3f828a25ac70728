"""The PTX that nvcc makes of csrc/cuda, run on the CPU by ptxrun at every launch of the real launchers (tests only).

The emulation of tests/support/emulation.py runs the torch glue and the launchers; each launch,
instead of running what g++ made of the kernel, runs what nvcc made of it, in the memory of tests/support/arena.py.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import ptxrun
import torch
from torch import Tensor

from sassha_fused.ops import NAMES, Operators
from tests.support import arena, emulation, garbage
from tests.support.turns import turn

BUILD = emulation.ROOT / "build" / "ptx"
ARCHITECTURE = "compute_90"
# Those of setup.py that change what is computed.
FLAGS = ("-std=c++17", "-O3", "-fmad=false")
# Of the emulated device: so few blocks that their loops over what is left of a table come round several times.
MULTIPROCESSORS = 4


# ---------------------------------------------------------------------------------------------------------------------
# From source to kernels


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    return done.stdout


CSRC = emulation.ROOT / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))


def build(architecture: str, sources: Sequence[Path]) -> list[Path]:
    """The PTX of files; what was compiled before, from the same headers, is not compiled again."""
    compiler = emulation.nvcc()
    assert compiler is not None, "nvcc was not found"
    command = (compiler, "-ptx", *FLAGS, f"-arch={architecture}", "-ccbin", emulation.compiler().split()[0])
    shared = hashlib.sha256("\0".join((*command[1:], _run(compiler, "--version"))).encode())
    for header in sorted(CSRC.rglob("*.h")):
        shared.update(f"\0{header.relative_to(CSRC)}\0".encode() + header.read_bytes())

    def compile_one(source: Path) -> Path:
        key = shared.copy()
        key.update(source.read_bytes())
        path = BUILD / f"{source.stem}-{architecture}-{key.hexdigest()[:32]}.ptx"
        if not path.exists():
            unfinished = path.with_suffix(f".{os.getpid()}")
            _run(*command, f"-I{CSRC}", str(source), "-o", str(unfinished))
            unfinished.rename(path)
        return path

    with turn(BUILD), ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, sources))


_ENTRY = re.compile(r"^(?:\.\w+ )*\.entry (\w+)\(.*?^\}\n", re.MULTILINE | re.DOTALL)


@functools.cache
def _modules(source: Path, architecture: str) -> dict[str, str]:
    """A module for each kernel of a file, by its mangled name: a launch sets up the registers of all its module's."""
    # Of the usual architecture all are needed before long, and compiled side by side; of another one few.
    paths = build(architecture, SOURCES if architecture == ARCHITECTURE else [source])
    (path,) = [path for path in paths if path.name.startswith(f"{source.stem}-")]
    text = path.read_text()
    shared = _ENTRY.sub("", text)
    assert ".entry" not in shared, f"{path.name} has a kernel that _ENTRY does not find"
    return {entry[1]: shared + entry[0] for entry in _ENTRY.finditer(text)}


@functools.cache
def _source_of(kernel: str) -> Path:
    """The file of a kernel, by its mangled name."""
    (found,) = [
        source
        for source in SOURCES
        for name in re.findall(r"\b(\w+_kernel)\(const __grid_constant__", source.read_text())
        if kernel.startswith(f"_ZN6sassha4cuda{len(name)}{name}")
    ]
    return found


@functools.cache
def _loaded(name: str, architecture: str) -> Any:
    module = ptxrun.load(_modules(_source_of(name), architecture)[name])
    garbage.keep()
    return module


def kernel(name: str, architecture: str) -> ptxrun.Kernel:
    """A kernel of csrc/cuda by its mangled name; a new one each time, for it holds the registers of its last launch."""
    return _loaded(name, architecture)[name]


def kernels() -> set[str]:
    """The mangled names of every kernel of csrc/cuda."""
    return {name for source in SOURCES for name in _modules(source, ARCHITECTURE)}


# ---------------------------------------------------------------------------------------------------------------------
# Operators


@dataclass
class Backend:
    """The operators of csrc/cuda as nvcc compiles them, on CPU tensors.

    A race (within a block, or between blocks), a read of memory that nothing has written or that lies outside of every
    tensor, a misaligned access or a barrier that not all threads reach raises ptxrun.PtxError.
    """

    architecture: str = ARCHITECTURE
    # Of those who want to know; what was counted of a launch takes much memory.
    runs: list[arena.Run] | None = None

    def operators(self) -> Operators:
        """The five functions; each notes its launches in runs, if that is a list."""
        return cast(Operators, SimpleNamespace(**{name: functools.partial(self._call, name) for name in NAMES}))

    def _call(self, name: str, *arguments: Any) -> Tensor | None:
        emulation.emulated()
        operator = getattr(torch.ops.sassha_fused_emulated, name).default
        named = {declared.name: value for declared, value in zip(operator._schema.arguments, arguments)}
        with arena.on_device(named) as (memory, on_device):
            launches = emulation.intercepted(functools.partial(self._launch, memory))
            with emulation.device(MULTIPROCESSORS, 1), launches, arena.OnDevice(memory):
                # Straight to the kernel, or the mode would see the operator itself and not what it calls.
                result = operator.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *on_device)
            return None if result is None else result.clone()

    def _launch(self, memory: arena.Memory, launch: emulation.Launch) -> None:
        code = kernel(launch.name, self.architecture)
        stats = code.launch(launch.blocks, launch.threads, [launch.arguments], memory, **arena.CHECKS)
        if self.runs is not None:
            self.runs.append(arena.Run(launch.name, launch.blocks, launch.threads, stats))

"""The machine code of the library built in place, taken apart once for all tests and processes (tests only)."""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
from pathlib import Path
from typing import cast

import pytest

from bench import bytes as streams
from bench import loops, sass
from bench.bytes import Kernel
from bench.sass import LIBRARY, NO_TOOL, MachineCode, find_cuobjdump
from tests.support.turns import turn

BUILD = Path(__file__).resolve().parents[2] / "build" / "machine_code"


@functools.cache
def _key() -> str:
    """Of the library, and of what reads it."""
    key = hashlib.sha256(str(find_cuobjdump()).encode())
    for path in (LIBRARY, *(Path(str(module.__file__)) for module in (sass, loops, streams))):
        key.update(hashlib.sha256(path.read_bytes()).digest())
    return key.hexdigest()[:32]


@functools.cache
def codes_of(architecture: str) -> dict[Kernel, MachineCode]:
    """The kernels of an architecture; the test is skipped where there is no library, or nothing to read it with."""
    if not LIBRARY.exists():
        pytest.skip(f"{LIBRARY.name} was not built: nvcc is not here")
    if find_cuobjdump() is None:
        pytest.skip(NO_TOOL)
    file = BUILD / architecture / f"{_key()}.pickle"
    with turn(file.parent):
        if not file.exists():
            unfinished = file.with_suffix(f".{os.getpid()}")
            unfinished.write_bytes(pickle.dumps(sass.read(LIBRARY, [architecture])[architecture]))
            unfinished.rename(file)
    found = cast(dict[Kernel, MachineCode], pickle.loads(file.read_bytes()))
    assert found, f"{LIBRARY.name} has no code for {architecture}: was TORCH_CUDA_ARCH_LIST set when it was built?"
    return found

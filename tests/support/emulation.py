"""The sources in csrc/cuda, kernels, launchers and torch glue, built by g++ to run on CPU tensors (for tests only)."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import torch
from torch.utils.cpp_extension import include_paths, library_paths

from sassha_fused.ops import NAMES, Operators

# The name of the backend that these are.
BACKEND = "cuda_emulated"

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent / "cuda_emulation"
BUILD = ROOT / "build" / "cuda_emulation"

PLAIN = ("-O2",)
SANITIZED = ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")

# A library to load in place of the one built from the repository: how tests with planted faults and sanitizers run.
LIBRARY_VARIABLE = "SASSHA_TEST_EMULATION"

_FLAGS = (
    "-std=c++17",
    "-fPIC",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-Wno-unknown-pragmas",
    "-DTORCH_TARGET_VERSION=0x020a000000000000ULL",
    "-DSASSHA_NAMESPACE=sassha_fused_emulated",
    "-DSASSHA_DISPATCH_KEY=CPU",
    *(f"-isystem{path}" for path in include_paths()),
    f"-I{HERE}",
)


def compiler() -> str:
    """The C++ compiler that the tests use."""
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    assert found is not None, "no C++ compiler was found: install g++, or name one in CXX"
    return found


def _run(*command: str) -> str:
    done = subprocess.run([*compiler().split(), *command], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    return done.stdout


def build(csrc: Path = ROOT / "csrc", options: Sequence[str] = PLAIN) -> Path:
    """Builds the emulated kernels from a copy of csrc; what was compiled before is not compiled again."""
    BUILD.mkdir(parents=True, exist_ok=True)
    sources = [
        csrc / "schema.cpp",
        csrc / "cuda" / "torch.cpp",
        *sorted((csrc / "cuda").glob("*.cu")),
        HERE / "scope.cpp",
        HERE / "control.cpp",
    ]

    def compile_one(source: Path) -> Path:
        # Where a copy lies must not show in __FILE__, or its unchanged sources would be compiled again.
        place = (f"-I{csrc}", f"-ffile-prefix-map={csrc}=csrc")
        arguments = (*_FLAGS, *options, *place)
        language = ("-x", "c++", str(source))
        preprocessed = _run(*arguments, "-E", "-P", *language)
        key = hashlib.sha256("\0".join((*_FLAGS, *options, preprocessed)).encode()).hexdigest()
        object_file = BUILD / f"{source.stem}-{key[:32]}.o"
        if not object_file.exists():
            unfinished = object_file.with_suffix(f".{os.getpid()}.o")
            _run(*arguments, "-c", *language, "-o", str(unfinished))
            unfinished.rename(object_file)
        return object_file

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(path) for path in pool.map(compile_one, sources)]
    name = hashlib.sha256("\0".join(objects).encode()).hexdigest()[:32]
    library = BUILD / f"emulated-{name}.so"
    if not library.exists():
        unfinished = library.with_suffix(f".{os.getpid()}.so")
        folders = [f"-L{path}" for path in library_paths()]
        libraries = ("-ltorch", "-ltorch_cpu", "-lc10", "-ldl")
        _run("-shared", *options, *objects, *folders, "-Wl,--no-as-needed", *libraries, "-o", str(unfinished))
        unfinished.rename(library)
    return library


@functools.cache
def _loaded() -> ctypes.CDLL:
    path = os.environ.get(LIBRARY_VARIABLE) or str(build())
    torch.ops.load_library(path)
    return ctypes.CDLL(path)


def emulated() -> Operators:
    """The operators of csrc/cuda on CPU tensors."""
    _loaded()
    namespace = torch.ops.sassha_fused_emulated
    return cast(Operators, SimpleNamespace(**{name: getattr(namespace, name).default for name in NAMES}))


_Callback = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_longlong)


class Launch(SimpleNamespace):
    """A launch that was not run: name (mangled), blocks, threads, arguments (bytes)."""


@contextmanager
def intercepted(handle: object = None) -> Iterator[list[Launch]]:
    """Kernels are not run but noted, and handed to handle(launch) if there is one."""
    launches: list[Launch] = []
    failures: list[BaseException] = []

    def note(name: bytes, blocks: int, threads: int, argument: int, size: int) -> None:
        launch = Launch(name=name.decode(), blocks=blocks, threads=threads, arguments=ctypes.string_at(argument, size))
        launches.append(launch)
        try:
            if callable(handle):
                handle(launch)
        except BaseException as error:  # must not cross the C++ frames
            failures.append(error)

    callback = _Callback(note)
    _loaded().sassha_emulation_intercept(callback)
    try:
        yield launches
    finally:
        _loaded().sassha_emulation_intercept(ctypes.cast(None, _Callback))
    if failures:
        raise failures[0]


@contextmanager
def device(multiprocessors: int = 3, blocks_per_multiprocessor: int = 2) -> Iterator[None]:
    """Another emulated device than the default one."""
    _loaded().sassha_emulation_device(multiprocessors, blocks_per_multiprocessor)
    try:
        yield
    finally:
        _loaded().sassha_emulation_device(3, 2)


@contextmanager
def only_blocks(head: int, tail: int) -> Iterator[None]:
    """Only the first and the last blocks of each launch run."""
    _loaded().sassha_emulation_only_blocks(head, tail)
    try:
        yield
    finally:
        _loaded().sassha_emulation_only_blocks(0, 0)


@contextmanager
def refused() -> Iterator[None]:
    """No kernel can be launched."""
    _loaded().sassha_emulation_refuse(True)
    try:
        yield
    finally:
        _loaded().sassha_emulation_refuse(False)

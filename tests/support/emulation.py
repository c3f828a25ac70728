"""The sources in csrc/cuda, kernels, launchers and torch glue, built by g++ to run on CPU tensors (for tests only)."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import torch
from torch.utils.cpp_extension import include_paths

from sassha_fused.ops import NAMES, Operators
from tests.support.turns import turn

# The name of the backend that these are.
BACKEND = "cuda_emulated"

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent / "cuda_emulation"
BUILD = ROOT / "build" / "cuda_emulation"

PLAIN = ("-O2",)
# Optimized they take four times as long to compile.
SANITIZED = ("-O0", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")

# A library to load in place of the one built from the repository: how tests with planted faults and sanitizers run.
LIBRARY_VARIABLE = "SASSHA_TEST_EMULATION"
# Set where the emulation is as slow as an interpreter, and gets its short lists: under sanitizers.
SLOW_VARIABLE = "SASSHA_TEST_EMULATION_IS_SLOW"

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


def nvcc() -> str | None:
    """CUDA's compiler, looked for where setup.py looks."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next(filter(None, map(shutil.which, places)), None)


def _run(*command: str) -> str:
    done = subprocess.run([*compiler().split(), *command], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    return done.stdout


_INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)


def _includes(source: Path, csrc: Path) -> dict[str, str]:
    """The text of a source and of all that it includes of the project, by name."""
    found: dict[str, str] = {}
    waiting = [source]
    while waiting:
        file = waiting.pop()
        name = str(file.relative_to(csrc if file.is_relative_to(csrc) else HERE))
        if name not in found:
            found[name] = file.read_text()
            places = [folder / included for included in _INCLUDE.findall(found[name]) for folder in (csrc, HERE)]
            waiting += [place for place in places if place.is_file()]
    return found


@functools.cache
def _versions() -> str:
    return f"{_run('--version')}{torch.__version__}"


# What every kernel's file begins with and no fault changes: read once, that is half of the time of most files.
_PRELUDE = ("algorithm", "cmath", "cstdint", "cstring", "limits", "optional", "stdexcept", "string", "type_traits")
_PRELUDE += ("vector", "cuda_on_cpu.h")


def _key(options: Sequence[str], *contents: str) -> str:
    return hashlib.sha256("\0".join((_versions(), *_FLAGS, *options, *contents)).encode()).hexdigest()[:32]


def _prelude(options: Sequence[str]) -> Path:
    """A header of _PRELUDE, compiled for these options beside itself."""
    text = "".join(f"#include <{name}>\n" for name in _PRELUDE)
    contents = [(HERE / name).read_text() for name in ("cuda_on_cpu.h", "block.h", "fiber.h")]
    header = BUILD / f"prelude-{_key(options, text, *contents)}.h"
    compiled = header.with_suffix(".h.gch")
    if not compiled.exists():
        header.write_text(text)
        unfinished = header.with_suffix(f".{os.getpid()}")
        _run(*_FLAGS, *options, "-x", "c++-header", str(header), "-o", str(unfinished))
        unfinished.rename(compiled)
    return header


def _compile(source: Path, csrc: Path, options: Sequence[str], prelude: Path) -> Path:
    """The object file of a source; what was compiled before is not compiled again."""
    # Where a copy lies must not show in __FILE__, or its objects would differ.
    place = (f"-I{csrc}", f"-ffile-prefix-map={csrc}=csrc")
    contents = [text for item in sorted(_includes(source, csrc).items()) for text in item]
    before = ("-include", str(prelude)) if source.suffix == ".cu" else ()
    object_file = BUILD / f"{source.stem}-{_key(options, *contents)}.o"
    if not object_file.exists():
        unfinished = object_file.with_suffix(f".{os.getpid()}.o")
        _run(*_FLAGS, *options, *place, *before, "-c", "-x", "c++", str(source), "-o", str(unfinished))
        unfinished.rename(object_file)
    return object_file


def _torch() -> list[Path]:
    """Empty libraries of the names of torch's, which processes have: to read all their symbols takes the linker longer
    than all else.
    """
    libraries = [BUILD / f"lib{name}.so" for name in ("torch", "torch_cpu", "c10")]
    for library in libraries:
        if not library.exists():
            unfinished = library.with_suffix(f".{os.getpid()}.so")
            name = f"-Wl,-soname,{library.name}"
            _run("-shared", "-nostdlib", name, "-x", "c++", os.devnull, "-o", str(unfinished))
            unfinished.rename(library)
    return libraries


def build(options: Sequence[str] = PLAIN, *, changed: Path | None = None, only: Sequence[str] = ()) -> Path:
    """Builds the emulated kernels; what was compiled before is not compiled again.

    changed: a copy of csrc from which the files named in only are compiled, in place of the repository's. Where both
    define the same function, theirs is the one that the library has.
    """
    with turn(BUILD):
        return _build(options, changed, only)


def _build(options: Sequence[str], changed: Path | None, only: Sequence[str]) -> Path:
    csrc = ROOT / "csrc"
    names = ["schema.cpp", "cuda/torch.cpp", *(f"cuda/{path.name}" for path in sorted((csrc / "cuda").glob("*.cu")))]
    assert set(only) <= set(names)
    places = [(changed / name, changed, options) for name in only if changed is not None]
    # In what they have nothing to look at, faults and sanitizers change nothing.
    others = PLAIN if only else options
    places += [(csrc / name, csrc, others) for name in names if name not in only]
    places += [(HERE / name, csrc, others) for name in ("scope.cpp", "control.cpp")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        preludes = {of: _prelude(of) for of in dict.fromkeys(tuple(place[2]) for place in places)}
        objects = [str(path) for path in pool.map(lambda place: _compile(*place, preludes[tuple(place[2])]), places)]
    name = hashlib.sha256("\0".join(objects).encode()).hexdigest()[:32]
    library = BUILD / f"emulated-{name}.so"
    if not library.exists():
        unfinished = library.with_suffix(f".{os.getpid()}.so")
        libraries = [*map(str, _torch()), "-ldl"]
        _run("-shared", *options, *objects, "-Wl,--no-as-needed", *libraries, "-o", str(unfinished))
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

"""Lists of tensors by name: the cases that operators are tested on, shorter ones for slow backends."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

from tests.support import emulation
from tests.support.backends import SLOW
from tests.support.cases import (
    LAYOUTS,
    SIZES,
    Case,
    Spec,
    every_layout,
    every_size,
    every_size_at_every_alignment,
    make_case,
    many,
)

T = TypeVar("T")
Specs = Callable[[torch.dtype], list[Spec]]

LISTS: dict[str, Specs] = {
    "every size": every_size,
    "every size at every alignment": every_size_at_every_alignment,
    "every layout": lambda dtype: every_layout(),
    "1 tensor": lambda dtype: [Spec((3, 7), shift=1)],
    "57 tensors": lambda dtype: many(57),
    "many tensors": lambda dtype: [Spec((7 * i % 150,), shift=i % 4) for i in range(250)],
}
LIST_NAMES = tuple(LISTS)
LONG: dict[str, Specs] = {"a long one": lambda dtype: [Spec((5,)), Spec((150_001,), shift=1), Spec((3,))]}

# Around vectors, the signs of one Philox call, tiles and chunks of all kernels, and the longest.
_FEW_SIZES = (1, 7, 8, 9, 33, 127, 128, 129, 511, 513, 1025, 4097)
# In place of these, for slow backends.
SHORT_LISTS: dict[str, Specs] = {
    "every size": lambda dtype: [Spec((size,), shift=i % 3) for i, size in enumerate((*_FEW_SIZES, SIZES[-1]))],
    "every size at every alignment": lambda dtype: [
        Spec((size,), shift=shift) for size in (1, 7, 128, 515) for shift in range(16 // dtype.itemsize)
    ],
    "every layout": lambda dtype: [
        Spec(shape, layout, 1) for shape in [(), (0, 3), (9, 1), (5, 13), (2, 3, 4, 5, 3)] for layout in LAYOUTS
    ],
    "57 tensors": lambda dtype: many(20),
    "many tensors": lambda dtype: many(40),
}


def _thousand(dtype: torch.dtype) -> list[Spec]:
    return [Spec((1 + i % 3,), shift=i % 4) for i in range(1000)]


def _several_tables(dtype: torch.dtype) -> list[Spec]:
    # Where the emulation is slow, of one dtype: the tables are the same of all.
    return many(40) if emulation.BACKEND in SLOW and dtype != torch.float32 else _thousand(dtype)


# More than one table of CUDA's holds; more than a program of Triton's has rows of the counts, and than are searched at
# once.
OWN_LISTS: dict[str, dict[str, Specs]] = {
    emulation.BACKEND: {"many tensors": _several_tables},
    "cuda": {"many tensors": _thousand},
    "cuda_ptx": {"many tensors": _thousand},
    "triton_ptx": {"many tensors": lambda dtype: [Spec((7 * i % 150,), shift=i % 4) for i in range(150)]},
}


@functools.cache
def _made(dtype: torch.dtype, specs: Specs) -> Case:
    return make_case(dtype, specs(dtype))


def listed_case(backend: str, dtype: torch.dtype, name: str) -> Case:
    """The case of a list for a backend; not to be written to."""
    lists = {**LISTS, **LONG}
    if backend in SLOW:
        lists |= SHORT_LISTS
    return _made(dtype, {**lists, **OWN_LISTS.get(backend, {})}[name])


def shorter(backend: str, usual: T, few: T) -> T:
    """How many, or which tensors: few for a slow backend."""
    return few if backend in SLOW else usual

"""The bytes that an operator must move, and what ptxrun counted of a launch (for the tests of PTX)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import ptxrun
import torch

from tests.support import arena
from tests.support.calls import HYPER, norm_of, run_hutchinson, run_perturb, run_rademacher, run_update
from tests.support.cases import Case, compute_dtype

# 16 bytes at a time, as PTX spells it.
WIDE = re.compile(r"\.v4\.[a-z]32|\.v2\.[a-z]64")
LONG = (1 << 14, 1 << 13, 3 << 11)  # elements

# In bytes of a parameter (p) and of its state (s): what an operator reads and writes of each element. In float32, where
# both are 4, these are the floors of the design: 4 for the norm, 16, 4, 8 and 12, 24 and 32.
FLOORS: dict[str, tuple[Callable[[str, Case], object], str, str]] = {
    "norm": (lambda name, case: norm_of(name, case.grads), "p", ""),
    "adaptive norm": (lambda name, case: norm_of(name, case.grads, case.params, True), "pp", ""),
    "perturb": (lambda name, case: run_perturb(name, case, 7.3, 0.2, False, False), "pp", "pp"),
    "adaptive perturb": (lambda name, case: run_perturb(name, case, 7.3, 0.2, True, False), "pp", "pp"),
    "rademacher": (lambda name, case: run_rademacher(name, case, 1, 2, 3), "", "p"),
    "first sample": (lambda name, case: run_hutchinson(name, case, 1, 2, 0, 2), "p", "s"),
    "last sample": (lambda name, case: run_hutchinson(name, case, 1, 2, 1, 2), "ps", "s"),
    "lazy update": (lambda name, case: run_update(name, case, HYPER, False), "ppss", "ps"),
    "update without a backup": (lambda name, case: run_update(name, case, HYPER, False, backup=False), "ppss", "ps"),
    "hessian update": (lambda name, case: run_update(name, case, HYPER, True), "pppss", "pss"),
    "skipped update": (lambda name, case: run_update(name, case, HYPER, True, [torch.tensor(math.nan)]), "p", "p"),
}
FLOAT32_BYTES = {
    "norm": 4,
    "perturb": 16,
    "rademacher": 4,
    "first sample": 8,
    "last sample": 12,
    "lazy update": 24,
    "update without a backup": 24,
    "hessian update": 32,
}


def bytes_per_element(operator: str, dtype: torch.dtype) -> dict[str, int]:
    """What an operator must read (ld) and write (st) of each element."""
    widths = {"p": dtype.itemsize, "s": compute_dtype(dtype).itemsize}
    _, *terms = FLOORS[operator]
    floor = {kind: sum(widths[term] for term in of_kind) for kind, of_kind in zip(("ld", "st"), terms, strict=True)}
    if dtype == torch.float32 and operator in FLOAT32_BYTES:
        assert sum(floor.values()) == FLOAT32_BYTES[operator]
    return floor


def elements_of(case: Case) -> int:
    """The number of elements of all parameters."""
    return sum(param.numel() for param in case.params)


def longest(runs: list[arena.Run]) -> tuple[arena.Run, list[arena.Run]]:
    """The launch that goes over the elements, of a call's launches, and the others."""
    *others, last = sorted(runs, key=lambda run: run.stats.ld["bytes"] + run.stats.st["bytes"])
    return last, others


def wide_sectors(stats: ptxrun.Stats, kind: str) -> int:
    """Sectors of 32 bytes that loads (ld) or stores (st) of 16 bytes at a time ask for."""
    lines = stats.lines.values()
    return sum(sectors for text, _, _, sectors in lines if f"{kind}.global" in text and WIDE.search(text))

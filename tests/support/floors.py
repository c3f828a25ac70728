"""The bytes that an operator must move, and what ptxrun counted of a launch (for the tests of PTX)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace

import ptxrun
import torch

from sassha_fused.layout import block_index
from tests.support import arena
from tests.support.calls import (
    ADAM,
    HYPER,
    PLAIN,
    norm_of,
    run,
    run_hutchinson,
    run_perturb,
    run_rademacher,
    run_update,
)
from tests.support.cases import Case, compute_dtype

# 16 bytes at a time, as PTX spells it.
WIDE = re.compile(r"\.v4\.[a-z]32|\.v2\.[a-z]64")
LONG = (1 << 14, 1 << 13, 3 << 11)  # elements


def perturb_along_averages(name: str, case: Case) -> None:
    """perturb_ along exp_avg, without a backup."""
    along = replace(case, grads=case.parts(case.exp_avg))
    run(name, "perturb_", along, {**PLAIN, "ascent": "momentum"}, backup=None)


def update_by_blocks(name: str, case: Case, block: int) -> None:
    """A lazy step whose exp_hessian lies by blocks."""
    blocked = len(case.exp_avg)
    compact = torch.ones_like(case.exp_hessian[: block_index(blocked, block, blocked)])
    run_update(name, case, {**HYPER, "hessian_block": block}, False, exp_hessian=compact, blocked=blocked)


def block_average(name: str, case: Case, block: int) -> None:
    blocked = len(case.exp_avg)
    compact = torch.ones_like(case.exp_hessian[: block_index(blocked, block, blocked)])
    hyper = {**HYPER, "hessian_block": block}
    run(name, "block_average_", case, hyper, exp_hessian=compact, averaged=compact.clone(), blocked=blocked)


# In bytes of a parameter (p) and of its state (s): what an operator reads and writes of each element. In float32, where
# both are 4, these are the floors of the design: 4 for the norm, 16, 4, 8 and 12, 24 and 32.
FLOORS: dict[str, tuple[Callable[[str, Case], object], str, str]] = {
    "norm": (lambda name, case: norm_of(name, case.grads), "p", ""),
    "adaptive norm": (lambda name, case: norm_of(name, case.grads, case.params, True), "pp", ""),
    "perturb": (lambda name, case: run_perturb(name, case, 7.3, 0.2, False, False), "pp", "pp"),
    "adaptive perturb": (lambda name, case: run_perturb(name, case, 7.3, 0.2, True, False), "pp", "pp"),
    "perturb along averages": (perturb_along_averages, "ps", "p"),
    "rademacher": (lambda name, case: run_rademacher(name, case, 1, 2, 3), "", "p"),
    "first sample": (lambda name, case: run_hutchinson(name, case, 1, 2, 0, 2), "p", "s"),
    "last sample": (lambda name, case: run_hutchinson(name, case, 1, 2, 1, 2), "ps", "s"),
    "lazy update": (lambda name, case: run_update(name, case, HYPER, False), "ppss", "ps"),
    "update without a backup": (lambda name, case: run_update(name, case, HYPER, False, backup=False), "ppss", "ps"),
    "update of squared gradients": (lambda name, case: run_update(name, case, ADAM, False), "ppss", "pss"),
    "plain update": (lambda name, case: run_update(name, case, PLAIN, False, exp_hessian=None), "pps", "ps"),
    "hessian update": (lambda name, case: run_update(name, case, HYPER, True), "pppss", "pss"),
    "skipped update": (lambda name, case: run_update(name, case, HYPER, True, [torch.tensor(math.nan)]), "p", "p"),
}
# The same of what also moves some bytes of each block of exp_hessian: how often these are read, and how often written.
BY_BLOCKS: dict[str, tuple[Callable[[str, Case, int], object], str, str, tuple[int, int]]] = {
    "lazy update": (update_by_blocks, "pps", "ps", (1, 0)),
    "block average": (block_average, "p", "", (1, 1)),
}
FLOAT32_BYTES = {
    "norm": 4,
    "perturb": 16,
    "perturb along averages": 12,
    "rademacher": 4,
    "first sample": 8,
    "last sample": 12,
    "lazy update": 24,
    "update without a backup": 24,
    "update of squared gradients": 28,
    "plain update": 20,
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
    return _sectors(stats, kind, wide=True)


def narrow_sectors(stats: ptxrun.Stats, kind: str) -> int:
    """Those that others ask for."""
    return _sectors(stats, kind, wide=False)


def _sectors(stats: ptxrun.Stats, kind: str, wide: bool) -> int:
    lines = stats.lines.values()
    return sum(
        sectors for text, _, _, sectors in lines if f"{kind}.global" in text and (WIDE.search(text) is not None) == wide
    )

"""csrc/cuda run by g++ on tensors of more than 2^31 and 2^32 elements, in memory that is hardly touched."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sassha_fused.layout import layouts_of
from tests.support import calls, emulation
from tests.support.backends import BASELINE, marks_of, operators_of
from tests.support.cases import (
    PART_ALIGNMENT,
    Case,
    Spec,
    assert_same_bits,
    assert_same_case,
    bits,
    block_part,
    make_case,
    sparse,
    units,
)
from tests.support.checks import check_hutchinson, check_perturb, check_skip, check_update, exact_norm
from tests.support.emulation import BACKEND
from tests.support.reference import signs

pytestmark = marks_of(BACKEND)

BLOCK = 8 * 512  # elements that a block takes at a time
HEAD = 2 * BLOCK
SHORT = 77
MARGIN = 1024
# Of elements that share a number of exp_hessian: such blocks are beyond 2^31 as well.
PAIRS = 2

# So many blocks that each has one chunk per warp to do.
MULTIPROCESSORS = 1 << 21


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


class Spread:
    """Operators that take both ends of a tensor of more than 2^31 elements as two; a short one lies behind.

    They put the ends where they belong in a tensor that is zero between, run there, and bring back what became of them.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        # A gap comes between the tensors, behind 2^31 units of it.
        self.offsets = [0, units(count) + PART_ALIGNMENT]
        self.total = self.offsets[1] + units(SHORT)
        self.tail = (-(-self.total // BLOCK) - 2) * BLOCK
        self.pieces = [(0, HEAD), (self.tail, count - self.tail), (self.offsets[1], SHORT)]
        self.operators = operators_of(BACKEND)
        self.before = resident()

    def case(self) -> Case:
        case = make_case(torch.bfloat16, [Spec((length,)) for _, length in self.pieces])
        case.rows[0] = case.rows[1]
        case.indices[1] = case.indices[0] + self.tail
        return case

    def perturb_(
        self, params: Any, grads: Any, backup: Tensor, offsets: Any, rows: list[int], layouts: Tensor, *rest: Any
    ) -> None:
        with (
            self.tensors(params) as w,
            self.tensors(grads) as g,
            self.buffer(backup, offsets) as kept,
            self.ends_only(),
        ):
            self.operators.perturb_(w, g, kept, self.offsets, rows[1:], layouts_of(w), *rest)

    def rademacher_(self, params: Any, indices: list[int], *rest: Any) -> None:
        with self.tensors(params) as z, self.ends_only():
            self.operators.rademacher_(z, indices[::2], *rest)

    def hutchinson_(self, products: Any, estimate: Tensor, offsets: Any, indices: list[int], *rest: Any) -> None:
        with self.tensors(products) as p, self.buffer(estimate, offsets) as sums, self.ends_only():
            self.operators.hutchinson_(p, sums, self.offsets, indices[::2], *rest)

    def block_average_(
        self, products: Any, exp_hessian: Tensor, averaged: Tensor, offsets: Any, blocked: int, settings: Any
    ) -> None:
        with (
            self.tensors(products) as p,
            self.buffer(exp_hessian, offsets, PAIRS) as old,
            self.buffer(averaged, offsets, PAIRS) as new,
            self.ends_only(),
        ):
            self.operators.block_average_(p, old, new, self.offsets, self.total, settings)

    def update_(
        self, params: Any, grads: Any, products: Any, averaged: Tensor | None, backup: Tensor | None, norm: None,
        exp_avg: Tensor, exp_hessian: Tensor, exp_avg_norm: Tensor | None, steps: Tensor, skipped: Tensor,
        offsets: Any, rows: list[int], layouts: Tensor, blocked: int, *rest: Any,
    ) -> None:  # fmt: skip
        block = PAIRS if blocked else 1
        with (
            self.tensors(params) as w,
            self.tensors(grads) as g,
            self.tensors(products) as p,
            nullcontext() if averaged is None else self.buffer(averaged, offsets, block) as new,
            nullcontext() if backup is None else self.buffer(backup, offsets) as kept,
            self.buffer(exp_avg, offsets) as m,
            self.buffer(exp_hessian, offsets, block) as D,
            self.ends_only(),
        ):
            self.operators.update_(
                w, g, p, new, kept, norm, m, D, exp_avg_norm, steps, skipped, self.offsets, rows[1:], layouts_of(w),
                self.total if blocked else 0, *rest,
            )  # fmt: skip

    def grad_norm(self, grads: Any, params: Any, layouts: None, adaptive: bool) -> Tensor:
        with self.tensors(grads) as g, self.tensors(params) as w, self.ends_only():
            return self.operators.grad_norm(g, w, layouts, adaptive)

    @contextmanager
    def ends_only(self) -> Iterator[None]:
        with emulation.device(MULTIPROCESSORS, 1), emulation.only_blocks(2, 2):
            yield
        assert resident() - self.before < 1 << 30

    @contextmanager
    def tensors(self, ends: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        if not ends:
            yield []
            return
        head, tail, short = ends
        long = sparse(self.count, head.dtype)
        long[: len(head)], long[self.tail :] = head, tail
        yield [long, short]
        head.copy_(long[: len(head)])
        tail.copy_(long[self.tail :])
        self.check_between(long)

    @contextmanager
    def buffer(self, flat: Tensor, offsets: Sequence[int], block: int = 1) -> Iterator[Tensor]:
        """A buffer with a number for each block."""
        whole = sparse(self.total // block, flat.dtype)
        pieces = [
            (
                slice(at // block, (at + length + block - 1) // block),
                block_part(flat, offset, length, block, len(flat) * block),
            )
            for (at, length), offset in zip(self.pieces, offsets, strict=True)
        ]
        for place, own in pieces:
            whole[place] = own
        yield whole
        for place, own in pieces:
            own.copy_(whole[place])
        self.check_between(whole, block)
        between = whole[-(-self.count // block) : self.offsets[1] // block]
        assert not bits(between).any(), "what belongs to no tensor was written"

    def check_between(self, t: Tensor, block: int = 1) -> None:
        for start in (HEAD, self.tail - MARGIN):
            between = t[start // block : (start + MARGIN) // block]
            assert not bits(between).any(), "what no block that ran has to do with was written"


def zeros_for_empty(like: Tensor, size: Sequence[int], dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return torch.zeros(size, dtype=dtype or like.dtype)


@pytest.fixture(autouse=True)
def sums_of_blocks_that_do_not_run_are_zero() -> Iterator[None]:
    """Where the scratch memory of an operator is what malloc has had back from others, they would be anything."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("new_empty", zeros_for_empty, "CPU")
        yield


@pytest.fixture(params=[2**31 + 300, 2**32 + 300], ids=["2^31+300", "2^32+300"])
def spread(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Spread:
    spread = Spread(request.param)
    monkeypatch.setattr(calls, "operators_of", lambda _: spread)
    return spread


def test_perturb_reaches_elements_beyond_32_bits(spread: Spread) -> None:
    check_perturb(BACKEND, spread.case(), 7.3)


@pytest.mark.parametrize("backup", [True, False], ids=["backup", "alone"])
@pytest.mark.parametrize("hessian", [False, True], ids=["lazy", "hessian"])
def test_update_reaches_elements_beyond_32_bits(spread: Spread, hessian: bool, backup: bool) -> None:
    check_update(BACKEND, spread.case(), hessian, backup)


def test_a_skipped_step_brings_back_elements_beyond_32_bits(spread: Spread) -> None:
    check_skip(BACKEND, spread.case(), torch.tensor(math.inf))


@pytest.mark.parametrize("averaged", [False, True], ids=["lazy", "averaged"])
def test_blocks_reach_elements_beyond_32_bits(spread: Spread, averaged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = spread.case()
    hyper = {**calls.HYPER, "hessian_block": PAIRS}
    case.exp_hessian = case.exp_hessian[: len(case.exp_avg) // PAIRS].nan_to_num(0.25)
    case.estimate = torch.zeros_like(case.exp_hessian)
    others = {"blocked": len(case.exp_avg)}
    found = []
    for operators in (spread, operators_of(BASELINE)):
        monkeypatch.setattr(calls, "operators_of", lambda _, operators=operators: operators)
        on = case.to("cpu")
        calls.run(BACKEND, "block_average_", on, hyper, **others)
        new = on.estimate if averaged else None
        calls.run_update(BACKEND, on, hyper, False, averaged=new, **others)
        found.append(on)
    assert_same_case(*found)


@pytest.mark.parametrize("sample", [0, 1])
def test_the_estimate_reaches_elements_beyond_32_bits(spread: Spread, sample: int) -> None:
    check_hutchinson(BACKEND, spread.case(), sample, 2)


def test_signs_reach_elements_beyond_32_bits(spread: Spread) -> None:
    case = spread.case()
    calls.run_rademacher(BACKEND, case, 5, 6, 7)
    for z, index in zip(case.params, case.indices, strict=True):
        assert_same_bits(z, signs(index, z.numel(), 5, 6, 7).bfloat16(), "signs")


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_norm_counts_elements_beyond_32_bits(spread: Spread, adaptive: bool) -> None:
    case = spread.case()
    expected = exact_norm(case.grads, case.params if adaptive else None)
    norm = calls.norm_of(BACKEND, case.grads, case.params, adaptive)
    assert norm == pytest.approx(expected, rel=8 * 2**-53, abs=0)

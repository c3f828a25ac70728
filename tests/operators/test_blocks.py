"""exp_hessian shared by blocks of elements: block_average_ and update_ on every backend, element by element."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sassha_fused.family import AdaHessian
from sassha_fused.layout import block_index
from tests.support.backends import BASELINE, device_of, each_backend_with
from tests.support.calls import HYPER, POWERS, run, update
from tests.support.cases import (
    BUT_FLOAT16,
    DTYPES,
    Case,
    Spec,
    assert_rounded,
    assert_same_bits,
    block_part,
    compute_dtype,
    make_case,
)
from tests.support.formulas import formula_blocks
from tests.support.lists import shorter

BLOCKS = (1, 2, 4, 8, 16, 32, 64, 128)
# None, shorter than any vector, the longest vector, longer than what a thread has, and the longest of all.
FEW_BLOCKS = (1, 2, 8, 64, 128)
SIZES = (1, 2, 3, 5, 31, 33, 64, 127, 128, 129, 200, 257, 1000, 4099, 17_001)
# One is longer than a tile of what is interpreted, and has blocks.
FEW_SIZES = (3, 4099, 33, 127, 1, 129, 515)


def blocked_case(backend: str, dtype: torch.dtype, block: int, share: float = 0.6) -> tuple[Case, int]:
    """A case whose first parameters have exp_hessian by blocks, and where these end in the flat state."""
    case = make_case(dtype, [Spec((size,), shift=i % 5) for i, size in enumerate(shorter(backend, SIZES, FEW_SIZES))])
    blocked = case.offsets[int(share * len(case.offsets))]
    length = block_index(len(case.exp_avg), block, blocked)
    values = torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return replace(case, exp_hessian=values.to(compute_dtype(dtype))), blocked


def part_of(flat: Tensor, case: Case, i: int, block: int, blocked: int) -> Tensor:
    """A parameter's part of a compact buffer."""
    return block_part(flat, case.offsets[i], case.params[i].numel(), block, blocked)


def averaged(backend: str, case: Case, hyper: dict[str, Any], blocked: int) -> Tensor:
    on = case.to(device_of(backend))
    result = torch.full_like(on.exp_hessian, math.nan)
    run(backend, "block_average_", on, hyper, averaged=result, blocked=blocked)
    return result.cpu()


# With a beta2 of 0 every bit of a mean shows.
@each_backend_with(
    few={"block": FEW_BLOCKS, "dtype": BUT_FLOAT16},
    block=BLOCKS,
    beta2=(0.0, 0.999),
    squares=(False, True),
    dtype=DTYPES,
)
def test_the_means_of_blocks_are_averaged_in(
    backend: str, dtype: torch.dtype, block: int, beta2: float, squares: bool
) -> None:
    case, blocked = blocked_case(backend, dtype, block)
    hyper = {
        **HYPER,
        "hessian_block": block,
        "betas": (0.9, beta2),
        **({"method": AdaHessian.method} if squares else {}),
    }
    found = averaged(backend, case, hyper, blocked)
    parts, expected = [], []
    for i, product in enumerate(case.products):
        mean = formula_blocks(product, block if case.offsets[i] < blocked else 1)
        old = part_of(case.exp_hessian, case, i, block, blocked).double()
        parts.append(part_of(found, case, i, block, blocked))
        expected.append(beta2 * old + (1 - beta2) * (mean.square() if squares else mean))
    exact = torch.cat(expected)
    assert_rounded(parts, exact, exact.abs(), 10)
    # What belongs to nobody is left alone.
    inside = torch.zeros(len(found), dtype=torch.bool)
    for i in range(len(case.params)):
        part_of(inside, case, i, block, blocked).fill_(True)
    assert found[~inside].isnan().all()
    # Sums go pairwise everywhere.
    assert_same_bits(found, averaged(BASELINE, case, hyper, blocked), "averaged")


@each_backend_with(
    few={"block": FEW_BLOCKS, "dtype": BUT_FLOAT16},
    block=BLOCKS,
    power=POWERS,
    average=(False, True),
    skip=(False, True),
    dtype=DTYPES,
)
def test_the_step_is_that_with_every_block_written_out(
    backend: str, dtype: torch.dtype, block: int, power: float, average: bool, skip: bool
) -> None:
    case, blocked = blocked_case(backend, dtype, block)
    hyper = {**HYPER, "hessian_block": block, "hessian_power": power}
    new = case.exp_hessian * 1.5 + 0.25
    taken = new if average and not skip else case.exp_hessian
    more: dict[str, Any] = {"blocked": blocked}
    if average:
        more["averaged"] = new.to(device_of(backend))
    guards = [torch.tensor(math.nan if skip else 1.0)]
    after = update(backend, case, hyper, False, guards, **more)
    every = written_out(case, taken, block, blocked)
    if average and not skip:  # which counts as a Hessian step
        steps = every.steps.clone()
        steps[case.rows, 1] = steps[case.rows, 0] + 1
        every = replace(every, steps=steps)
    expected = update(backend, every, {**hyper, "hessian_block": 1}, False, guards)
    for name in ("params", "exp_avg"):
        for found, other in zip(after.tensors()[name], expected.tensors()[name], strict=True):
            assert_same_bits(found, other, name)
    if average and not skip:
        assert after.steps[case.rows, 1].tolist() == after.steps[case.rows, 0].tolist()
    else:
        assert_same_bits(after.steps, expected.steps, "steps")
    compare_state(after, case, taken, block, blocked)


def written_out(case: Case, compact: Tensor, block: int, blocked: int) -> Case:
    flat = torch.full_like(case.exp_avg, math.nan)
    for i, (param, offset) in enumerate(zip(case.params, case.offsets, strict=True)):
        own = block if offset < blocked else 1
        flat[offset : offset + param.numel()] = part_of(compact, case, i, block, blocked).repeat_interleave(own)[
            : param.numel()
        ]
    return replace(case, exp_hessian=flat)


def compare_state(after: Case, before: Case, expected: Tensor, block: int, blocked: int) -> None:
    for i in range(len(before.params)):
        assert_same_bits(
            part_of(after.exp_hessian, after, i, block, blocked),
            part_of(expected, before, i, block, blocked),
            f"exp_hessian {i}",
        )


@pytest.mark.parametrize("sizes", [(256,), (3, 700), (128, 1, 129)], ids=str)
def test_the_baseline_takes_pairs_by_the_bits_of_the_index(sizes: Sequence[int]) -> None:
    # Once more, without the code that is tested: float32 sums of neighbours, of pairs of neighbours, and so on.
    case = make_case(torch.float32, [Spec((size,)) for size in sizes])
    hyper = {**HYPER, "hessian_block": 8, "betas": (0.0, 0.0)}
    case = replace(case, exp_hessian=torch.zeros(block_index(len(case.exp_avg), 8, len(case.exp_avg))))
    found = averaged(BASELINE, case, hyper, len(case.exp_avg))
    for i, product in enumerate(case.products):
        means = []
        for start in range(0, len(product), 8):
            x = [abs(float(v)) for v in product[start : start + 8]]
            present, x = len(x), x + [0.0] * (8 - len(x))
            while len(x) > 1:
                x = [float(torch.tensor(a) + torch.tensor(b)) for a, b in zip(x[::2], x[1::2], strict=True)]
            means.append(torch.tensor(x[0]) / present)
        assert_same_bits(part_of(found, case, i, 8, len(case.exp_avg)), torch.stack(means), "means")

"""csrc/cuda run by g++: tables of tensors of every kind, and what the launchers refuse."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from sassha_fused.ops import NAMES
from tests.support import emulation
from tests.support.backends import marks_of, operators_of
from tests.support.calls import (
    HYPER,
    hutchinson,
    perturb,
    run,
    run_hutchinson,
    run_measured_perturb,
    run_perturb,
    run_rademacher,
    run_update,
    update,
)
from tests.support.cases import (
    Case,
    Spec,
    assert_same_bits,
    assert_same_case,
    each_dtype,
    every_size,
    make_case,
    many,
    sparse,
    units,
    whole,
)
from tests.support.checks import check_hutchinson, check_perturb, check_update
from tests.support.emulation import BACKEND

pytestmark = marks_of(BACKEND)

# What fills the tables of update_ on a Hessian step; of a lazy one and of perturb_; of signs; of the norm.
CAPACITIES = {
    985: ("update True", "skip"),
    1300: ("update False", "perturb", "own norm True"),
    1548: ("hutchinson 0", "hutchinson 1", "rademacher", "norm True"),
    2500: ("norm False", "own norm False"),
}


def chosen(case: Case, positions: Sequence[int]) -> Case:
    """The same memory with some parameters in the lists, in any order."""
    values = {field.name: getattr(case, field.name) for field in fields(case)}
    return Case(**{k: [v[i] for i in positions] if isinstance(v, list) else v for k, v in values.items()})


def without_gaps(case: Case) -> Case:
    """The same values with all parts next to each other."""
    offsets = [0, *itertools.accumulate(units(w.numel()) for w in case.params)]

    def packed(flat: Tensor) -> Tensor:
        result = torch.full((offsets[-1],), math.nan, dtype=flat.dtype)
        for offset, values in zip(offsets, case.parts(flat)):
            result[offset : offset + len(values)] = values
        return result

    buffers = {name: packed(getattr(case, name)) for name in ("backup", "exp_avg", "exp_hessian", "estimate")}
    values = {field.name: getattr(case, field.name) for field in fields(case)}
    return Case(**values | buffers | {"offsets": offsets[:-1]})


def done_by(name: str, case: Case) -> dict[str, Callable[[], Any]]:
    """What every operator of a backend leaves behind, by the name of a call."""
    # Of small integers the sums of squares are exact, in whatever order they are taken.
    integers = [(torch.arange(g.numel()) % 7 - 3).to(g.dtype).view(g.shape) for g in case.grads]

    def signed() -> Case:
        on = case.to("cpu")
        run_rademacher(name, on, 5, 6, 7)
        return on

    def measured(adaptive: bool) -> tuple[Tensor, Case]:
        on = case.to("cpu")
        on.params, on.grads = ([g.clone() for g in integers] for _ in range(2))
        return run_measured_perturb(name, on, adaptive), on

    calls: dict[str, Callable[[], Any]] = {"perturb": lambda: perturb(name, case, 7.3, 0.2, True, False)}
    for hessian in (False, True):
        calls[f"update {hessian}"] = functools.partial(update, name, case, HYPER, hessian, guard_grads=True)
    calls["skip"] = lambda: update(name, case, HYPER, True, [torch.tensor(math.nan)])
    for sample in (0, 1):
        calls[f"hutchinson {sample}"] = functools.partial(hutchinson, name, case, 5, 6, sample, 2)
    calls["rademacher"] = signed
    for adaptive in (False, True):
        norm = functools.partial(operators_of(name).grad_norm, integers, integers, None, adaptive)
        calls |= {f"norm {adaptive}": norm, f"own norm {adaptive}": functools.partial(measured, adaptive)}
    return calls


def assert_as_on_the_cpu(case: Case, only: Sequence[str] = ()) -> None:
    """Every operator, or only some calls, leave the same bits behind on both backends."""
    found, expected = (done_by(name, case) for name in (BACKEND, "cpu"))
    for key in only or expected:
        results = [calls[key]() for calls in (found, expected)]
        for parts in zip(*(result if isinstance(result, tuple) else (result,) for result in results), strict=True):
            compare = assert_same_case if isinstance(parts[1], Case) else functools.partial(assert_same_bits, what=key)
            compare(*parts)


ORDERS_OF_PARTS = {
    "all": range(60),
    "every third left out": [i for i in range(60) if i % 3 != 1],
    "only a few": [7, 8, 41],
    "the last one": [59],
    "descending": range(59, -1, -1),
    "some descending": range(57, 2, -5),
    "mixed": [(23 * i) % 60 for i in range(60)],
}


@each_dtype
@pytest.mark.parametrize("positions", ORDERS_OF_PARTS.values(), ids=ORDERS_OF_PARTS)
def test_parts_may_be_left_out_and_come_in_any_order(dtype: torch.dtype, positions: Sequence[int]) -> None:
    case = make_case(dtype, many(60))
    assert_as_on_the_cpu(chosen(case, positions))
    assert_as_on_the_cpu(chosen(without_gaps(case), positions))


EMPTY = Spec((0,))
EMPTIES = {
    "first": [EMPTY, Spec((0, 3)), Spec((5,)), Spec((300,))],
    "last": [Spec((300,)), Spec((128,)), EMPTY, EMPTY],
    "between": [Spec((128,)), EMPTY, Spec((1,)), EMPTY, Spec((0, 3)), Spec((513,))],
    "around": [EMPTY, Spec((256,)), EMPTY],
    "only one": [EMPTY],
    "only several": [EMPTY, Spec((0, 3)), EMPTY],
}


@pytest.mark.parametrize("specs", EMPTIES.values(), ids=EMPTIES)
def test_empty_tensors_may_stand_anywhere(specs: list[Spec]) -> None:
    case = make_case(torch.float32, specs)
    assert_as_on_the_cpu(case)
    assert_as_on_the_cpu(without_gaps(case))


@functools.cache
def singles() -> Case:
    """Tensors of one element, more than any table holds."""
    return without_gaps(make_case(torch.float32, [Spec((1,))] * (max(CAPACITIES) + 1)))


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_more_tensors_than_a_table_holds_go_into_several(capacity: int) -> None:
    assert_as_on_the_cpu(chosen(singles(), range(capacity + 1)), CAPACITIES[capacity])


@pytest.mark.parametrize("count", [capacity + 1 for capacity in (985, 1300)])
def test_every_parameter_of_several_tables_has_numbers_of_its_own(count: int) -> None:
    case = chosen(singles(), range(count))
    rising = torch.linspace(0, 1, count, dtype=torch.float64)
    check_perturb(BACKEND, case, 7.3, rising)
    for hessian in (False, True):
        check_update(BACKEND, case, hessian, lr=rising, weight_decay=rising.flip(0))


def test_gaps_take_their_room_in_a_table() -> None:
    # Every second part is left out: a table ends at a gap, or right before one.
    assert_as_on_the_cpu(chosen(singles(), range(0, 2001, 2)))
    assert_as_on_the_cpu(chosen(singles(), [0, *range(1, 2001, 2)]))


@each_dtype
def test_numbers_around_the_tensors_stay_as_they_are(dtype: torch.dtype) -> None:
    # What is worked out from a NaN is one: written over the NaN that it came from, it would not be noticed.
    case = make_case(dtype, every_size(dtype))
    for tensors in case.tensors().values():
        for t in tensors:
            memory = whole(t)
            memory.copy_(memory.nan_to_num(1.5))
    check_perturb(BACKEND, case, 7.3)
    check_hutchinson(BACKEND, case, 1, 2)
    for hessian in (False, True):
        check_update(BACKEND, case, hessian)


def test_one_block_does_the_work_of_all() -> None:
    with emulation.device(1, 1):
        assert_as_on_the_cpu(make_case(torch.float32, [Spec((20_003,), shift=1), *many(20)]))
        assert_as_on_the_cpu(chosen(singles(), range(1000)))


def test_empty_lists_are_a_step_of_no_tensors() -> None:
    case = chosen(make_case(torch.float32, [Spec((5,))]), [])
    results = []
    for name in (BACKEND, "cpu"):
        done = [perturb(name, case, 7.3, 0.2, False, False)]
        done.append(hutchinson(name, case, 5, 6, 0, 1))
        for guard in (1.0, math.nan):
            done.append(update(name, case, HYPER, False, [torch.tensor(guard)]))
        run_rademacher(name, case, 5, 6, 7)
        results.append(done)
        with pytest.raises(RuntimeError):
            operators_of(name).grad_norm([], [], None, False)
    for found, expected in zip(*results, strict=True):
        assert_same_case(found, expected)
    assert [int(case.skipped) for case in results[0]] == [7, 7, 0, 1]


# ---------------------------------------------------------------------------------------------------------------------
# What the launchers refuse

WRITERS: dict[str, Callable[[Case], None]] = {
    "perturb_": lambda case: run_perturb(BACKEND, case, 7.3, 0.2, False, False),
    "hutchinson_": lambda case: run_hutchinson(BACKEND, case, 5, 6, 0, 1),
    "update_": lambda case: run_update(BACKEND, case, HYPER, False),
}
each_writer = pytest.mark.parametrize("operator", WRITERS)


def check_refused_offset(operator: str, before: Case) -> None:
    case = before.to("cpu")
    with pytest.raises(RuntimeError, match="offsets of the state must be multiples of 128 elements"):
        WRITERS[operator](case)
    assert_same_case(case, before)


@each_writer
@pytest.mark.parametrize("shift", [1, 64, 120])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_offsets_off_the_boundaries_of_units_are_refused(operator: str, shift: int, position: int) -> None:
    case = make_case(torch.float32, [Spec((5,))] * 3)
    case.offsets[position] += shift
    check_refused_offset(operator, case)


@each_writer
def test_nothing_is_written_where_an_offset_of_a_later_table_is_refused(operator: str) -> None:
    case = chosen(singles(), range(2000))
    case.offsets[-1] += 1
    case.backup, case.exp_avg, case.exp_hessian, case.estimate = (
        torch.cat([flat, flat[:1]]) for flat in (case.backup, case.exp_avg, case.exp_hessian, case.estimate)
    )
    check_refused_offset(operator, case)


def test_a_tensor_that_no_count_of_units_can_hold_is_refused() -> None:
    with emulation.intercepted() as launches, pytest.raises(RuntimeError, match=r"2\^38 elements or more"):
        operators_of(BACKEND).grad_norm([sparse(2**38, torch.bfloat16)], [], None, False)
    assert not launches


def test_tensors_too_long_for_one_table_together_go_into_several() -> None:
    long = sparse(2**37, torch.bfloat16)
    with emulation.intercepted() as launches:
        operators_of(BACKEND).grad_norm([long] * 3, [], None, False)
    assert len(launches) == 4  # one for each, and the end of the norm


@pytest.mark.parametrize("name", NAMES)
def test_a_launch_that_fails_is_an_error_that_names_the_operator(name: str) -> None:
    case = chosen(singles(), range(3))
    with emulation.refused(), pytest.raises(RuntimeError, match=f"sassha_fused::{name}: CUDA error: invalid argument"):
        run(BACKEND, name, case)
    run(BACKEND, name, case)

"""The same bits whichever backend works them out, with however many threads, in one call or in several."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from sassha_fused.checks import BIAS_CORRECTIONS
from tests.support.backends import BACKENDS, BASELINE, SLOW, device_of, each_backend_with, each_of
from tests.support.calls import (
    HYPER,
    MEMBERS,
    POWERS,
    hutchinson,
    norm_of,
    perturb,
    run_hutchinson,
    run_perturb,
    run_rademacher,
    run_update,
    update,
)
from tests.support.cases import DTYPES, Case, Spec, assert_same_case, each_dtype, make_case, many, threads
from tests.support.lists import listed_case

# In these every operation is one IEEE rounding in float32, the same on every backend.
NARROW = DTYPES[1:]
# In float64, roots for which all round alike.
EXACT_POWERS = (0.5, 1.0)
SAME_BITS_LISTS = ("every size at every alignment", "every layout", "57 tensors")


@each_backend_with(without=[BASELINE], adaptive=(False, True), specs=SAME_BITS_LISTS, dtype=NARROW)
def test_backends_perturb_to_the_same_bits(backend: str, dtype: torch.dtype, specs: str, adaptive: bool) -> None:
    case = listed_case(backend, dtype, specs)
    assert_same_case(*(perturb(name, case, 7.3, 0.2, adaptive, False) for name in (backend, BASELINE)))


@each_backend_with(
    few={"dtype": NARROW[:2]},
    without=[BASELINE],
    correction=BIAS_CORRECTIONS,
    power=POWERS,
    hessian=(False, True),
    specs=SAME_BITS_LISTS,
    dtype=NARROW,
)
def test_backends_update_to_the_same_bits(
    backend: str, dtype: torch.dtype, specs: str, power: float, hessian: bool, correction: str
) -> None:
    case = listed_case(backend, dtype, specs)
    hyper = {**HYPER, "hessian_power": power, "bias_correction": correction}
    assert_same_case(*(update(name, case, hyper, hessian) for name in (backend, BASELINE)))


@each_backend_with(
    few={"dtype": NARROW[:2]},
    without=[BASELINE],
    member=tuple(MEMBERS),
    maximize=(False, True),
    hessian=(False, True),
    specs=SAME_BITS_LISTS,
    dtype=NARROW,
)
def test_backends_take_the_steps_of_every_member_to_the_same_bits(
    backend: str, dtype: torch.dtype, specs: str, hessian: bool, maximize: bool, member: str
) -> None:
    case = listed_case(backend, dtype, specs)
    hyper = {**MEMBERS[member], "maximize": maximize}
    if member == "plain":
        hyper, more = {**hyper, "nesterov": hessian}, {"exp_hessian": None}
    else:
        more = {}
    takes_products = hessian and member in ("adahessian", "sophia")
    assert_same_case(*(update(name, case, hyper, takes_products, **more) for name in (backend, BASELINE)))


@each_backend_with(without=[BASELINE], betas=((0.9, 0.999), (0.95, 0.99), (0.0, 0.99999)))
def test_backends_correct_the_bias_by_the_same_bits(backend: str, betas: tuple[float, float]) -> None:
    # Of float64 weights that are 0, every bit of the corrections shows.
    case = listed_case(backend, torch.float64, "many tensors").to("cpu")
    case.backup.zero_()
    case.steps[:] = 10 ** (torch.rand(case.steps.shape, generator=torch.Generator().manual_seed(0)) * 9)
    case.steps[::2] %= 5_000
    hyper = {**HYPER, "hessian_power": 1.0, "betas": betas, "bias_correction": "update"}
    assert_same_case(*(update(name, case, hyper, True) for name in (backend, BASELINE)))


@each_backend_with(without=[BASELINE, "cpu"], power=EXACT_POWERS)
def test_compiled_backends_update_float64_to_the_same_bits(backend: str, power: float) -> None:
    case = listed_case(backend, torch.float64, "57 tensors")
    assert_same_case(*(update(name, case, {**HYPER, "hessian_power": power}, True) for name in (backend, "cpu")))


@each_backend_with(without=[BASELINE], sample=(0, 1, 2), specs=SAME_BITS_LISTS, dtype=DTYPES)
def test_backends_estimate_to_the_same_bits(backend: str, dtype: torch.dtype, specs: str, sample: int) -> None:
    case = listed_case(backend, dtype, specs)
    assert_same_case(*(hutchinson(name, case, 1, 2, sample, 3) for name in (backend, BASELINE)))


# ---------------------------------------------------------------------------------------------------------------------
# However the work is shared out


# Only these ask how much there is to write.
@pytest.mark.slow
@each_of(name for name in ("cpu", "cuda") if name in BACKENDS)
@each_dtype
def test_writes_too_large_for_the_caches_are_the_same_writes(backend: str, dtype: torch.dtype) -> None:
    # One call writes more than 8 MiB to each array, and must equal one call per tensor, each of which writes less.
    count = (8 << 20) // dtype.itemsize // 10
    case = make_case(dtype, [Spec((count + 77 * i,), shift=i) for i in range(9)] + [Spec((500, 601), "transposed", 3)])
    together, one_by_one = case.to(device_of(backend)), case.to(device_of(backend))
    singles = [one_by_one.only(i) for i in range(len(case.params))]

    def run(operator: Callable[..., None], *arguments: Any) -> None:
        operator(backend, together, *arguments)
        for single in singles:
            operator(backend, single, *arguments)
        assert_same_case(together, one_by_one)

    run(run_perturb, 3.0, 0.2, False, False)
    run(run_update, HYPER, True)
    run(run_rademacher, 1, 2, 3)
    run(run_update, HYPER, True, [torch.tensor(math.nan)])


# Slow backends are interpreters, which have one thread.
THREADS = (1, 2, 5)


# The sums of torch, which eager uses, follow the number of threads in their last bits.
@each_backend_with(without=[BASELINE, *SLOW], adaptive=(False, True), dtype=DTYPES)
def test_the_number_of_threads_changes_no_bit_of_the_norm(backend: str, dtype: torch.dtype, adaptive: bool) -> None:
    case = make_case(dtype, [Spec((100_003,)), *many(57), Spec((70_001,), shift=1)])
    norms = set()
    for count in THREADS:
        with threads(count):
            norms.add(norm_of(backend, case.grads, case.params, adaptive))
    assert len(norms) == 1


def check_threads(backend: str, case: Case) -> None:
    results: list[Case] = []
    for count in THREADS:
        on = case.to(device_of(backend))
        with threads(count):
            run_perturb(backend, on, 3.0, 0.2, True, False)
            run_hutchinson(backend, on, 1, 2, 0, 3)
            run_update(backend, on, HYPER, True)
            run_rademacher(backend, replace(on, params=on.grads), 1, 2, 3)
        results.append(on.to("cpu"))
        assert_same_case(results[-1], results[0])


@each_backend_with(without=SLOW, dtype=DTYPES)
def test_the_number_of_threads_changes_no_bit_of_a_long_tensor(backend: str, dtype: torch.dtype) -> None:
    check_threads(backend, listed_case(backend, dtype, "a long one"))


# The baseline leaves the threads to torch, whatever the list.
@pytest.mark.slow
@each_backend_with(
    without=[BASELINE, *SLOW],
    specs=("every size at every alignment", "every layout", "many tensors"),
    dtype=DTYPES,
)
def test_the_number_of_threads_changes_no_bit_of_many_tensors(backend: str, dtype: torch.dtype, specs: str) -> None:
    check_threads(backend, listed_case(backend, dtype, specs))

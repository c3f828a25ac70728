"""csrc/cuda run by g++: threads in other orders, under sanitizers, beyond 2^31 elements, and tables of every kind."""

from __future__ import annotations

import functools
import itertools
import math
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sassha_fused.ops import NAMES
from tests import emulation, test_operators
from tests.backends import operators_of
from tests.cases import (
    DTYPES,
    PART_ALIGNMENT,
    Case,
    Spec,
    assert_same_bits,
    assert_same_case,
    bits,
    each_dtype,
    every_size,
    make_case,
    many,
    whole,
)
from tests.helpers import single_threaded
from tests.reference import signs

BACKEND = "cuda_emulated"
ORDERS = ("forward", "reversed", "shuffled")

# Of the conformance tests those of this backend; of this file all.
KEYWORD = f"{BACKEND} or test_emulation"

# A copy of csrc in place of the repository's, for what is compiled here.
CSRC_VARIABLE = "SASSHA_TEST_CSRC"

one_thread = pytest.fixture(autouse=True, scope="module")(single_threaded)


# ---------------------------------------------------------------------------------------------------------------------
# The conformance tests in another order, and under sanitizers

# All kernels and dtypes; every size, alignment and layout; 1, 57 and 1000 tensors; steps that are skipped.
CONFORMANCE = {
    "tests/test_operators.py": (
        "test_perturb_moves_every_element_by_the_formula_and_nothing_else",
        "test_perturb_measures_the_norm_that_grad_norm_does",
        "test_update_changes_every_element_by_the_formula_and_nothing_else",
        "test_update_takes_products_in_the_dtype_of_the_state",
        "test_a_tensor_takes_the_place_of_the_learning_rate",
        "test_one_sample_of_the_estimate_is_the_product_with_its_signs",
        "test_any_one_of_several_guards_skips_the_step",
        "test_a_skipped_step_brings_back_every_size_and_layout",
        "test_norm_is_exact_to_a_few_ulp_of_float64",
        "test_one_element_that_is_not_finite_shows_in_the_norm",
    ),
    "tests/test_signs.py": (
        "test_the_first_signs_are_the_bits_of_the_known_answer",
        "test_signs_do_not_repeat_past_the_32_bits_of_a_counter_word",
        "test_signs_follow_the_memory_of_dense_tensors_and_the_rows_of_others",
        "test_a_thousand_tensors_have_the_signs_of_one",
    ),
}
# Of these only some of the many parameters.
SAMPLED = (
    "tests/test_operators.py::test_update_is_the_formula_in_every_mode[False-update-0.7-{hessian}-{dtype}-{backend}]",
    "tests/test_operators.py::test_update_is_the_formula_in_every_mode[True-step-1.0-{hessian}-{dtype}-{backend}]",
    "tests/test_operators.py::test_the_estimate_starts_at_zero_and_ends_as_the_mean[2-{dtype}-{backend}]",
    "tests/test_operators.py::test_one_element_that_is_not_finite_skips_the_step_where_gradients_are_guards"
    "[nan-products-{dtype}-{backend}]",
)


def conformance() -> list[str]:
    """Test ids: a name that is no more ends the run with an error."""
    names = [f"{file}::{name}" for file, tests in CONFORMANCE.items() for name in tests]
    dtypes = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    choices = itertools.product(SAMPLED, ("lazy", "hessian"), dtypes)
    ids = [test.format(hessian=hessian, dtype=dtype, backend=BACKEND) for test, hessian, dtype in choices]
    return [*names, *dict.fromkeys(ids)]


def run_tests(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs pytest on the emulated kernels in a process of its own, up to the first failure."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    # What the kernels print as they abort must come through.
    options = ("-q", "-x", "-p", "no:cacheprovider", "--capture=sys", "-k", KEYWORD)
    command = [sys.executable, "-m", "pytest", *options, *arguments]
    return subprocess.run(
        command,
        cwd=emulation.ROOT,
        # In CI the examples are the same in every run, and none is kept.
        env=inherited | {"CI": "1"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=900,
    )


@functools.cache
def sanitizer() -> dict[str, str] | str:
    """The environment in which a sanitized library loads, or the reason why there is none."""
    source, library = emulation.BUILD / "probe.cpp", emulation.BUILD / f"probe.{os.getpid()}.so"
    emulation.BUILD.mkdir(parents=True, exist_ok=True)
    source.write_text("int probe = 0;\n")
    compiler = emulation.compiler().split()
    options = (*emulation.SANITIZED, "-fPIC", "-shared", str(source), "-o", str(library))
    built = subprocess.run([*compiler, *options], capture_output=True, text=True)
    if built.returncode != 0:
        return f"{compiler[0]} cannot do sanitizers: {built.stderr.strip()[-300:]}"
    found = subprocess.run([*compiler, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    environment = {"LD_PRELOAD": found, "ASAN_OPTIONS": "detect_leaks=0"}
    load = [sys.executable, "-c", "import ctypes, sys; ctypes.CDLL(sys.argv[1])", str(library)]
    loaded = subprocess.run(load, env=os.environ | environment, capture_output=True, text=True)
    library.unlink()
    if loaded.returncode != 0 or "cannot be preloaded" in loaded.stderr:
        return f"a library with sanitizers does not load: {loaded.stderr.strip()[-300:]}"
    return environment


@pytest.mark.parametrize("order", ORDERS[1:])
def test_the_order_of_threads_and_blocks_changes_no_result(order: str) -> None:
    done = run_tests(*conformance(), SASSHA_EMULATION_ORDER=order)
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.mark.parametrize("order", ORDERS)
def test_sanitizers_find_nothing_in_any_order(order: str) -> None:
    environment = sanitizer()
    if isinstance(environment, str):
        pytest.skip(environment)
    library = str(emulation.build(options=emulation.SANITIZED))
    variables = {emulation.LIBRARY_VARIABLE: library, "SASSHA_EMULATION_ORDER": order}
    done = run_tests(*conformance(), **environment, **variables)
    assert done.returncode == 0, done.stdout[-6000:]


def test_an_order_that_does_not_exist_stops_the_run() -> None:
    done = run_tests(SAMPLED[0].format(hessian="lazy", dtype="float32", backend=BACKEND), SASSHA_EMULATION_ORDER="odd")
    assert done.returncode < 0 and "SASSHA_EMULATION_ORDER must be forward, reversed or shuffled" in done.stdout


# No kernel of today calls block_sum twice, which it is made for.
TWO_SUMS = """
#include <cstdio>

#include "cuda/reduce.h"

using namespace sassha::cuda;

struct Arguments {
  double* sums;
};

__global__ void two_sums(const __grid_constant__ Arguments a) {
  const double first = block_sum(static_cast<double>(threadIdx.x));
  const double second = block_sum(1.0);
  a.sums[2 * threadIdx.x] = first;
  a.sums[2 * threadIdx.x + 1] = second;
}

int main() {
  double sums[2 * kThreads];
  const Arguments arguments{sums};
  void* pointers[] = {const_cast<Arguments*>(&arguments)};
  if (cudaLaunchKernel(two_sums, dim3(1), dim3(kThreads), pointers, 0, nullptr) != cudaSuccess) return 2;
  for (int i = 0; i < kThreads; ++i) {
    if (sums[2 * i] == kThreads * (kThreads - 1) / 2 && sums[2 * i + 1] == kThreads) continue;
    std::printf("thread %d has the sums %g and %g\\n", i, sums[2 * i], sums[2 * i + 1]);
    return 1;
  }
}
"""


@pytest.mark.parametrize("order", ORDERS)
def test_one_sum_over_a_block_may_follow_another(tmp_path: Path, order: str) -> None:
    csrc = os.environ.get(CSRC_VARIABLE, str(emulation.ROOT / "csrc"))
    source, program = tmp_path / "two_sums.cpp", tmp_path / "two_sums"
    source.write_text(TWO_SUMS)
    emulation._run(*emulation._FLAGS, f"-I{csrc}", str(source), "-rdynamic", "-ldl", "-o", str(program))
    environment = os.environ | {"SASSHA_EMULATION_ORDER": order}
    done = subprocess.run([program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Beyond 2^31 and 2^32 elements

BLOCK = 8 * 512  # elements that a block takes at a time
HEAD = 2 * BLOCK
SHORT = 77
MARGIN = 1024

# So many blocks that each has one chunk per warp to do. Their sums are beyond the size that malloc has in stock, so
# they start as zeros, which is what the sums of blocks that do not run would be.
MULTIPROCESSORS = 1 << 21


def sparse(count: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take up memory only where they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize, flags=flags), dtype=dtype)
    except OSError as error:
        pytest.skip(f"no address space for {count} elements: {error}")


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def units(count: int) -> int:
    return -(-count // PART_ALIGNMENT) * PART_ALIGNMENT


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

    def perturb_(self, params: Any, grads: Any, backup: Tensor, offsets: Any, norm: Tensor, *rest: Any) -> None:
        with (
            self.tensors(params) as w,
            self.tensors(grads) as g,
            self.buffer(backup, offsets) as kept,
            self.ends_only(),
        ):
            self.operators.perturb_(w, g, kept, self.offsets, norm, *rest)

    def rademacher_(self, params: Any, indices: list[int], *rest: Any) -> None:
        with self.tensors(params) as z, self.ends_only():
            self.operators.rademacher_(z, indices[::2], *rest)

    def hutchinson_(self, products: Any, estimate: Tensor, offsets: Any, indices: list[int], *rest: Any) -> None:
        with self.tensors(products) as p, self.buffer(estimate, offsets) as sums, self.ends_only():
            self.operators.hutchinson_(p, sums, self.offsets, indices[::2], *rest)

    def update_(
        self, params: Any, grads: Any, products: Any, backup: Tensor, exp_avg: Tensor, exp_hessian: Tensor,
        steps: Tensor, skipped: Tensor, offsets: Any, rows: list[int], *rest: Any,
    ) -> None:  # fmt: skip
        with (
            self.tensors(params) as w,
            self.tensors(grads) as g,
            self.tensors(products) as p,
            self.buffer(backup, offsets) as kept,
            self.buffer(exp_avg, offsets) as m,
            self.buffer(exp_hessian, offsets) as D,
            self.ends_only(),
        ):
            self.operators.update_(w, g, p, kept, m, D, steps, skipped, self.offsets, rows[1:], *rest)

    def grad_norm(self, grads: Any, params: Any, adaptive: bool) -> Tensor:
        with self.tensors(grads) as g, self.tensors(params) as w, self.ends_only():
            return self.operators.grad_norm(g, w, adaptive)

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
    def buffer(self, flat: Tensor, offsets: Sequence[int]) -> Iterator[Tensor]:
        whole = sparse(self.total, flat.dtype)
        for (at, length), offset in zip(self.pieces, offsets, strict=True):
            whole[at : at + length] = flat[offset : offset + length]
        yield whole
        for (at, length), offset in zip(self.pieces, offsets, strict=True):
            flat[offset : offset + length] = whole[at : at + length]
        self.check_between(whole)
        assert not bits(whole[self.count : self.offsets[1]]).any(), "what belongs to no tensor was written"

    def check_between(self, t: Tensor) -> None:
        for start in (HEAD, self.tail - MARGIN):
            assert not bits(t[start : start + MARGIN]).any(), "what no block that ran has to do with was written"


@pytest.fixture(params=[2**31 + 300, 2**32 + 300], ids=["2^31+300", "2^32+300"])
def spread(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Spread:
    spread = Spread(request.param)
    monkeypatch.setattr(test_operators, "operators_of", lambda _: spread)
    return spread


def test_perturb_reaches_elements_beyond_32_bits(spread: Spread) -> None:
    test_operators.check_perturb(BACKEND, spread.case(), 7.3)


@pytest.mark.parametrize("hessian", [False, True], ids=["lazy", "hessian"])
def test_update_reaches_elements_beyond_32_bits(spread: Spread, hessian: bool) -> None:
    test_operators.check_update(BACKEND, spread.case(), hessian)


def test_a_skipped_step_brings_back_elements_beyond_32_bits(spread: Spread) -> None:
    test_operators.check_skip(BACKEND, spread.case(), torch.tensor(math.inf))


@pytest.mark.parametrize("sample", [0, 1])
def test_the_estimate_reaches_elements_beyond_32_bits(spread: Spread, sample: int) -> None:
    test_operators.check_hutchinson(BACKEND, spread.case(), sample, 2)


def test_signs_reach_elements_beyond_32_bits(spread: Spread) -> None:
    case = spread.case()
    test_operators.run_rademacher(BACKEND, case, 5, 6, 7)
    for z, index in zip(case.params, case.indices, strict=True):
        assert_same_bits(z, signs(index, z.numel(), 5, 6, 7).bfloat16(), "signs")


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_norm_counts_elements_beyond_32_bits(spread: Spread, adaptive: bool) -> None:
    case = spread.case()
    expected = test_operators.exact_norm(case.grads, case.params if adaptive else None)
    norm = test_operators.norm_of(BACKEND, case.grads, case.params, adaptive)
    assert norm == pytest.approx(expected, rel=8 * 2**-53, abs=0)


# ---------------------------------------------------------------------------------------------------------------------
# Tables

# Fills the tables of, in turn: update_ on a Hessian step and a lazy one, perturb_ and signs, the norm.
CAPACITIES = (985, 1300, 1548, 2500)


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


def assert_as_on_the_cpu(case: Case) -> None:
    """Every operator leaves the same bits behind on both backends."""
    results = []
    for name in (BACKEND, "cpu"):
        done: dict[str, Any] = {"perturb": test_operators.perturb(name, case, 7.3, 0.2, True, False)}
        for hessian in (False, True):
            done[f"update {hessian}"] = test_operators.update(
                name, case, test_operators.HYPER, hessian, guard_grads=True
            )
        done["skip"] = test_operators.update(name, case, test_operators.HYPER, True, [torch.tensor(math.nan)])
        for sample in (0, 1):
            done[f"hutchinson {sample}"] = test_operators.hutchinson(name, case, 5, 6, sample, 2)
        done["rademacher"] = case.to("cpu")
        test_operators.run_rademacher(name, done["rademacher"], 5, 6, 7)
        # Of small integers the sums of squares are exact, in whatever order they are taken.
        integers = [(torch.arange(g.numel()) % 7 - 3).to(g.dtype).view(g.shape) for g in case.grads]
        for adaptive in (False, True):
            norm = operators_of(name).grad_norm(integers, integers, adaptive)
            done[f"norm {adaptive}"] = norm
            measured = case.to("cpu")
            measured.params, measured.grads = ([g.clone() for g in integers] for _ in range(2))
            own = torch.full_like(norm, math.nan)
            operators_of(name).perturb_(
                measured.params, measured.grads, measured.backup, case.offsets, own, True, 0.2, adaptive, False
            )
            done[f"measured {adaptive}"], done[f"own norm {adaptive}"] = measured, own
        results.append(done)
    for key, expected in results[1].items():
        compare = assert_same_case if isinstance(expected, Case) else functools.partial(assert_same_bits, what=key)
        compare(results[0][key], expected)


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


@pytest.mark.parametrize("count", [capacity + 1 for capacity in CAPACITIES])
def test_more_tensors_than_a_table_holds_go_into_several(count: int) -> None:
    assert_as_on_the_cpu(chosen(singles(), range(count)))


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
    test_operators.check_perturb(BACKEND, case, 7.3)
    test_operators.check_hutchinson(BACKEND, case, 1, 2)
    for hessian in (False, True):
        test_operators.check_update(BACKEND, case, hessian)


def test_one_block_does_the_work_of_all() -> None:
    with emulation.device(1, 1):
        assert_as_on_the_cpu(make_case(torch.float32, [Spec((20_003,), shift=1), *many(20)]))
        assert_as_on_the_cpu(chosen(singles(), range(1000)))


def test_empty_lists_are_a_step_of_no_tensors() -> None:
    case = chosen(make_case(torch.float32, [Spec((5,))]), [])
    results = []
    for name in (BACKEND, "cpu"):
        done = [test_operators.perturb(name, case, 7.3, 0.2, False, False)]
        done.append(test_operators.hutchinson(name, case, 5, 6, 0, 1))
        for guard in (1.0, math.nan):
            done.append(test_operators.update(name, case, test_operators.HYPER, False, [torch.tensor(guard)]))
        test_operators.run_rademacher(name, case, 5, 6, 7)
        results.append(done)
        with pytest.raises(RuntimeError):
            operators_of(name).grad_norm([], [], False)
    for found, expected in zip(*results, strict=True):
        assert_same_case(found, expected)
    assert [int(case.skipped) for case in results[0]] == [7, 7, 0, 1]


# ---------------------------------------------------------------------------------------------------------------------
# What the launchers refuse

WRITERS: dict[str, Callable[[Case], None]] = {
    "perturb_": lambda case: test_operators.run_perturb(BACKEND, case, 7.3, 0.2, False, False),
    "hutchinson_": lambda case: test_operators.run_hutchinson(BACKEND, case, 5, 6, 0, 1),
    "update_": lambda case: test_operators.run_update(BACKEND, case, test_operators.HYPER, False),
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
        operators_of(BACKEND).grad_norm([sparse(2**38, torch.bfloat16)], [], False)
    assert not launches


def test_tensors_too_long_for_one_table_together_go_into_several() -> None:
    long = sparse(2**37, torch.bfloat16)
    with emulation.intercepted() as launches:
        operators_of(BACKEND).grad_norm([long] * 3, [], False)
    assert len(launches) == 4  # one for each, and the end of the norm


@pytest.mark.parametrize("name", NAMES)
def test_a_launch_that_fails_is_an_error_that_names_the_operator(name: str) -> None:
    case = chosen(singles(), range(3))
    operators, number = operators_of("cuda_emulated"), torch.tensor(1)
    norm = torch.ones((), dtype=torch.float64)
    numbers = (0.1, 0.9, 0.999, 1e-4, 0.0, 0.5, True, False)
    calls: dict[str, Callable[[], object]] = {
        "grad_norm": lambda: operators.grad_norm(case.grads, [], False),
        "perturb_": lambda: operators.perturb_(
            case.params, case.grads, case.backup, case.offsets, norm, False, 0.1, False, False
        ),
        "rademacher_": lambda: operators.rademacher_(case.params, case.indices, 0, number, 0),
        "hutchinson_": lambda: operators.hutchinson_(
            case.products, case.estimate, case.offsets, case.indices, 0, number, 0, 1
        ),
        "update_": lambda: operators.update_(
            *(case.params, case.grads, [], case.backup, case.exp_avg, case.exp_hessian, case.steps, case.skipped),
            *(case.offsets, case.rows, [norm], False, None, *numbers),
        ),
    }
    with emulation.refused(), pytest.raises(RuntimeError, match=f"sassha_fused::{name}: CUDA error: invalid argument"):
        calls[name]()
    calls[name]()

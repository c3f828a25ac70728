"""csrc/cuda run by g++: its conformance tests with threads in other orders, and under sanitizers."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import emulation
from tests.support.backends import marks_of
from tests.support.emulation import BACKEND

pytestmark = [pytest.mark.long, *marks_of(BACKEND)]

ORDERS = ("forward", "reversed", "shuffled")

# Of the tests of operators those of this backend; of the files that have no other all.
KEYWORD = f"{BACKEND} or test_emulation or test_long_tensors or test_tables"
# What the kernels print as they abort must come through.
OPTIONS = ("-q", "-x", "-p", "no:cacheprovider", "--capture=sys", "-k", KEYWORD)

# A copy of csrc in place of the repository's, for what is compiled here.
CSRC_VARIABLE = "SASSHA_TEST_CSRC"


# ---------------------------------------------------------------------------------------------------------------------
# The tests of operators in every order of threads and blocks, and in one of them under sanitizers

# All kernels and dtypes; every size, alignment and layout; one tensor and many; steps that are skipped.
CONFORMANCE = {
    "perturb": (
        "test_perturb_moves_every_element_by_the_formula_and_nothing_else",
        "test_perturb_measures_the_norm_that_grad_norm_does",
        "test_every_parameter_has_its_own_rho",
    ),
    "update": (
        "test_update_changes_every_element_by_the_formula_and_nothing_else",
        "test_update_is_the_formula_in_every_mode",
        "test_update_takes_products_in_the_dtype_of_the_state",
        "test_every_parameter_has_its_own_learning_rate_and_decay",
        "test_without_a_backup_the_step_is_from_the_weights_themselves",
    ),
    "members": (
        "test_adahessian_averages_the_squares_of_products",
        "test_sophia_clips_the_quotient_and_averages_products_with_their_signs",
        "test_adam_averages_the_squares_of_gradients_in_every_step",
        "test_a_plain_direction_is_that_of_sgd",
        "test_perturb_goes_along_exp_avg_the_other_way",
        "test_without_a_backup_w_is_worked_out_from_exp_avg",
    ),
    "blocks": (
        "test_the_means_of_blocks_are_averaged_in",
        "test_the_step_is_that_with_every_block_written_out",
    ),
    "standstill": (
        "test_a_given_norm_that_is_not_finite_moves_no_weight",
        "test_a_measured_norm_that_is_not_finite_moves_no_weight",
    ),
    "hutchinson": (
        "test_one_sample_of_the_estimate_is_the_product_with_its_signs",
        "test_the_estimate_starts_at_zero_and_ends_as_the_mean",
    ),
    "guards": (
        "test_any_one_of_several_guards_skips_the_step",
        # Of each dtype one.
        *(
            f"test_one_element_that_is_not_finite_skips_the_step_where_gradients_are_guards[{case}-{BACKEND}]"
            for case in ("nan-grads-float64", "nan-products-float32", "inf-products-bfloat16")
        ),
        "test_a_skipped_step_brings_back_every_size_and_layout",
    ),
    "norm": (
        "test_norm_is_exact_to_a_few_ulp_of_float64",
        "test_one_element_that_is_not_finite_shows_in_the_norm",
    ),
    "signs": (
        "test_the_first_signs_are_the_bits_of_the_known_answer",
        "test_signs_do_not_repeat_past_the_32_bits_of_a_counter_word",
        "test_signs_follow_the_memory_of_dense_tensors_and_the_rows_of_others",
        "test_many_tensors_have_the_signs_of_one",
    ),
}
# Test ids: a name that is no more ends the run with an error.
TESTS = [f"tests/operators/test_{file}.py::{name}" for file, names in CONFORMANCE.items() for name in names]


def run_tests(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs pytest on the emulated kernels in a process of its own, up to the first failure."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("COVERAGE_", "PYTEST_"))}
    return subprocess.run(
        [sys.executable, "-m", "pytest", *OPTIONS, *arguments],
        cwd=emulation.ROOT,
        # In CI the examples are the same in every run, and none is kept.
        env=inherited | {"CI": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | variables,
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


def test_sanitizers_find_nothing() -> None:
    environment = sanitizer()
    if isinstance(environment, str):
        pytest.skip(environment)
    library = str(emulation.build(emulation.SANITIZED))
    done = run_tests(*TESTS, **environment, **{emulation.LIBRARY_VARIABLE: library, emulation.SLOW_VARIABLE: "1"})
    assert done.returncode == 0, done.stdout[-6000:]


# Forward they run as every test of this backend does.
@pytest.mark.parametrize("order", ORDERS[1:])
def test_the_order_of_threads_and_blocks_changes_no_result(order: str) -> None:
    done = run_tests(*TESTS, **{"SASSHA_EMULATION_ORDER": order, emulation.SLOW_VARIABLE: "1"})
    assert done.returncode == 0, done.stdout[-6000:]


def test_the_norm_is_exact_where_float64_is_quick_too(tmp_path: Path) -> None:
    csrc = shutil.copytree(emulation.ROOT / "csrc", tmp_path / "csrc")
    platform = csrc / "cuda" / "platform.h"
    slow = "#else\nconstexpr bool kQuickFloat64 = false;"
    assert platform.read_text().count(slow) == 1
    platform.write_text(platform.read_text().replace(slow, slow.replace("false", "true")))
    library = emulation.build(changed=csrc, only=("cuda/grad_norm.cu",))
    tests = [test for test in TESTS if "test_norm" in test]
    done = run_tests(*tests, **{emulation.LIBRARY_VARIABLE: str(library)})
    assert done.returncode == 0, done.stdout[-6000:]


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


def test_one_sum_over_a_block_may_follow_another(tmp_path: Path) -> None:
    csrc = os.environ.get(CSRC_VARIABLE, str(emulation.ROOT / "csrc"))
    source, program = tmp_path / "two_sums.cpp", tmp_path / "two_sums"
    source.write_text(TWO_SUMS)
    emulation._run(*emulation._FLAGS, f"-I{csrc}", str(source), "-rdynamic", "-ldl", "-o", str(program))
    for order in ORDERS:
        environment = os.environ | {"SASSHA_EMULATION_ORDER": order}
        done = subprocess.run([program], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{order}: {done.stdout}{done.stderr}"

"""The evidence tested: a fault planted in a copy of csrc/cuda makes the tests of its emulation fail, each one of them.

A fault that no test sees is a hole in the tests.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.machine.test_emulation import CSRC_VARIABLE, run_tests
from tests.support import emulation

# Quick to compile; the sanitizer alone that needs no preloaded library.
PLAIN = ("-O0",)
CHECKED = ("-O0", "-fsanitize=undefined", "-fno-sanitize-recover=undefined")

OPERATORS, SIGNS, TABLES, LONG, MODES = (
    f"tests/operators/test_{name}.py" for name in ("operators", "signs", "tables", "long_tensors", "modes")
)
EMULATION = "tests/machine/test_emulation.py"

# What pytest returns where a test has failed; all above says that none was run.
FAILED = 1

PERTURB = f"{OPERATORS}::test_perturb_moves_every_element_by_the_formula_and_nothing_else"
UPDATE = f"{OPERATORS}::test_update_changes_every_element_by_the_formula_and_nothing_else"
NORM = f"{OPERATORS}::test_norm_is_exact_to_a_few_ulp_of_float64"
GUARDS = f"{OPERATORS}::test_any_one_of_several_guards_skips_the_step[cuda_emulated]"
SKIP = f"{OPERATORS}::test_a_skipped_step_brings_back_every_size_and_layout[float32-cuda_emulated]"
PRODUCTS = (
    f"{OPERATORS}::test_one_element_that_is_not_finite_skips_the_step_where_gradients_are_guards"
    "[nan-products-float32-cuda_emulated]"
)
LARGEST = f"{OPERATORS}::test_the_largest_finite_gradients_and_products_skip_no_step[float32-cuda_emulated]"
PERTURB_SIZES = f"{PERTURB}[every size-float32-cuda_emulated]"
PERTURB_ALIGNMENTS = f"{PERTURB}[every size at every alignment-float32-cuda_emulated]"
UPDATE_SIZES = f"{UPDATE}[hessian-every size-float32-cuda_emulated]"
NORM_SIZES = f"{NORM}[False-every size-float32-cuda_emulated]"
GIVEN = f"{MODES}::test_a_given_norm_that_is_not_finite_moves_no_weight[plain-inf-float32-cuda_emulated]"
MEASURED = f"{MODES}::test_a_measured_norm_that_is_not_finite_moves_no_weight[plain-nan-float32-cuda_emulated]"
UNCORRECTED = f"{MODES}::test_an_uncorrected_update_is_the_formula[False-0.5-hessian-float32-cuda_emulated]"
SIGN_INDICES = f"{SIGNS}::test_signs_from_any_index_on_are_those_of_the_reference"
SUMS = f"{EMULATION}::test_one_sum_over_a_block_may_follow_another"
FULL_TABLE = f"{TABLES}::test_more_tensors_than_a_table_holds_go_into_several"
PARTS = f"{TABLES}::test_parts_may_be_left_out_and_come_in_any_order"
LEFT_OUT = f"{PARTS}[every third left out-float32]"
DESCENDING = f"{PARTS}[descending-float32]"
PERTURB_BEYOND = f"{LONG}::test_perturb_reaches_elements_beyond_32_bits"
ESTIMATE_BEYOND = f"{LONG}::test_the_estimate_reaches_elements_beyond_32_bits"
ONE_BLOCK = f"{TABLES}::test_one_block_does_the_work_of_all"
AROUND = f"{TABLES}::test_numbers_around_the_tensors_stay_as_they_are[float32]"
OFFSETS = f"{TABLES}::test_offsets_off_the_boundaries_of_units_are_refused"


@dataclass(frozen=True)
class Fault:
    """A line that is wrong, and the tests that see it; a process that ends by a signal has seen it too."""

    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]
    options: tuple[str, ...] = PLAIN


FAULTS = {
    # reduce.h
    "no barrier before a sum": Fault("reduce.h", "being read.\n  __syncthreads();\n", "being read.\n", (SUMS,)),
    "no barrier within a sum": Fault(
        "reduce.h", "/ kWarp] = x;\n  __syncthreads();\n", "/ kWarp] = x;\n", (NORM_SIZES,)
    ),
    "half a warp is summed": Fault("reduce.h", "distance = kWarp / 2", "distance = kWarp / 4", (NORM_SIZES,)),
    # vectors.h
    "a tail is one too short": Fault(
        "vectors.h", "static_cast<int>(left) :", "static_cast<int>(left) - 1 :", (PERTURB_SIZES,)
    ),
    "every vector is aligned": Fault(
        "vectors.h", "& (kVectorBytes - 1)) == 0", "& (kVectorBytes - 1)) >= 0", (PERTURB_ALIGNMENTS,), CHECKED
    ),
    "elements are counted in 31 bits": Fault(
        "vectors.h",
        "int64_t{first_unit_} * kUnit + within",
        "static_cast<int>(first_unit_ * kUnit + within)",
        (f"{PERTURB_BEYOND}[2^31+300]",),
    ),
    "elements are counted in 32 bits": Fault(
        "vectors.h",
        "int64_t{first_unit_} * kUnit + within",
        "first_unit_ * kUnit + within",
        (f"{PERTURB_BEYOND}[2^32+300]",),
    ),
    "a gap is a tensor": Fault("vectors.h", "table_.data[0][entry_] == nullptr || left <= 0", "left <= 0", (LEFT_OUT,)),
    # table.h
    "a tensor is one too long": Fault("table.h", "- missing[entry];", "- missing[entry] + 1;", (AROUND,)),
    "a table holds one more than it has room for": Fault(
        "table.h", "> AnyTable::kCapacity ||", "> AnyTable::kCapacity + 1 ||", (FULL_TABLE,)
    ),
    "a tensor's first unit is not its own": Fault(
        "table.h", "first_unit[middle] <= unit", "first_unit[middle] < unit", (UPDATE_SIZES,)
    ),
    "the unit behind a tensor is its own": Fault(
        "table.h", "unit < first_unit[entry + 1]", "unit <= first_unit[entry + 1]", (UPDATE_SIZES,)
    ),
    "a gap is left out": Fault("table.h", "if (gap > 0) append", "if (false) append", (LEFT_OUT,)),
    "a part before the last one is a gap": Fault("table.h", "(full || gap < 0)", "(full)", (DESCENDING,)),
    "any offset will do": Fault("table.h", "% kUnit != 0)", "% kUnit < 0)", (OFFSETS,)),
    # signs.h
    "signs come from another thread": Fault(
        "signs.h", "unit * 8 + position / 32", "unit * 8 + position / 32 + 1", (SIGN_INDICES,)
    ),
    "signs are counted in 32 bits": Fault(
        "signs.h",
        "int64_t{unit - table.first_unit[entry]} * kUnit",
        "(unit - table.first_unit[entry]) * kUnit",
        (f"{ESTIMATE_BEYOND}[2^32+300-0]",),
    ),
    # grad_norm.cu, sums.h, perturb.cu
    "the sums of earlier tables are lost": Fault(
        "grad_norm.cu", "partial.count += blocks;", "partial.count = blocks;", (f"{FULL_TABLE}[2501]",)
    ),
    "the last block's sum is lost": Fault(
        "grad_norm.cu", "partial.count += blocks;", "partial.count += blocks - 1;", (NORM_SIZES,)
    ),
    "the measured norm is kept": Fault("perturb.cu", "*a.norm = norm;", "(void)norm;", (f"{FULL_TABLE}[986]",)),
    "a given norm that is not finite moves the weights": Fault("perturb.cu", "if (!finite) continue;", "", (GIVEN,)),
    "a norm counts as finite before it is measured": Fault(
        "perturb.cu",
        "const bool finite = std::isfinite(norm);",
        "const bool finite = a.partial_count > 0 || std::isfinite(norm);",
        (MEASURED,),
    ),
    "weights that stay are not saved": Fault(
        "perturb.cu",
        "      store<Reuse::kLate>(w, at.length, vectors, backup);\n      if (!finite) continue;\n",
        "      if (!finite) continue;\n      store<Reuse::kLate>(w, at.length, vectors, backup);\n",
        (GIVEN,),
    ),
    # update.cu
    "the guards of further launches are lost": Fault(
        "update.cu", "partial.count += blocks;", "partial.count = blocks;", (GUARDS,)
    ),
    "large numbers are taken for infinite": Fault("sums.h", "sum += 0.0f * widen(g)", "sum += widen(g)", (LARGEST,)),
    "products are not looked at": Fault("update.cu", "if (u.guard_grads && u.products)", "if (false)", (PRODUCTS,)),
    "steps are not counted": Fault("update.cu", "    a.steps[2 * row] = a.prepared[row].step;\n", "", (UPDATE_SIZES,)),
    "Hessian steps are not counted": Fault(
        "update.cu", "    a.steps[2 * row + 1] = a.prepared[row].hessian_step;\n", "", (UPDATE_SIZES,)
    ),
    "only the first threads' rows are counted": Fault(
        "update.cu", "entry += gridDim.x * kThreads", "entry += a.table.count", (ONE_BLOCK,)
    ),
    "a gap has a row": Fault(
        "update.cu", "if (row < 0) continue;", "", (f"{UPDATE}[lazy-57 tensors-float32-cuda_emulated]",)
    ),
    "an uncorrected step is corrected": Fault(
        "../math/sassha.h", "h.bias_correction != BiasCorrection::kNone", "true", (UNCORRECTED,)
    ),
    "an uncorrected Hessian step is counted as published": Fault(
        "../math/sassha.h",
        "correction == BiasCorrection::kStep ?",
        "correction != BiasCorrection::kUpdate ?",
        (UNCORRECTED,),
    ),
    "a skipped step is counted": Fault("update.cu", "  if (!finite) return;\n", "", (SKIP,)),
    "a skipped step is taken": Fault("update.cu", "  if (!finite) return restore<P>(a);\n", "", (SKIP,)),
}


def build(csrc: Path, options: tuple[str, ...]) -> dict[str, str]:
    """Builds the sources of a copy; returns the variables that have tests use it."""
    return {emulation.LIBRARY_VARIABLE: str(emulation.build(csrc, options)), CSRC_VARIABLE: str(csrc)}


@pytest.fixture
def csrc(tmp_path: Path) -> Path:
    return Path(shutil.copytree(emulation.ROOT / "csrc", tmp_path / "csrc"))


@pytest.mark.parametrize("options", [PLAIN, CHECKED], ids=["plain", "checked"])
def test_without_a_fault_the_same_tests_pass(csrc: Path, options: tuple[str, ...]) -> None:
    tests = dict.fromkeys(test for fault in FAULTS.values() if fault.options == options for test in fault.tests)
    done = run_tests(*tests, **build(csrc, options))
    assert done.returncode == 0, done.stdout[-4000:]
    assert "skipped" not in done.stdout, "a fault would go unseen here"


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_seen(csrc: Path, name: str) -> None:
    fault = FAULTS[name]
    file = csrc / "cuda" / fault.file
    text = file.read_text()
    assert text.count(fault.right) == 1, f"{fault.file} has not exactly one {fault.right!r}"
    file.write_text(text.replace(fault.right, fault.wrong))
    done = run_tests(*fault.tests, **build(csrc, fault.options))
    # The sanitizer ends the process with the same code as pytest does.
    reported = any(report in done.stdout for report in ("1 failed", "runtime error:"))
    seen = (done.returncode == FAILED and reported) or done.returncode < 0
    assert seen, f"exit code {done.returncode}\n{done.stdout[-4000:]}"

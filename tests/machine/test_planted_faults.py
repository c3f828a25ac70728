"""The evidence tested: a fault planted in a copy of csrc/cuda makes the tests of its emulation fail, each one of them.

A fault that no test sees is a hole in the tests.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.machine.test_emulation import CSRC_VARIABLE, KEYWORD, OPTIONS
from tests.support import emulation
from tests.support.backends import marks_of
from tests.support.faults import FAILED, UNEXPLAINED, plant
from tests.support.forks import Forks

pytestmark = [pytest.mark.long, *marks_of(emulation.BACKEND)]

# Quick to compile; the sanitizer alone that needs no preloaded library.
PLAIN = ("-O0",)
CHECKED = ("-O0", "-fsanitize=undefined", "-fno-sanitize-recover=undefined")
# Of all dtypes the kernels take up to three times as long to compile: what is left out, and the tests that are not.
OTHER_DTYPES = re.compile(r"    case Dtype::k\w+:\n      return body\(Type<(?!float>)\w+>{}\);\n")
IN_FLOAT32 = f"({KEYWORD}) and not float16 and not float64-{emulation.BACKEND} and not float64]"

FOLDER = "tests/operators"
TABLES, LONG = f"{FOLDER}/test_tables.py", f"{FOLDER}/test_long_tensors.py"
EMULATION = "tests/machine/test_emulation.py"

PERTURB = f"{FOLDER}/test_perturb.py::test_perturb_moves_every_element_by_the_formula_and_nothing_else"
UPDATE = f"{FOLDER}/test_update.py::test_update_changes_every_element_by_the_formula_and_nothing_else"
NORM = f"{FOLDER}/test_norm.py::test_norm_is_exact_to_a_few_ulp_of_float64"
RANGE = f"{FOLDER}/test_norm_range.py"
WEIGHTS = f"{RANGE}::test_weights_that_are_not_finite_show_where_gradients_are_0[inf-cuda_emulated in float32]"
EQUAL = f"{RANGE}::test_norm_of_many_equal_numbers_is_exact"
SKIPPED = f"{FOLDER}/test_guards.py"
GUARDS = f"{SKIPPED}::test_any_one_of_several_guards_skips_the_step[cuda_emulated]"
SKIP = f"{SKIPPED}::test_a_skipped_step_brings_back_every_size_and_layout[every size-float32-cuda_emulated]"
PRODUCTS = (
    f"{SKIPPED}::test_one_element_that_is_not_finite_skips_the_step_where_gradients_are_guards"
    "[nan-products-float32-cuda_emulated]"
)
LARGEST = f"{SKIPPED}::test_the_largest_finite_gradients_and_products_skip_no_step[float32-cuda_emulated]"
OWN_RHO = f"{FOLDER}/test_perturb.py::test_every_parameter_has_its_own_rho[not adaptive-float32-cuda_emulated]"
OWN_RATE = f"{FOLDER}/test_update.py::test_every_parameter_has_its_own_learning_rate_and_decay"
ALONE = f"{FOLDER}/test_update.py::test_without_a_backup_the_step_is_from_the_weights_themselves"
REFUSED = f"{FOLDER}/test_schemas.py::test_arguments_that_do_not_fit_are_refused_and_nothing_is_written"
PERTURB_SIZES = f"{PERTURB}[every size-float32-cuda_emulated]"
PERTURB_ALIGNMENTS = f"{PERTURB}[every size at every alignment-float32-cuda_emulated]"
SIGN_INDEX = f"{FOLDER}/test_signs.py::test_signs_from_any_index_on_are_those_of_the_reference[12345-cuda_emulated]"
STANDSTILL = f"{FOLDER}/test_standstill.py"
GIVEN = f"{STANDSTILL}::test_a_given_norm_that_is_not_finite_moves_no_weight"
MEASURED = f"{STANDSTILL}::test_a_measured_norm_that_is_not_finite_moves_no_weight"
COUNTS = f"{FOLDER}/test_update.py::test_counts_of_any_length_correct_the_bias[(9, 1)-cuda_emulated]"
SUMS = f"{EMULATION}::test_one_sum_over_a_block_may_follow_another"
FULL_TABLE = f"{TABLES}::test_more_tensors_than_a_table_holds_go_into_several"
PARTS = f"{TABLES}::test_parts_may_be_left_out_and_come_in_any_order"
LEFT_OUT = f"{PARTS}[every third left out-float32]"
DESCENDING = f"{PARTS}[descending-float32]"
PERTURB_BEYOND = f"{LONG}::test_perturb_reaches_elements_beyond_32_bits"
ESTIMATE_BEYOND = f"{LONG}::test_the_estimate_reaches_elements_beyond_32_bits"
ONE_BLOCK = f"{TABLES}::test_one_block_does_the_work_of_all"
AROUND = f"{TABLES}::test_numbers_around_the_tensors_stay_as_they_are[float32]"
MEMBERS, BLOCKS = f"{FOLDER}/test_members.py", f"{FOLDER}/test_blocks.py"
SQUARES = f"{MEMBERS}::test_adahessian_averages_the_squares_of_products"
SOPHIA = f"{MEMBERS}::test_sophia_clips_the_quotient_and_averages_products_with_their_signs"
ADAM = f"{MEMBERS}::test_adam_averages_the_squares_of_gradients_in_every_step"
SGD = f"{MEMBERS}::test_a_plain_direction_is_that_of_sgd"
ALONG = f"{MEMBERS}::test_perturb_goes_along_exp_avg_the_other_way"
WORKED_OUT = f"{MEMBERS}::test_without_a_backup_w_is_worked_out_from_exp_avg"
STAYS = f"{MEMBERS}::test_an_average_whose_norm_is_not_finite_moves_no_weight"
MEANS = f"{BLOCKS}::test_the_means_of_blocks_are_averaged_in"
WRITTEN_OUT = f"{BLOCKS}::test_the_step_is_that_with_every_block_written_out"
BLOCKS_BEYOND = f"{LONG}::test_blocks_reach_elements_beyond_32_bits"
OF_AVERAGE = f"{FOLDER}/test_norm_of_average.py"
NORM_STAYS = f"{OF_AVERAGE}::test_a_step_that_is_skipped_leaves_the_norm_as_it_was[cuda_emulated]"
NORM_OF_TABLES = f"{OF_AVERAGE}::test_the_sums_of_several_tables_come_together[cuda_emulated]"
OFFSETS = f"{TABLES}::test_offsets_off_the_boundaries_of_units_are_refused[0-1-perturb_]"


def in_range(numbers: str, adaptive: str = "not adaptive") -> str:
    """The test of float32 norms of numbers in this range."""
    case = f"cuda_emulated in float32-{numbers}-{adaptive}-float32"
    return f"{RANGE}::test_norm_is_exact_over_the_range_of_every_dtype[{case}]"


NORM_FILE, PERTURB_FILE, UPDATE_FILE = ("cuda/grad_norm.cu",), ("cuda/perturb.cu",), ("cuda/update.cu",)
GLUE = ("cuda/torch.cpp",)
INSPECT_FILE = ("cuda/inspect.cu",)
BOTH_FILES = (*INSPECT_FILE, *UPDATE_FILE)
AVERAGE_FILE = ("cuda/block_average.cu",)
SIGNS_FILE, ESTIMATE_FILE = ("cuda/rademacher.cu",), ("cuda/hutchinson.cu",)

SKIPS = "if (a.skipped != nullptr && *a.skipped != 0) return;"
SAVE = "if (backup != nullptr) store<Reuse::kLate>(w, at.length, vectors, backup);"
RESTORE = "if (a.backup != nullptr || moved_along) restore(a);"
EITHER = "a.backup != nullptr ? a.backup + at.flat : weights"
OLD = f"{EITHER};\n      P w[kVector<P>];\n"


@dataclass(frozen=True)
class Fault:
    """A line that is wrong, and the tests that see it; a process that ends by a signal has seen it too.

    compiled: the kernels that these tests run, which alone are compiled with the fault.
    """

    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]
    compiled: tuple[str, ...]
    options: tuple[str, ...] = PLAIN

    @property
    def in_float32(self) -> bool:
        """Whether float32 alone is compiled, and tested; these tests need other dtypes."""
        return not any(test.startswith((LONG, ALONG, COUNTS, SGD, MEANS)) for test in self.tests)


FAULTS = {
    # reduce.h
    "no barrier before a sum": Fault("reduce.h", "being read.\n  __syncthreads();\n", "being read.\n", (SUMS,), ()),
    "no barrier within a sum": Fault(
        "reduce.h", "/ kWarp] = x;\n  __syncthreads();\n", "/ kWarp] = x;\n", (NORM,), NORM_FILE
    ),
    "half a warp is summed": Fault("reduce.h", "distance = kWarp / 2", "distance = kWarp / 4", (NORM,), NORM_FILE),
    # vectors.h
    "a tail is one too short": Fault(
        "vectors.h", "static_cast<int>(left) :", "static_cast<int>(left) - 1 :", (PERTURB_SIZES,), PERTURB_FILE
    ),
    "every vector is aligned": Fault(
        "vectors.h",
        "& (kVectorBytes - 1)) == 0",
        "& (kVectorBytes - 1)) >= 0",
        (PERTURB_ALIGNMENTS,),
        PERTURB_FILE,
        CHECKED,
    ),
    "elements are counted in 31 bits": Fault(
        "vectors.h",
        "int64_t{first_unit_} * kUnit + within",
        "static_cast<int>(first_unit_ * kUnit + within)",
        (f"{PERTURB_BEYOND}[2^31+300]",),
        PERTURB_FILE,
    ),
    "elements are counted in 32 bits": Fault(
        "vectors.h",
        "int64_t{first_unit_} * kUnit + within",
        "first_unit_ * kUnit + within",
        (f"{PERTURB_BEYOND}[2^32+300]",),
        PERTURB_FILE,
    ),
    "a gap is a tensor": Fault(
        "vectors.h", "table_.data[0][entry_] == nullptr || left <= 0", "left <= 0", (LEFT_OUT,), PERTURB_FILE
    ),
    # table.h
    "a tensor is one too long": Fault("table.h", "- missing[entry];", "- missing[entry] + 1;", (AROUND,), PERTURB_FILE),
    "a table holds one more than it has room for": Fault(
        "table.h", "> AnyTable::kCapacity ||", "> AnyTable::kCapacity + 1 ||", (f"{FULL_TABLE}[1300]",), PERTURB_FILE
    ),
    "a tensor's first unit is not its own": Fault(
        "table.h", "first_unit[middle] <= unit", "first_unit[middle] < unit", (UPDATE,), UPDATE_FILE
    ),
    "the unit behind a tensor is its own": Fault(
        "table.h", "unit < first_unit[entry + 1]", "unit <= first_unit[entry + 1]", (UPDATE,), UPDATE_FILE
    ),
    "a gap is left out": Fault("table.h", "if (gap > 0) append", "if (false) append", (LEFT_OUT,), PERTURB_FILE),
    "a part before the last one is a gap": Fault("table.h", "(full || gap < 0)", "(full)", (DESCENDING,), PERTURB_FILE),
    "any offset will do": Fault("table.h", "% kUnit != 0)", "% kUnit < 0)", (OFFSETS,), PERTURB_FILE),
    # signs.h
    "signs come from another thread": Fault(
        "signs.h", "unit * 8 + position / 32", "unit * 8 + position / 32 + 1", (SIGN_INDEX,), SIGNS_FILE
    ),
    "signs are counted in 32 bits": Fault(
        "signs.h",
        "int64_t{unit - table.first_unit[entry]} * kUnit",
        "(unit - table.first_unit[entry]) * kUnit",
        (f"{ESTIMATE_BEYOND}[2^32+300-0]",),
        ESTIMATE_FILE,
    ),
    # compensated.h, sums.h
    "what squares have lost is lost": Fault(
        "compensated.h", "if (!kExact) add_middle(std::fma(x, x, -square));", "", (in_range("ordinary"),), NORM_FILE
    ),
    "what a sum has lost is lost": Fault(
        "compensated.h", "    add_middle(lost);\n", "", (in_range("ordinary"),), NORM_FILE
    ),
    "what the second float has lost is lost": Fault(
        "compensated.h", "    low_ += lost;\n", "", (in_range("the same"),), NORM_FILE
    ),
    "what products have lost is lost": Fault(
        "sums.h", "std::fma(gradient, widen(w), -term)", "0.0f", (in_range("ordinary", "adaptive"),), NORM_FILE
    ),
    "sums are not normalized": Fault("sums.h", "sum.normalize();", "", (EQUAL,), NORM_FILE),
    "a sum too small for float32 is kept": Fault(
        "sums.h", "if (share >= kSmallest)", "if (share >= 0)", (in_range("small"),), NORM_FILE
    ),
    "a sum beyond float32 is kept": Fault(
        "sums.h", "if (share >= kSmallest)", "if (!(share < kSmallest))", (in_range("largest"),), NORM_FILE
    ),
    "a sum that vanishes is kept": Fault(
        "sums.h", "share == 0 && block_sum(zero ? 0.0 : 1.0) == 0", "share == 0", (in_range("subnormal"),), NORM_FILE
    ),
    "a norm without gradients is 0 whatever the weights": Fault(
        "sums.h", "share == 0 && block_sum", "block_sum", (WEIGHTS,), NORM_FILE
    ),
    # grad_norm.cu, perturb.cu
    "the sums of earlier tables are lost": Fault(
        "grad_norm.cu", "partial.count += blocks;", "partial.count = blocks;", (f"{FULL_TABLE}[2500]",), NORM_FILE
    ),
    "the last block's sum is lost": Fault(
        "grad_norm.cu", "partial.count += blocks;", "partial.count += blocks - 1;", (NORM,), NORM_FILE
    ),
    "the measured norm is kept": Fault(
        "perturb.cu", "*a.norm = norm.value;", "(void)norm;", (f"{FULL_TABLE}[1300]",), PERTURB_FILE
    ),
    "a given norm that is not finite moves the weights": Fault(
        "perturb.cu", "if (!finite) continue;", "", (GIVEN,), PERTURB_FILE
    ),
    "a norm counts as finite before it is measured": Fault(
        "perturb.cu",
        "finite = std::isfinite(norm.value);",
        "finite = a.partial_count > 0 || std::isfinite(norm.value);",
        (MEASURED,),
        PERTURB_FILE,
    ),
    "weights that stay are not saved": Fault(
        "perturb.cu",
        f"      {SAVE}\n      if (!finite) continue;\n",
        f"      if (!finite) continue;\n      {SAVE}\n",
        (GIVEN,),
        PERTURB_FILE,
    ),
    "a parameter has the rho of another row": Fault(
        "perturb.cu", "a.per_row[row].rho", "a.per_row[entry].rho", (OWN_RHO,), PERTURB_FILE
    ),
    "a parameter has the rho of the first one": Fault(
        "perturb.cu", "scales[at.entry]", "scales[0]", (OWN_RHO,), PERTURB_FILE
    ),
    "no barrier before rho is read": Fault(
        "perturb.cu", "  __syncthreads();\n  for (Chunks", "  for (Chunks", (OWN_RHO,), PERTURB_FILE
    ),
    "only the first threads' rho are known": Fault(
        "perturb.cu",
        "entry < a.table.count; entry += kThreads",
        "entry < a.table.count; entry += a.table.count",
        (f"{FULL_TABLE}[1300]",),
        PERTURB_FILE,
    ),
    # torch.cpp
    "what was laid out otherwise is perturbed": Fault(
        "torch.cpp",
        "(param_list, layouts);\n  const TensorList grads(grad_list, params);\n  const Settings",
        "(param_list);\n  const TensorList grads(grad_list, params);\n  const Settings",
        (f"{REFUSED}[perturb_-layouts-of_other_strides-cuda_emulated]",),
        GLUE,
    ),
    "what was laid out otherwise is updated": Fault(
        "torch.cpp",
        "(param_list, layouts);\n  const TensorList grads(grad_list, params);\n  const bool hessian_step",
        "(param_list);\n  const TensorList grads(grad_list, params);\n  const bool hessian_step",
        (f"{REFUSED}[update_-layouts-of_other_strides-cuda_emulated]",),
        GLUE,
    ),
    # update.cu
    "the guards of further launches are lost": Fault(
        "inspect.cu", "partial.count += blocks;", "partial.count = blocks;", (GUARDS,), INSPECT_FILE
    ),
    "large numbers are taken for infinite": Fault(
        "sums.h", "sum += 0.0f * widen(g)", "sum += widen(g)", (LARGEST,), INSPECT_FILE
    ),
    "products are not looked at": Fault(
        "inspect.cu", "if (u.guard_grads && u.products)", "if (false)", (PRODUCTS,), INSPECT_FILE
    ),
    "steps are not counted": Fault(
        "update.cu", "    a.steps[2 * row] = a.prepared[row].step;\n", "", (UPDATE,), UPDATE_FILE
    ),
    "Hessian steps are not counted": Fault(
        "update.cu", "    a.steps[2 * row + 1] = a.prepared[row].hessian_step;\n", "", (UPDATE,), UPDATE_FILE
    ),
    "only the first threads' rows are counted": Fault(
        "update.cu", "entry += gridDim.x * kThreads", "entry += a.table.count", (ONE_BLOCK,), UPDATE_FILE
    ),
    "a gap has a row": Fault("update.cu", "if (row < 0) continue;", "", (UPDATE,), UPDATE_FILE),
    "an uncorrected step is corrected": Fault(
        "../math/sassha.h", "!is(settings.bias_correction, BiasCorrection::kNone)", "true", (COUNTS,), INSPECT_FILE
    ),
    "an uncorrected Hessian step is counted as published": Fault(
        "../math/sassha.h",
        "is(settings.bias_correction, BiasCorrection::kStep) ?",
        "!is(settings.bias_correction, BiasCorrection::kUpdate) ?",
        (COUNTS,),
        INSPECT_FILE,
    ),
    "a skipped step is counted": Fault("update.cu", "  if (!finite) return;\n", "", (SKIP,), UPDATE_FILE),
    "a skipped step is taken": Fault("update.cu", f"    {RESTORE}\n    return;\n", "", (SKIP,), UPDATE_FILE),
    "a skipped step restores nothing": Fault("update.cu", RESTORE, "", (SKIP,), UPDATE_FILE),
    "the backup is ignored": Fault("update.cu", OLD, OLD.replace(EITHER, "weights"), (UPDATE,), UPDATE_FILE),
    "there is a backup at all times": Fault(
        "update.cu", OLD, OLD.replace(EITHER, "a.backup + at.flat"), (ALONE,), UPDATE_FILE
    ),
    "a later table's backup is that of the first": Fault(
        "update.cu",
        "static_cast<const P*>(u.backup) + origin",
        "static_cast<const P*>(u.backup)",
        (UPDATE,),
        UPDATE_FILE,
    ),
    "a parameter has the learning rate of another row": Fault(
        "inspect.cu", "chores.per_row[row]", "chores.per_row[row / 2]", (OWN_RATE,), INSPECT_FILE
    ),
    "a parameter has the scalars of another row": Fault(
        "update.cu", "a.prepared[a.table.row[entry]].scalars", "a.prepared[entry].scalars", (OWN_RATE,), UPDATE_FILE
    ),
    "a parameter keeps the scalars of the one before": Fault(
        "update.cu", "if (at.entry != entry)", "if (entry < 0)", (OWN_RATE,), UPDATE_FILE
    ),
    "a number is what is left of it in float32": Fault(
        "../math/sassha.h",
        "static_cast<T>(x - static_cast<double>(high))",
        "T(0)",
        (DESCENDING,),
        BOTH_FILES,
    ),
    # The other members: math/sassha.h, perturb.cu, update.cu
    "what keeps its sign is squared": Fault(
        "../math/sassha.h", "c.squares == 0 ? magnitude", "c.is_signed == 0 ? magnitude", (SOPHIA,), UPDATE_FILE
    ),
    "squares are not taken": Fault(
        "../math/sassha.h", "square = magnitude * magnitude", "square = magnitude", (SQUARES,), UPDATE_FILE
    ),
    "signs are lost": Fault(
        "../math/sassha.h",
        "c.is_signed != 0 ? hessian : std::fabs(hessian)",
        "std::fabs(hessian)",
        (SOPHIA,),
        UPDATE_FILE,
    ),
    "a clipped direction is not clipped": Fault(
        "../math/sassha.h", "quotient > 1 ? 1 : quotient < -1 ? -1 : quotient", "quotient", (SOPHIA,), UPDATE_FILE
    ),
    "nesterov is ignored": Fault(
        "../math/sassha.h",
        "c.nesterov != 0 ? times_plus(exp_avg, c.beta1, gradient) : exp_avg",
        "exp_avg",
        (SGD,),
        UPDATE_FILE,
    ),
    "the first gradient is dampened": Fault(
        "../math/sassha.h",
        "step == 1 ? 1.0 : 1.0 - settings.dampening",
        "1.0 - settings.dampening",
        (SGD,),
        INSPECT_FILE,
    ),
    "squares of gradients are not averaged": Fault(
        "update.cu", "!u.products && !u.averaged && averages_second(u.settings, false)", "false", (ADAM,), UPDATE_FILE
    ),
    "squares of gradients go with a root alone": Fault(
        "update.cu", "of_gradients && kind_of(u.settings) != Kind::kSquareRoot", "false", (ADAM,), UPDATE_FILE
    ),
    "exp_avg leads up": Fault(
        "../math/sassha.h", " || is(settings.ascent, Ascent::kMomentum) ?", " ?", (ALONG,), PERTURB_FILE
    ),
    "exp_avg is read in the dtype of the weights": Fault(
        "perturb.cu", "p.grads.dtype != p.params.dtype ?", "false ?", (ALONG,), PERTURB_FILE
    ),
    "w is not worked out": Fault(
        "update.cu", "if (moved_along) unperturb(w, m, scalars);", "", (WORKED_OUT,), UPDATE_FILE
    ),
    "w is not worked out in a skipped step": Fault(
        "update.cu", RESTORE, "if (a.backup != nullptr) restore(a);", (WORKED_OUT,), UPDATE_FILE
    ),
    "w' is taken for w in a skipped step": Fault(
        "update.cu", "if (a.backup == nullptr) {", "if (false) {", (WORKED_OUT,), UPDATE_FILE
    ),
    "w is worked out from a norm that is not finite": Fault(
        "inspect.h",
        "norm != nullptr && std::isfinite(*norm)",
        "norm != nullptr",
        (STAYS,),
        BOTH_FILES,
    ),
    # blocks.h, block_average.cu
    "each element has a number of its own": Fault(
        "blocks.h", "first + (i >> shift)", "first + i", (WRITTEN_OUT,), UPDATE_FILE
    ),
    "a number is that of the vector's first block": Fault(
        "blocks.h", "(i & (at.length() - 1)) != 0", "i != 0", (WRITTEN_OUT,), UPDATE_FILE
    ),
    "blocks end where they end in the whole state": Fault(
        "blocks.h", "blocks.end - origin", "blocks.end", (WRITTEN_OUT,), UPDATE_FILE
    ),
    "a table's blocks lie where its elements do": Fault(
        "update.cu", "start = blocks.index(origin)", "start = origin", (WRITTEN_OUT,), UPDATE_FILE
    ),
    "blocks are counted in 32 bits": Fault(
        "blocks.h",
        "first(blocks.index(element))",
        "first(static_cast<int>(blocks.index(element)))",
        (BLOCKS_BEYOND,),
        (*UPDATE_FILE, *AVERAGE_FILE),
    ),
    "averages of blocks are not kept": Fault(
        "update.cu",
        "if (a.averaged != nullptr) store_shared(D, shared, length, a.exp_hessian);",
        "",
        (WRITTEN_OUT,),
        UPDATE_FILE,
    ),
    "averages of blocks are kept in a skipped step": Fault(
        "update.cu",
        f"    {RESTORE}\n",
        f"    {RESTORE}\n    if (a.averaged != nullptr) *a.exp_hessian = *a.averaged;\n",
        (WRITTEN_OUT,),
        UPDATE_FILE,
    ),
    "averages of blocks make no Hessian step": Fault(
        "inspect.cu", "u.products || u.averaged)", "u.products.has_value())", (WRITTEN_OUT,), INSPECT_FILE
    ),
    "pairs are far apart first": Fault(
        "block_average.cu",
        "distance = kCount; distance < 1 << a.blocks.shift; distance *= 2",
        "distance = (1 << a.blocks.shift) / 2; distance >= kCount; distance /= 2",
        (MEANS,),
        AVERAGE_FILE,
    ),
    "a short block's mean is by its length": Fault(
        "block_average.cu", "left - i < block ? static_cast<int>(left - i) : block", "block", (MEANS,), AVERAGE_FILE
    ),
    "a shorter block takes from others": Fault(
        "block_average.cu", "if (distance < block) sums[0]", "sums[0]", (MEANS,), AVERAGE_FILE
    ),
    "a skipped step takes the norm along": Fault("grad_norm.cu", SKIPS, "", (NORM_STAYS,), NORM_FILE),
    "the last table's sums are all": Fault("update.cu", "? *sum : 0", "? 0 : 0", (NORM_OF_TABLES,), UPDATE_FILE),
    "sums are of products with their signs": Fault(
        "block_average.cu", "std::fabs(widen(products[j][i]))", "widen(products[j][i])", (MEANS,), AVERAGE_FILE
    ),
}


@pytest.fixture
def csrc(tmp_path: Path) -> Path:
    return Path(shutil.copytree(emulation.ROOT / "csrc", tmp_path / "csrc"))


def run(
    forks: Forks, tests: Sequence[str], csrc: Path, options: Sequence[str], compiled: Sequence[str], in_float32: bool
) -> tuple[int, str]:
    """Runs tests on what is compiled of a copy; returns the exit code and what was printed."""
    if in_float32:
        numbers = csrc / "cuda" / "numbers.h"
        text, count = OTHER_DTYPES.subn("", numbers.read_text())
        assert count == 3
        numbers.write_text(text)
    library = emulation.build(options, changed=csrc, only=compiled)
    chosen = ("-k", IN_FLOAT32) if in_float32 else ()
    done = forks.run(*OPTIONS, *chosen, *tests, **{emulation.LIBRARY_VARIABLE: str(library), CSRC_VARIABLE: str(csrc)})
    return done.returncode, done.stdout


@pytest.mark.parametrize("options, in_float32", dict.fromkeys((f.options, f.in_float32) for f in FAULTS.values()))
def test_without_a_fault_the_same_tests_pass(
    forks: Forks, csrc: Path, options: tuple[str, ...], in_float32: bool
) -> None:
    faults = [fault for fault in FAULTS.values() if (fault.options, fault.in_float32) == (options, in_float32)]
    tests = dict.fromkeys(test for fault in faults for test in fault.tests)
    compiled = dict.fromkeys(name for fault in faults for name in fault.compiled)
    code, printed = run(forks, list(tests), csrc, options, list(compiled), in_float32)
    assert code == 0, printed[-4000:]
    assert "skipped" not in printed, "a fault would go unseen here"


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_seen(forks: Forks, csrc: Path, name: str) -> None:
    fault = FAULTS[name]
    plant(csrc / "cuda" / fault.file, fault.right, fault.wrong)
    code, printed = run(forks, [UNEXPLAINED, *fault.tests], csrc, fault.options, fault.compiled, fault.in_float32)
    # The sanitizer ends the process with the same code as pytest does.
    reported = any(report in printed for report in ("1 failed", "runtime error:"))
    assert (code == FAILED and reported) or code < 0, f"exit code {code}\n{printed[-4000:]}"


def test_a_process_that_ends_by_a_signal_or_finds_no_test_is_told_apart(forks: Forks) -> None:
    assert forks.run("--no-such-option").returncode > FAILED
    assert forks.run(*OPTIONS, f"{TABLES}::no_such_test").returncode > FAILED
    done = forks.run(*OPTIONS, NORM, SASSHA_EMULATION_ORDER="odd")
    assert done.returncode < 0 and "SASSHA_EMULATION_ORDER must be" in done.stdout

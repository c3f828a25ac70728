"""The evidence tested: a fault planted in a copy of triton_kernels makes the tests of interpreted operators fail.

A fault that no test sees is a hole in the tests.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("triton")

from tests.support.backends import BACKENDS
from tests.support.emulation import ROOT
from tests.support.faults import FAILED, KERNELS_VARIABLE, UNEXPLAINED, plant
from tests.support.forks import Forks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.skipif(BACKENDS["triton"] != "cpu", reason="Triton is not interpreted here"),
]

OPTIONS = ("-q", "-x", "-p", "no:cacheprovider", "-p", "tests.support.planted")


def node_of(file: str, name: str, *case: str) -> str:
    """The node of a test of the operators, on this backend."""
    return f"tests/operators/test_{file}.py::test_{name}[{'-'.join([*case, 'triton'])}]"


UPDATE = node_of("update", "update_changes_every_element_by_the_formula_and_nothing_else", "hessian-57 tensors-float32")
EVERY_POWER = node_of("update", "update_is_the_formula_at_every_power", "0.5-float32")
UPDATE_MODES = node_of("update", "update_is_the_formula_in_every_mode", "maximize-none-0.5-not hessian-float32")
OWN_RATE = node_of("update", "every_parameter_has_its_own_learning_rate_and_decay", "update-not hessian-float32")
COUNTS = node_of("update", "counts_of_any_length_correct_the_bias", "(9, 1)")
WITHOUT_BACKUP = node_of("update", "without_a_backup_the_step_is_from_the_weights_themselves", "0.5-hessian-float32")
PERTURB = node_of("perturb", "perturb_moves_every_element_by_the_formula_and_nothing_else", "every size-float32")
PERTURB_MODES = node_of("perturb", "perturb_is_the_formula_in_every_mode", "not adaptive-maximize-float32")
OWN_RHO = node_of("perturb", "every_parameter_has_its_own_rho", "not adaptive-float32")
MEASURED = node_of("perturb", "perturb_measures_the_norm_that_grad_norm_does", "not adaptive-float32")
VANISHING = node_of("perturb", "the_perturbation_of_a_vanishing_gradient_is_that_of_the_formula", "1e-13")
OTHER_STRIDES = node_of("perturb", "gradients_may_have_other_strides_than_their_parameter", "transposed-sliced-float32")
STANDSTILL = node_of("standstill", "one_bad_element_stops_every_tensor", "not adaptive-float32")
NORM = node_of("norm", "norm_is_exact_to_a_few_ulp_of_float64", "adaptive-57 tensors-float32")
NORM_STAYS = node_of("norm_of_average", "a_step_that_is_skipped_leaves_the_norm_as_it_was")
SMALL_AVERAGE = (
    "tests/operators/test_norm_of_average.py::test_the_norm_is_exact_over_the_range_of_every_average"
    "[triton in float32-small-float32]"
)
SAME_PERTURB = node_of("agreement", "backends_perturb_to_the_same_bits", "not adaptive-57 tensors-bfloat16")
SAME_UPDATE = node_of("agreement", "backends_update_to_the_same_bits", "step-0.5-not hessian-every layout-float32")
SAME_FLOAT64 = node_of("agreement", "compiled_backends_update_float64_to_the_same_bits", "0.5")
GUARDS = node_of("guards", "any_one_of_several_guards_skips_the_step")
GRADIENTS = node_of(
    "guards", "one_element_that_is_not_finite_skips_the_step_where_gradients_are_guards", "nan-products-float32"
)
LARGEST = node_of("guards", "the_largest_finite_gradients_and_products_skip_no_step", "float32")
ESTIMATE = node_of("agreement", "backends_estimate_to_the_same_bits", "0-every layout-float32")
SIGNS = node_of("signs", "signs_from_any_index_on_are_those_of_the_reference", "12345")
MANY_ROWS = "tests/machine/test_triton.py::test_more_tensors_than_two_looks_at_the_table_can_tell_apart[float32]"
ADAHESSIAN = node_of("members", "adahessian_averages_the_squares_of_products", "not maximize-0.7-hessian-float32")
SOPHIA, SOPHIA_UP = (
    node_of("members", "sophia_clips_the_quotient_and_averages_products_with_their_signs", case)
    for case in ("not maximize-0.04-hessian-float32", "maximize-0.0-hessian-bfloat16")
)
ADAM = node_of(
    "members", "adam_averages_the_squares_of_gradients_in_every_step", "1.0-maximize-backup-every size-float32"
)
PLAIN, PLAIN_UP, NESTEROV, DAMPENED = (
    node_of("members", "a_plain_direction_is_that_of_sgd", case)
    for case in (
        "dampening-not first-not maximize-not backup-float32",
        "-first-maximize-backup-float32",
        "nesterov-not first-maximize-not backup-float32",
        "dampening-first-not maximize-backup-float64",
    )
)
ALONG = node_of("members", "perturb_goes_along_exp_avg_the_other_way", "many tensors-not maximize-float32")
WORKED_OUT, WORKED_OUT_OF_A_SKIPPED = (
    node_of("members", "without_a_backup_w_is_worked_out_from_exp_avg", case)
    for case in ("not skipped-adam-float32", "skipped-plain-float32")
)
INFINITE = node_of("members", "an_average_whose_norm_is_not_finite_moves_no_weight", "inf")
MEANS = node_of("blocks", "the_means_of_blocks_are_averaged_in", "8-0.0-not squares-float32")
LAZY_BLOCKS, AVERAGED, SKIPPED_BLOCKS = (
    node_of("blocks", "the_step_is_that_with_every_block_written_out", case)
    for case in (
        "8-0.7-not average-not skip-float32",
        "2-1.0-average-not skip-float64",
        "64-0.7-average-skip-float64",
    )
)
REFUSED = node_of(
    "schemas", "arguments_that_do_not_fit_are_refused_and_nothing_is_written", "update_-layouts-of_other_strides"
)


class Fault(NamedTuple):
    """A line that is wrong, and the test that sees it."""

    file: str
    right: str
    wrong: str
    test: str


FAULTS = {
    # arithmetic.py, settings.py
    "beta is one float": Fault("arithmetic", "tl.fma(mean, beta_low, weight_low * x)", "weight_low * x", SAME_UPDATE),
    "a product is rounded": Fault("arithmetic", "tl.fma(x, weight_high, rest)", "x * weight_high + rest", SAME_UPDATE),
    "1 / c2 is one float": Fault(
        "arithmetic", "tl.fma(exp_hessian, high, low * exp_hessian)", "exp_hessian * high", SAME_UPDATE
    ),
    "the step size is one float": Fault("arithmetic", "step_low * direction)", "0.0 * direction)", SAME_UPDATE),
    "the low part is that of another dtype": Fault(
        "arithmetic",
        "(x - high.to(tl.float64)).to(STATE)",
        "(x - high.to(tl.float64)).to(tl.float16).to(STATE)",
        SAME_UPDATE,
    ),
    "bfloat16 is cut off": Fault("arithmetic", "if _TRUNCATES and", "if not _TRUNCATES and", SAME_PERTURB),
    "powers of beta are those of float64": Fault(
        "arithmetic", "rest = error + ", "rest = 0.0 * error + ", SAME_FLOAT64
    ),
    "what is not to be corrected is": Fault(
        "arithmetic", "bias_correction == UNCORRECTED", "bias_correction < 0.0", COUNTS
    ),
    "beta2 is beta1": Fault("settings", '_fields.index("beta2")', '_fields.index("beta1")', EVERY_POWER),
    "a row is too short": Fault("settings", "tl.constexpr(len(RowSettings._fields))", "tl.constexpr(2)", OWN_RHO),
    # counts.py, inspection.py, step.py
    "steps are not counted": Fault(
        "counts",
        "tl.load(steps + 2 * row, mask=inside, other=0) + 1",
        "tl.load(steps + 2 * row, mask=inside, other=0)",
        EVERY_POWER,
    ),
    "Hessian steps are counted by the other rule": Fault("counts", "== BY_STEP", "!= BY_STEP", COUNTS),
    "only the first rows are counted": Fault("counts", "count, tl.num_programs(0) * ROWS", "count, count", MANY_ROWS),
    "only the first rows are prepared": Fault("counts", "rows, tl.num_programs(0) * ROWS", "rows, rows", MANY_ROWS),
    "the decay is without the learning rate": Fault("counts", "lr * weight_decay", "weight_decay", OWN_RATE),
    "the last guard is not looked at": Fault("inspection", "range(guard_count)", "range(guard_count - 1)", GUARDS),
    "products are not looked at": Fault(
        "inspection",
        "        if PRODUCT is not None:\n            sums",
        "        if PRODUCT is not None and count < 0:\n            sums",
        GRADIENTS,
    ),
    "large numbers are taken for infinite": Fault("inspection", "return sums + 0.0 * x", "return sums + x", LARGEST),
    "a skipped step is counted": Fault(
        "step",
        "    if finite:\n        record(table, count, steps, second, settings)\n",
        "    record(table, count, steps, second, settings)\n    if finite:\n",
        GUARDS,
    ),
    "a skipped step leaves w' there": Fault("step", "if (w_at != backup_at) |", "if (w_at == backup_at) |", GUARDS),
    "w' is taken for w": Fault(
        "step",
        "w = load(backup_at, begin, end, index, DTYPE, VECTOR).to",
        "w = load(w_at, begin, end, index, DTYPE, VECTOR).to",
        EVERY_POWER,
    ),
    "every step goes down": Fault(
        "step", "setting(settings, MAXIMIZE) != 0.0", "setting(settings, MAXIMIZE) < 0.0", UPDATE_MODES
    ),
    "an entry's row is its place in the list": Fault(
        "step", "row = field(table, count, entry, NUMBER)", "row = entry", OWN_RATE
    ),
    "all averages are written": Fault(
        "step",
        "        if SECOND == OF_PRODUCTS:\n            product",
        "        store(D_at, begin, end, index, -exp_hessian, STATE, VECTOR)\n"
        "        if SECOND == OF_PRODUCTS:\n            product",
        EVERY_POWER,
    ),
    # What the rest of the family takes of the same files.
    "no products are squared": Fault("arithmetic", "mode == SQUARE, signed", "mode < 0.0, signed", ADAHESSIAN),
    "no products keep their sign": Fault("arithmetic", "signed = mode == SIGNED", "signed = mode < 0.0", SOPHIA),
    "products count the same way where the objective is maximised": Fault(
        "arithmetic", "beta2 - 1.0, 1.0 - beta2)", "1.0 - beta2, 1.0 - beta2)", SOPHIA_UP
    ),
    "quotients are clipped above alone": Fault(
        "arithmetic", "(quotient < -1, -1.0,", "(quotient < -1, quotient,", SOPHIA
    ),
    "a negative curvature is taken as it is": Fault(
        "arithmetic", "tl.where(exp_hessian > 0, exp_hessian, 0.0)", "exp_hessian", SOPHIA
    ),
    "the clip threshold is eps": Fault("settings", '_fields.index("clip_threshold")', '_fields.index("eps")', SOPHIA),
    "gradients are averaged in place of their squares": Fault("step", "square(g, STATE), weight", "g, weight", ADAM),
    "steps that average squares of gradients are not counted": Fault(
        "update", " or second == OF_GRADIENTS.value)", ")", ADAM
    ),
    "gradients have no decay in them": Fault("step", "times_plus(w, prepared", "times_plus(0.0 * w, prepared", PLAIN),
    "the decay of a plain direction is decoupled": Fault(
        "counts", "decay, step_size = weight_decay, lr", "decay, step_size = 1.0 - lr * weight_decay, lr", PLAIN
    ),
    "nothing is dampened": Fault("counts", "1.0 - setting(settings, DAMPENING)", "1.0", PLAIN),
    "the first gradient is dampened": Fault("counts", "tl.where(step == 1,", "tl.where(step == 0,", DAMPENED),
    "a plain direction goes down": Fault("step", "tl.where(maximize, -g, g)", "g", PLAIN_UP),
    "nobody looks ahead": Fault("step", "tl.where(nesterov,", "tl.where(eps < 0.0,", NESTEROV),
    # Along exp_avg.
    "exp_avg leads up": Fault(
        "arithmetic", "setting(settings, ASCENT) == ALONG_MOMENTUM", "setting(settings, ASCENT) < 0.0", ALONG
    ),
    "the step is from w'": Fault(
        "step",
        "tl.where(perturbation == perturbation, unper",
        "tl.where(perturbation != perturbation, unper",
        WORKED_OUT,
    ),
    "w is worked out from exp_avg behind the step": Fault(
        "step", "unperturbed(w, exp_avg, perturbation)", "unperturbed(w, exp_avg + g, perturbation)", WORKED_OUT
    ),
    "a skipped step leaves w' there without a backup": Fault(
        "step", " | (perturbation == perturbation):", ":", WORKED_OUT_OF_A_SKIPPED
    ),
    "w is worked out where the norm is not finite": Fault(
        "counts",
        "tl.where(size - size == 0.0, inverse_norm(size, settings), inverse)",
        "inverse_norm(size, settings)",
        INFINITE,
    ),
    # D by blocks.
    "a tile's blocks begin where its elements do": Fault(
        "tiles", "before >> shift, STREAM", "before, STREAM", LAZY_BLOCKS
    ),
    "elements have the numbers of their neighbours' blocks": Fault(
        "tiles",
        "(index >> shift)\n    return tl.load",
        "((index + 1) >> shift)\n    return tl.load",
        LAZY_BLOCKS,
    ),
    "the last block of a tensor is not copied": Fault(
        "tiles", "(end + (1 << shift) - 1) >> shift", "end >> shift", AVERAGED
    ),
    "every parameter has blocks": Fault("table", "(block if offset < blocked else 1)", "block", LAZY_BLOCKS),
    "averaged is not taken": Fault(
        "update", "if averaged is None else averaged", "if averaged is None else exp_hessian", AVERAGED
    ),
    "averaged is not kept": Fault("step", "if H_at != D_at:", "if H_at == D_at:", AVERAGED),
    "averaged is no Hessian step": Fault("update", " or averaged is not None or second", " or second", AVERAGED),
    "a skipped step keeps what was averaged": Fault(
        "step",
        "    else:\n        _restore(",
        "    else:\n        entry = entry_of(table, count, 0)\n"
        "        if SECOND == BY_BLOCKS:\n"
        "            D_at, shift = blocks_of(table, count, entry, 0 * tiles, 4, STATE)\n"
        "            copy_of_blocks(D_at, field(table, count, entry, 10), 1, shift, STATE, UNITS)\n"
        "        _restore(",
        SKIPPED_BLOCKS,
    ),
    "pairs are of distant elements first": Fault(
        "block_average", "static_range(LONGEST_BLOCK)", "static_range(LONGEST_BLOCK - 1, -1, -1)", MEANS
    ),
    "products are averaged with their signs": Fault("block_average", "tl.abs(load(", "(load(", MEANS),
    "a block that is short has the mean of a whole one": Fault(
        "block_average", "tl.minimum(end - first, 1 << shift)", "(0 * first + (1 << shift))", MEANS
    ),
    "the second element of a block writes": Fault(
        "tiles", "((1 << shift) - 1)) == 0", "((1 << shift) - 1)) == 1", MEANS
    ),
    # perturb.py
    "all parameters have the first one's rho": Fault(
        "perturb", "field(table, count, entry, NUMBER), RHO", "field(table, count, 0, NUMBER), RHO", OWN_RHO
    ),
    "w' is where the loss is higher": Fault(
        "arithmetic", "down, -inverse, inverse", "down, inverse, inverse", PERTURB_MODES
    ),
    "a skipped step takes the norm along": Fault(
        "norm", "(tl.pointer_type(tl.int64))) == 0", "(tl.pointer_type(tl.int64))) >= 0", NORM_STAYS
    ),
    "small squares of m are lost": Fault("running_squares", "if not reliable:", "if reliable:", SMALL_AVERAGE),
    "a norm that is not finite moves the weights": Fault(
        "perturb", "    if finite:\n", "    if begin < end:\n", STANDSTILL
    ),
    "the measured norm is kept": Fault("perturb", "tl.store(norm, size)", "tl.store(norm, 0.0 * size)", MEASURED),
    "nothing is added to the norm": Fault("arithmetic", "double(1e-12)", "double(0.0)", VANISHING),
    # tiles.py, table.py, lists.py, checks.py
    "a tensor is one too short": Fault("tiles", "LENGTH) - before,", "LENGTH) - before - 1,", PERTURB),
    "every tile goes in vectors": Fault("tiles", "(VECTOR - 1))) == 0", "(VECTOR - 1))) >= 0", PERTURB),
    "a tensor's first tile is the last one's of the one before": Fault(
        "tiles", "other=tile + 1) <= tile", "other=tile + 1) < tile", UPDATE
    ),
    "the last partial sum is lost": Fault(
        "tiles", "mask=at < count, other=0.0", "mask=at < count - 1, other=0.0", NORM
    ),
    "all parts begin where the first one does": Fault(
        "table", "stream.address + offset * stream.itemsize", "stream.address + 0 * offset", PERTURB
    ),
    "copies are not written back": Fault("lists", "if copy is not tensor", "if copy is tensor", WITHOUT_BACKUP),
    "gradients are taken in whatever order they have": Fault(
        "lists", "t if t.stride() == model.stride() else", "t if True else", OTHER_STRIDES
    ),
    "other layouts are not refused": Fault("checks", "    check_layouts(params, layouts, exp_avg)\n", "", REFUSED),
    # signs.py, hutchinson.py
    "signs are those of the next word": Fault(
        "signs", "number = column // 32", "number = (column // 32 + 1) % 4", SIGNS
    ),
    "the first sample is added to what is there": Fault(
        "hutchinson", "if not FIRST:", "if FIRST or not FIRST:", ESTIMATE
    ),
}


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    """A copy to plant a fault in."""
    return Path(shutil.copytree(ROOT / "triton_kernels", tmp_path / "triton_kernels"))


def run(forks: Forks, kernels: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Runs tests on a copy; returns the exit code and what was printed."""
    done = forks.run(*OPTIONS, *tests, **{KERNELS_VARIABLE: str(kernels.parent)})
    return done.returncode, done.stdout


def test_without_a_fault_the_same_tests_pass(forks: Forks, kernels: Path) -> None:
    code, printed = run(forks, kernels, list(dict.fromkeys(fault.test for fault in FAULTS.values())))
    assert code == 0, printed[-4000:]
    assert "skipped" not in printed, "a fault would go unseen here"


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_seen(forks: Forks, kernels: Path, name: str) -> None:
    fault = FAULTS[name]
    plant(kernels / f"{fault.file}.py", fault.right, fault.wrong)
    code, printed = run(forks, kernels, [UNEXPLAINED, fault.test])
    assert code == FAILED and "1 failed" in printed, f"exit code {code}\n{printed[-4000:]}"

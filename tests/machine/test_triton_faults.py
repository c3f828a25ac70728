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
from tests.support.faults import FAILED, KERNELS_VARIABLE, plant
from tests.support.forks import Forks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BACKENDS["triton"] != "cpu", reason="Triton is not interpreted here"),
]

OPTIONS = ("-q", "-x", "-p", "no:cacheprovider", "-p", "tests.support.planted")


def node_of(file: str, name: str, *case: str) -> str:
    """The node of a test of the operators, on this backend."""
    return f"tests/operators/test_{file}.py::test_{name}[{'-'.join([*case, 'triton'])}]"


UPDATE = node_of("update", "update_changes_every_element_by_the_formula_and_nothing_else", "hessian-57 tensors-float32")
EVERY_POWER = node_of("update", "update_is_the_formula_at_every_power", "0.5-float32")
UPDATE_MODES = node_of("update", "update_is_the_formula_in_every_mode", "maximize-update-0.5-not hessian-float32")
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
SAME_PERTURB = node_of("agreement", "backends_perturb_to_the_same_bits", "not adaptive-57 tensors-bfloat16")
SAME_UPDATE = node_of("agreement", "backends_update_to_the_same_bits", "update-0.5-not hessian-every layout-float32")
SAME_FLOAT64 = node_of("agreement", "compiled_backends_update_float64_to_the_same_bits", "0.5")
GUARDS = node_of("guards", "any_one_of_several_guards_skips_the_step")
GRADIENTS = node_of(
    "guards", "one_element_that_is_not_finite_skips_the_step_where_gradients_are_guards", "nan-products-float32"
)
LARGEST = node_of("guards", "the_largest_finite_gradients_and_products_skip_no_step", "float32")
ESTIMATE = node_of("agreement", "backends_estimate_to_the_same_bits", "0-every layout-float32")
SIGNS = node_of("signs", "signs_from_any_index_on_are_those_of_the_reference", "12345")
MANY_ROWS = "tests/machine/test_triton.py::test_more_tensors_than_two_looks_at_the_table_can_tell_apart[float32]"
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
        "        if HESSIAN:\n            sums",
        "        if HESSIAN and count < 0:\n            sums",
        GRADIENTS,
    ),
    "large numbers are taken for infinite": Fault("inspection", "return sums + 0.0 * x", "return sums + x", LARGEST),
    "a skipped step is counted": Fault(
        "step",
        "    if finite:\n        record(table, count, steps, settings, HESSIAN)\n",
        "    record(table, count, steps, settings, HESSIAN)\n    if finite:\n",
        GUARDS,
    ),
    "a skipped step leaves w' there": Fault("step", "if w_at != backup_at:", "if w_at == backup_at:", GUARDS),
    "w' is taken for w": Fault("step", "w = load(backup_at,", "w = load(w_at,", EVERY_POWER),
    "every step goes down": Fault(
        "step", "setting(settings, MAXIMIZE) != 0.0", "setting(settings, MAXIMIZE) < 0.0", UPDATE_MODES
    ),
    "an entry's row is its place in the list": Fault(
        "step", "row = field(table, count, entry, NUMBER)", "row = entry", OWN_RATE
    ),
    "all averages are written": Fault(
        "step",
        "    if HESSIAN:\n        product",
        "    store(exp_hessian_at, begin, end, index, -exp_hessian, STATE, VECTOR)\n    if HESSIAN:\n        product",
        EVERY_POWER,
    ),
    # perturb.py
    "all parameters have the first one's rho": Fault(
        "perturb", "field(table, count, entry, NUMBER), RHO", "field(table, count, 0, NUMBER), RHO", OWN_RHO
    ),
    "w' is where the loss is higher": Fault(
        "perturb", "setting(settings, MAXIMIZE) != 0.0", "setting(settings, MAXIMIZE) < 0.0", PERTURB_MODES
    ),
    "a norm that is not finite moves the weights": Fault(
        "perturb", "    if finite:\n", "    if begin < end:\n", STANDSTILL
    ),
    "the measured norm is kept": Fault("perturb", "tl.store(norm, size)", "tl.store(norm, 0.0 * size)", MEASURED),
    "nothing is added to the norm": Fault("perturb", "double(1e-12)", "double(0.0)", VANISHING),
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
    code, printed = run(forks, kernels, [fault.test])
    assert code == FAILED and "1 failed" in printed, f"exit code {code}\n{printed[-4000:]}"

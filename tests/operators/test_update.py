"""update_ of every backend against its formula, element by element: sizes, alignments, strides, modes, counts."""

from dataclasses import replace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from sassha_fused.checks import BIAS_CORRECTIONS
from tests.support.backends import each_backend_with, each_quick_backend, each_slow_backend
from tests.support.calls import POWERS
from tests.support.cases import BUT_FLOAT16, DTYPES, LAYOUTS, Spec, every_layout, make_case, many
from tests.support.checks import check_update
from tests.support.lists import LIST_NAMES, listed_case, shorter
from tests.support.strategies import ANY_CASE, few_examples

KINDS = (False, True)  # a lazy step, a Hessian step


@each_backend_with(hessian=KINDS, specs=LIST_NAMES, dtype=DTYPES)
def test_update_changes_every_element_by_the_formula_and_nothing_else(
    backend: str, dtype: torch.dtype, specs: str, hessian: bool
) -> None:
    check_update(backend, listed_case(backend, dtype, specs), hessian)


@each_backend_with(
    few={"dtype": BUT_FLOAT16},
    maximize=(False, True),
    correction=BIAS_CORRECTIONS,
    power=POWERS,
    hessian=KINDS,
    dtype=DTYPES,
)
def test_update_is_the_formula_in_every_mode(
    backend: str, dtype: torch.dtype, hessian: bool, power: float, correction: str, maximize: bool
) -> None:
    modes: dict[str, Any] = {"hessian_power": power, "bias_correction": correction, "maximize": maximize}
    check_update(backend, listed_case(backend, dtype, "every size"), hessian, **modes)


# Of each dtype and power a kernel of its own, for either kind of step.
@each_backend_with(power=POWERS, dtype=DTYPES)
def test_update_is_the_formula_at_every_power(backend: str, dtype: torch.dtype, power: float) -> None:
    for hessian in KINDS:
        check_update(backend, make_case(dtype, many(shorter(backend, 20, 8))), hessian, hessian_power=power)


@each_backend_with(layout=LAYOUTS, others=LAYOUTS, dtype=DTYPES)
def test_gradients_and_products_may_have_other_strides_than_their_parameter(
    backend: str, dtype: torch.dtype, layout: str, others: str
) -> None:
    specs = [Spec(shape, layout, 1) for shape in [(), (3, 1, 4), (6, 11), (4, 3, 5, 5), (33, 40)]]
    check_update(backend, make_case(dtype, specs, others=others), hessian=True)


UNUSUAL: tuple[dict[str, Any], ...] = (
    {"betas": (0.0, 0.0)},
    {"betas": (0.999, 0.9)},
    {"eps": 1.0, "hessian_power": 1.0},
    {"weight_decay": 0.5, "lr": 1.0},
    {"lr": 0.0},
    {"weight_decay": 0.0, "hessian_power": 0.25},
)


@each_backend_with(few={"dtype": BUT_FLOAT16}, hyper=UNUSUAL, hessian=KINDS, dtype=DTYPES)
def test_update_is_the_formula_at_unusual_hyperparameters(
    backend: str, dtype: torch.dtype, hyper: dict[str, Any], hessian: bool
) -> None:
    check_update(backend, make_case(dtype, many(shorter(backend, 20, 8))), hessian, **hyper)


@each_backend_with(steps=((0, 0), (1, 1), (9, 1), (9, 9), (100_000, 3), (3_000_000_000, 3_000_000_000)))
def test_counts_of_any_length_correct_the_bias(backend: str, steps: tuple[int, int]) -> None:
    case = make_case(torch.float64, [Spec((5,))])
    case.steps[case.rows[0]] = torch.tensor(steps)
    for correction in BIAS_CORRECTIONS:
        check_update(backend, case, hessian=True, bias_correction=correction)
        if steps[1]:
            check_update(backend, case, hessian=False, bias_correction=correction)


@each_backend_with(few={"dtype": BUT_FLOAT16}, correction=BIAS_CORRECTIONS, hessian=KINDS, dtype=DTYPES)
def test_every_parameter_has_its_own_learning_rate_and_decay(
    backend: str, dtype: torch.dtype, hessian: bool, correction: str
) -> None:
    specs = [*many(shorter(backend, 9, 5)), Spec(())]
    lr, weight_decay = 0.5 * torch.rand(2, len(specs), dtype=torch.float64)
    check_update(
        backend, make_case(dtype, specs), hessian, lr=lr, weight_decay=weight_decay, bias_correction=correction
    )


@each_backend_with(few={"dtype": BUT_FLOAT16}, power=POWERS, hessian=KINDS, dtype=DTYPES)
def test_without_a_backup_the_step_is_from_the_weights_themselves(
    backend: str, dtype: torch.dtype, hessian: bool, power: float
) -> None:
    for specs in ("every size", "every layout"):
        check_update(backend, listed_case(backend, dtype, specs), hessian, backup=False, hessian_power=power)


@each_backend_with(power=POWERS, dtype=(torch.bfloat16, torch.float16))
def test_update_takes_products_in_the_dtype_of_the_state(backend: str, dtype: torch.dtype, power: float) -> None:
    layouts = shorter(backend, every_layout(), [Spec((3, 4, 5, 5), "channels_last"), Spec((5, 6), "sliced")])
    specs = [*many(shorter(backend, 20, 8)), *layouts]
    case = replace(make_case(dtype, specs), products=make_case(torch.float32, specs, seed=1).products)
    check_update(backend, case, hessian=True, hessian_power=power)


# ---------------------------------------------------------------------------------------------------------------------
# Any shapes and hyperparameters

unit = st.floats(0, 0.9999)
ANY: dict[str, Any] = {
    **ANY_CASE,
    "hessian": st.booleans(),
    "lr": st.floats(0, 10),
    "betas": st.tuples(unit, unit),
    "eps": st.floats(1e-8, 1),
    "weight_decay": st.floats(0, 1),
    "hessian_power": st.sampled_from([0.5, 1.0]) | st.floats(0.01, 1),
    "bias_correction": st.sampled_from(BIAS_CORRECTIONS),
    "maximize": st.booleans(),
}


def check_any(
    backend: str, dtype: torch.dtype, specs: list[Spec], others: str, seed: int, hessian: bool, **hyper: Any
) -> None:
    check_update(backend, make_case(dtype, specs, others=others, seed=seed), hessian, **hyper)


@each_quick_backend
@given(**ANY)
def test_update_is_the_formula_for_any_shapes_and_hyperparameters(backend: str, **drawn: Any) -> None:
    check_any(backend, **drawn)


@each_slow_backend
@few_examples
@given(**ANY)
def test_update_is_the_formula_for_some_shapes_and_hyperparameters(backend: str, **drawn: Any) -> None:
    check_any(backend, **drawn)

"""Hyperparameters: what each of them may be, and that what it may not be is refused by its name."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from sassha_fused import Sassha
from tests.support.problems import Problem, assert_differ, naming, parameter, refused, single_threaded, weights

one_thread = pytest.fixture(autouse=True)(single_threaded)
NAN, INF = math.nan, math.inf


BAD_HYPERPARAMETERS: list[tuple[str, Any, type[Exception]]] = [
    *[(name, -0.1, ValueError) for name in ("lr", "eps", "weight_decay", "rho")],
    *[(name, NAN, ValueError) for name in ("lr", "eps", "weight_decay", "rho")],
    *[(name, INF, ValueError) for name in ("lr", "eps", "weight_decay", "rho")],
    *[(name, "0.1", TypeError) for name in ("lr", "eps", "weight_decay", "rho")],
    *[(name, True, TypeError) for name in ("lr", "eps", "weight_decay", "rho")],
    *[(name, None, TypeError) for name in ("lr", "eps", "weight_decay", "rho")],
    ("lr", torch.tensor(-0.1), ValueError),
    ("lr", torch.tensor(NAN), ValueError),
    ("lr", torch.tensor([0.1, 0.2]), ValueError),
    ("lr", torch.tensor(1), ValueError),
    ("betas", (1.0, 0.9), ValueError),
    ("betas", (0.9, 1.0), ValueError),
    ("betas", (-0.1, 0.9), ValueError),
    ("betas", (0.9, NAN), ValueError),
    ("betas", (0.9, 0.99, 0.999), ValueError),
    ("betas", (0.9,), ValueError),
    ("betas", 0.9, ValueError),
    ("betas", ("0.9", 0.9), ValueError),
    ("betas", (True, 0.9), ValueError),
    ("hessian_power", 0.0, ValueError),
    ("hessian_power", -0.5, ValueError),
    ("hessian_power", 1.1, ValueError),
    ("hessian_power", NAN, ValueError),
    ("hessian_power", "0.5", ValueError),
    ("hessian_power", None, ValueError),
    ("hessian_interval", 0, ValueError),
    ("hessian_interval", -1, ValueError),
    ("hessian_samples", 0, ValueError),
    ("hessian_samples", 2**32, ValueError),
    ("hessian_warmup", -1, ValueError),
    ("seed", -1, ValueError),
    ("seed", 2**63, ValueError),
    *[(f"hessian_{name}", 2.0, TypeError) for name in ("interval", "samples", "warmup")],
    *[(f"hessian_{name}", "2", TypeError) for name in ("interval", "samples", "warmup")],
    *[(f"hessian_{name}", True, TypeError) for name in ("interval", "samples", "warmup")],
    ("bias_correction", "both", ValueError),
    ("bias_correction", None, ValueError),
    ("adaptive", 1, TypeError),
    ("maximize", "no", TypeError),
]
OPTIMIZER_ONLY: list[tuple[str, Any, type[Exception]]] = [
    ("hvp", "jax", ValueError),
    ("hvp", None, ValueError),
    ("backend", "tpu", ValueError),
    ("backend", None, ValueError),
]


@pytest.mark.parametrize("name, value, error", BAD_HYPERPARAMETERS + OPTIMIZER_ONLY)
def test_a_bad_hyperparameter_is_named_with_its_value(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=naming(name, value)):
        Sassha([parameter(1.0)], **{name: value})


@pytest.mark.parametrize("name, value, error", BAD_HYPERPARAMETERS)
def test_a_bad_hyperparameter_of_one_group_is_refused(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=naming(name, value)):
        Sassha([{"params": [parameter(1.0)]}, {"params": [parameter(2.0)], name: value}])


@pytest.mark.parametrize("name, value, error", BAD_HYPERPARAMETERS)
def test_a_bad_group_added_later_changes_nothing(name: str, value: Any, error: type[Exception]) -> None:
    problem = Problem().train(2)
    with refused(problem, error, naming(name, value)):
        problem.opt.add_param_group({"params": [parameter(1.0)], name: value})


SHARED = [("hessian_interval", 2), ("hessian_warmup", 3), ("hessian_samples", 4), ("seed", 5)]


@pytest.mark.parametrize("name, value", SHARED)
def test_the_schedule_and_the_random_signs_cannot_differ_between_groups(name: str, value: int) -> None:
    problem = Problem().train(2)
    with refused(problem, ValueError, naming(name, value)):
        problem.opt.add_param_group({"params": [parameter(1.0)], name: value})


@pytest.mark.parametrize(
    "name, value",
    [
        *[(name, 0.0) for name in ("lr", "eps", "weight_decay", "rho")],
        ("lr", 1),
        ("lr", torch.tensor(0.1)),
        ("betas", (0.0, 0.0)),
        ("betas", [0.9, 0.99]),
        ("betas", [np.float32(0.9), np.float64(0.99)]),
        ("lr", np.float32(0.1)),
        ("hessian_interval", np.int64(2)),
        ("bias_correction", "none"),
        ("hessian_power", 1),
        ("hessian_interval", 1),
        ("seed", 2**63 - 1),
    ],
)
def test_the_limits_of_what_is_allowed_are_allowed(name: str, value: Any) -> None:
    before = weights(Problem().params)
    problem = Problem(**{"rho": 0.1, name: value}).train(2)
    assert all(param.isfinite().all() for param in problem.params)
    assert_differ(weights(problem.params[2:]), before[2:])

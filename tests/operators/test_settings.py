"""The numbers that go with a call: the same fields in C++ and in Python, and each of them reaches the kernels."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from sassha_fused import SAMSGD, AdaHessian, MSassha, SAMAdamW, Sassha, SophiaH, checks
from sassha_fused.method import Method
from sassha_fused.settings import RowSettings, Settings
from sassha_fused.settings import settings_of as numbers_named
from tests.support.backends import each_backend_with, operators_of
from tests.support.calls import HYPER, arguments_of, run, settings_of
from tests.support.cases import Spec, bits, make_case

HEADER = Path(__file__).parents[2] / "csrc" / "math" / "settings.h"


@pytest.mark.parametrize("struct", [Settings, RowSettings], ids=lambda struct: struct.__name__)
def test_the_struct_has_the_same_fields_in_both_languages(struct: Any) -> None:
    (body,) = re.findall(rf"struct {struct.__name__} {{(.*?)}};", HEADER.read_text(), re.DOTALL)
    code = re.sub(r"//.*", "", body)
    assert re.findall(r"double (\w+);", code) == list(struct._fields)
    assert code.count(";") == len(struct._fields)


def test_the_numbers_of_a_group_come_in_their_places() -> None:
    group = {
        "lr": 1,
        "betas": (0.25, 0.5),
        "eps": 2,
        "weight_decay": 3,
        "rho": 4,
        "hessian_power": 0.75,
        "adaptive": True,
        "maximize": False,
        "bias_correction": "none",
    }
    assert Method().settings_of(group)._asdict() == {
        "beta1": 0.25,
        "beta2": 0.5,
        "eps": 2.0,
        "hessian_power": 0.75,
        "adaptive": 1.0,
        "maximize": 0.0,
        "bias_correction": float(checks.BIAS_CORRECTIONS.index("none")),
        "ascent": 0.0,
        "second_average": 0.0,
        "direction": 0.0,
        "clip_threshold": 0.0,
        "dampening": 0.0,
        "nesterov": 0.0,
        "hessian_block": 1.0,
    }
    assert RowSettings.of(group) == (1.0, 3.0, 4.0)
    assert RowSettings.of({**group, "lr": torch.tensor(1.0)}) == (0.0, 3.0, 4.0)


# What a member's row of data says.
OF_METHOD = {"beta1", "beta2", "second_average", "direction"}


def test_every_default_is_in_one_of_the_structs_or_known_to_be_of_the_schedule() -> None:
    kinds = [Sassha, MSassha, SAMSGD, SAMAdamW, AdaHessian, SophiaH]
    defaults = {name for kind in kinds for name in kind([torch.nn.Parameter(torch.ones(1))]).defaults}
    known = {"betas", "momentum", *Settings._fields, *RowSettings._fields, *checks.SHARED} - OF_METHOD
    assert {name for name in defaults if name not in ("differentiable",)} == known


CHANGES: dict[str, Any] = {
    "betas": (0.5, 0.999),
    "eps": 0.1,
    "hessian_power": 1.0,
    "maximize": True,
    "bias_correction": "none",
    "lr": 0.3,
    "weight_decay": 0.5,
}


@each_backend_with(name=(*CHANGES, "second of betas"))
def test_each_number_reaches_update(backend: str, name: str) -> None:
    change = {"betas": (0.9, 0.5)} if name == "second of betas" else {name: CHANGES[name]}

    def result(hyper: dict[str, Any]) -> torch.Tensor:
        case = make_case(torch.float32, [Spec((64,))])
        run(backend, "update_", case, hyper)
        return bits(case.params[0])

    assert not torch.equal(result(HYPER), result({**HYPER, **change}))


@each_backend_with(change=({"rho": 0.3}, {"adaptive": True}, {"maximize": True}))
def test_each_number_reaches_perturb(backend: str, change: dict[str, Any]) -> None:
    def result(hyper: dict[str, Any]) -> torch.Tensor:
        case = make_case(torch.float32, [Spec((64,))])
        run(backend, "perturb_", case, hyper)
        return bits(case.params[0])

    assert not torch.equal(result(HYPER), result({**HYPER, **change}))


def test_python_refuses_settings_of_unknown_modes_too() -> None:
    for name in ("bias_correction", "ascent", "second_average", "direction", "hessian_block"):
        with pytest.raises(ValueError, match=f"{name} must be"):
            numbers_named(with_setting(name, 7.0)["settings"])


def with_setting(name: str, value: float) -> dict[str, Any]:
    return {"settings": list(settings_of(HYPER)._replace(**{name: value}))}


@pytest.mark.parametrize("operator", ["perturb_", "update_"])
@pytest.mark.parametrize(
    "change, message",
    [
        ({"settings": [0.9] * 6}, "settings must be 14 numbers, got 6"),
        (with_setting("bias_correction", 3.0), "bias_correction must be an index below 3, got 3"),
        (with_setting("ascent", 0.5), "ascent must be an index below 2, got 0.5"),
        (with_setting("second_average", -1.0), "second_average must be an index below 4, got -1"),
        (with_setting("direction", math.nan), "direction must be an index below 3, got nan"),
        (with_setting("hessian_block", 3.0), "hessian_block must be a power of 2 from 1 to 128, got 3"),
        ({"per_row": torch.ones(9, 2, dtype=torch.float64)}, "per_row must have rows of 3 numbers"),
        ({"per_row": torch.ones(9, 3)}, "per_row has another dtype"),
        ({"rows": [-1]}, "row -1 is not one of per_row"),
        ({"rows": [4]}, "row 4 is not one of per_row"),
        ({"rows": []}, "expected one row per tensor"),
        ({"layouts": torch.tensor([[1, 63, 1]])}, "another shape or other strides"),
        ({"layouts": torch.tensor([[1, 64, 2]])}, "another shape or other strides"),
        ({"layouts": torch.tensor([[2, 64, 1, 1, 1]])}, "another shape or other strides"),
        ({"layouts": torch.tensor([[1]])}, "another shape or other strides"),
        ({"layouts": torch.tensor([[1, 64, 1]] * 2)}, "layouts must have one row per tensor"),
        ({"layouts": torch.tensor([[1.0, 64, 1]])}, "layouts must be int64 on the CPU"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    operator: str, change: dict[str, Any], message: str
) -> None:
    case = make_case(torch.float32, [Spec((64,))])
    before = bits(case.params[0])
    with pytest.raises(RuntimeError, match=message):
        getattr(operators_of("cpu"), operator)(*{**arguments_of(operator, case), **change}.values())
    assert torch.equal(bits(case.params[0]), before)

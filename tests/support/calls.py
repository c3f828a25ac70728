"""Calls of the operators: their arguments by the names of the schema, and what a backend makes of a case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sassha_fused.family import SAMSGD, AdaHessian, SAMAdamW, SophiaH
from sassha_fused.layout import block_index, layouts_of
from sassha_fused.method import Method
from sassha_fused.settings import Settings
from tests.support.backends import device_of, evaluation_on, operators_of
from tests.support.cases import Case, Spec, compute_dtype, make_case

HYPER: dict[str, Any] = {
    "lr": 0.15,
    "betas": (0.9, 0.999),
    "eps": 1e-4,
    "weight_decay": 0.01,
    "rho": 0.2,
    "hessian_power": 0.5,
    "bias_correction": "step",
    "adaptive": False,
    "maximize": False,
}
POWERS = (0.5, 1.0, 0.7)


def _without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in HYPER.items() if name not in names}


# What the other members of the family make of it.
ADAHESSIAN = {**HYPER, "method": AdaHessian.method}
SOPHIA = {**_without("bias_correction"), "method": SophiaH.method, "clip_threshold": 0.04, "eps": 1e-12}
ADAM = {**_without("bias_correction", "hessian_power"), "method": SAMAdamW.method, "eps": 1e-8}
PLAIN = {
    **_without("betas", "eps", "hessian_power", "bias_correction"),
    "method": SAMSGD.method,
    "momentum": 0.9,
    "dampening": 0.0,
    "nesterov": False,
}
MEMBERS = {"plain": PLAIN, "adam": ADAM, "adahessian": ADAHESSIAN, "sophia": SOPHIA}


def settings_of(hyper: dict[str, Any]) -> Settings:
    """Those of a parameter group, of the method that it names, Sassha unless it does."""
    settings: Settings = hyper.get("method", Method()).settings_of(hyper)
    return settings


def numbers_of(on: Case, hyper: dict[str, Any]) -> dict[str, Any]:
    """What hyper is to an operator; lr, weight_decay and rho may be tensors with a value for each parameter."""
    # What no parameter of the list has a row of must not matter.
    per_row = torch.full((len(on.steps), 3), torch.nan, dtype=torch.float64)
    for column, name in enumerate(("lr", "weight_decay", "rho")):
        per_row[on.rows, column] = torch.as_tensor(hyper[name], dtype=torch.float64)
    return {"per_row": per_row.to(on.backup.device), "settings": list(settings_of(hyper))}


def update_arguments(
    on: Case,
    hyper: dict[str, Any] = HYPER,
    hessian: bool = True,
    guards: Sequence[Tensor] = (torch.tensor(1.0),),
    guard_grads: bool = False,
    backup: bool = True,
    **others: Any,
) -> dict[str, Any]:
    """The arguments of update_, which no other place of the tests spells out."""
    arguments = {
        "params": on.params,
        "grads": on.grads,
        "products": on.products if hessian else [],
        "averaged": None,
        "backup": on.backup if backup else None,
        "norm": None,
        "exp_avg": on.exp_avg,
        "exp_hessian": on.exp_hessian,
        "exp_avg_norm": None,
        "steps": on.steps,
        "skipped": on.skipped,
        "offsets": on.offsets,
        "rows": on.rows,
        "layouts": layouts_of(on.params),
        "blocked": 0,
        "guards": [guard.to(on.backup.device) for guard in guards],
        "guard_grads": guard_grads,
        **numbers_of(on, hyper),
    }
    assert others.keys() <= arguments.keys()
    return arguments | others


def arguments_of(name: str, case: Case, hyper: dict[str, Any] = HYPER, **changes: Any) -> dict[str, Any]:
    """The arguments of an operator, by the names of its schema."""
    device = case.backup.device
    arguments: dict[str, dict[str, Any]] = {
        "grad_norm": {"grads": case.grads, "params": case.params, "layouts": None, "adaptive": True},
        "perturb_": {
            "params": case.params,
            "grads": case.grads,
            "backup": case.backup,
            "offsets": case.offsets,
            "rows": case.rows,
            "layouts": layouts_of(case.params),
            "norm": torch.tensor(3.0, dtype=torch.float64, device=device),
            "measure": False,
            **numbers_of(case, hyper),
        },
        "rademacher_": {
            "signs": case.params,
            "indices": case.indices,
            "seed": 1,
            "evaluation": torch.tensor(2, device=device),
            "sample": 3,
        },
        "hutchinson_": {
            "products": case.products,
            "estimate": case.estimate,
            "offsets": case.offsets,
            "indices": case.indices,
            "seed": 1,
            "evaluation": torch.tensor(2, device=device),
            "sample": 1,
            "samples": 3,
        },
        "block_average_": {
            "products": case.products,
            "exp_hessian": case.exp_hessian,
            "averaged": case.estimate,
            "offsets": case.offsets,
            "blocked": 0,
            "settings": list(settings_of(hyper)),
        },
        "update_": update_arguments(case, hyper),
    }
    assert changes.keys() <= arguments[name].keys()
    return {**arguments[name], **changes}


def run(backend: str, name: str, on: Case, hyper: dict[str, Any] = HYPER, **changes: Any) -> Any:
    """Calls an operator on a case, in place; returns what it returns."""
    return getattr(operators_of(backend), name)(*arguments_of(name, on, hyper, **changes).values())


# ---------------------------------------------------------------------------------------------------------------------
# In place, on a case of the backend's device


def run_perturb(backend: str, on: Case, norm: float, rho: float | Tensor, adaptive: bool, maximize: bool) -> None:
    scalar = torch.tensor(norm, dtype=torch.float64, device=device_of(backend))
    hyper = {**HYPER, "rho": rho, "adaptive": adaptive, "maximize": maximize}
    run(backend, "perturb_", on, hyper, norm=scalar)


def run_measured_perturb(backend: str, on: Case, adaptive: bool) -> Tensor:
    """perturb_ that works the norm out by itself; returns it."""
    norm = torch.full((), torch.nan, dtype=torch.float64, device=device_of(backend))
    run(backend, "perturb_", on, {**HYPER, "adaptive": adaptive}, norm=norm, measure=True)
    return norm


def run_update(backend: str, on: Case, hyper: dict[str, Any], hessian: bool, *scalars: Any, **more: Any) -> None:
    operators_of(backend).update_(*update_arguments(on, hyper, hessian, *scalars, **more).values())


def run_hutchinson(backend: str, on: Case, seed: int, evaluation: int, sample: int, samples: int) -> None:
    index = evaluation_on(backend, evaluation)
    run(backend, "hutchinson_", on, seed=seed, evaluation=index, sample=sample, samples=samples)


def run_rademacher(backend: str, on: Case, seed: int, evaluation: int, sample: int) -> None:
    """Writes the signs over the parameters."""
    run(backend, "rademacher_", on, seed=seed, evaluation=evaluation_on(backend, evaluation), sample=sample)


# ---------------------------------------------------------------------------------------------------------------------
# What they make of a case, on the CPU


def perturb(backend: str, case: Case, norm: float, rho: float | Tensor, adaptive: bool, maximize: bool) -> Case:
    on = case.to(device_of(backend))
    run_perturb(backend, on, norm, rho, adaptive, maximize)
    return on.to("cpu")


def update(backend: str, case: Case, hyper: dict[str, Any], hessian: bool, *scalars: Any, **more: Any) -> Case:
    on = case.to(device_of(backend))
    run_update(backend, on, hyper, hessian, *scalars, **more)
    return on.to("cpu")


def hutchinson(backend: str, case: Case, seed: int, evaluation: int, sample: int, samples: int) -> Case:
    on = case.to(device_of(backend))
    run_hutchinson(backend, on, seed, evaluation, sample, samples)
    return on.to("cpu")


def signs_of(
    backend: str, index: int, count: int, seed: int, evaluation: int, sample: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The signs of a tensor whose first element has an index."""
    z = torch.full((count,), torch.nan, dtype=dtype, device=device_of(backend))
    operators_of(backend).rademacher_([z], [index], seed, evaluation_on(backend, evaluation), sample)
    return z.cpu()


def norm_of(backend: str, grads: Sequence[Tensor], params: Sequence[Tensor] = (), adaptive: bool = False) -> float:
    device = device_of(backend)
    on_device = [[t.to(device) for t in tensors] for tensors in (grads, params)]
    norm = operators_of(backend).grad_norm(*on_device, None, adaptive)
    assert norm.shape == () and norm.dtype == torch.float64 and norm.device.type == torch.device(device).type
    return float(norm)


def call_everything(backend: str, dtype: torch.dtype) -> None:
    """Every operator in every mode that has a kernel of its own."""
    case = make_case(dtype, [Spec((5,), shift=1), Spec((130,))]).to(device_of(backend))
    for adaptive in (False, True):
        norm_of(backend, case.grads, case.params, adaptive)
        run_perturb(backend, case, 1.0, 0.2, adaptive, False)
    along = replace(case, grads=case.parts(case.exp_avg))
    run(backend, "perturb_", along, {**PLAIN, "ascent": "momentum"})
    run_rademacher(backend, case, 1, 2, 3)
    for sample in (0, 1):
        run_hutchinson(backend, case, 1, 2, sample, 2)
    wide = replace(case, products=[product.to(compute_dtype(dtype)) for product in case.products])
    for hyper in (*({**HYPER, "hessian_power": power} for power in POWERS), SOPHIA):
        for on, hessian in ((case, False), (case, True), (wide, True)):
            for backup in (True, False):
                run_update(backend, on, hyper, hessian, backup=backup)
    for backup in (True, False):
        run_update(backend, case, ADAM, False, backup=backup)
        run_update(backend, case, PLAIN, False, backup=backup, exp_hessian=None)
    if dtype == compute_dtype(dtype):
        norm = torch.tensor(3.0, dtype=torch.float64, device=device_of(backend))
        for hyper in (ADAM, ADAHESSIAN):
            run_update(backend, case, {**hyper, "ascent": "momentum"}, False, backup=False, norm=norm)
        plain = {**PLAIN, "ascent": "momentum"}
        run_update(backend, case, plain, False, backup=False, norm=norm, exp_hessian=None)
    by_blocks, blocked = {**HYPER, "hessian_block": 8}, case.offsets[1]
    compact = torch.ones_like(case.exp_hessian[: block_index(len(case.exp_avg), 8, blocked)])
    shared = {"blocked": blocked, "exp_hessian": compact}
    for power in POWERS:
        for averaged in (None, compact.clone()):
            run_update(backend, case, {**by_blocks, "hessian_power": power}, False, averaged=averaged, **shared)
    for on in (case, wide):
        run(backend, "block_average_", on, by_blocks, averaged=compact.clone(), **shared)
    call_with_norm(backend, case)


def call_with_norm(backend: str, case: Case) -> None:
    """Every step that leaves the norm of exp_avg and has a kernel of its own."""
    norm = torch.ones((), dtype=torch.float64, device=device_of(backend))
    compact = torch.ones_like(case.exp_hessian[: block_index(len(case.exp_avg), 8, case.offsets[1])])
    for power in POWERS:
        hyper = {**HYPER, "hessian_power": power}
        run_update(backend, case, hyper, False, exp_avg_norm=norm)
        shared = {"blocked": case.offsets[1], "exp_hessian": compact}
        run_update(backend, case, {**hyper, "hessian_block": 8}, False, exp_avg_norm=norm, **shared)
    run_update(backend, case, ADAM, False, exp_avg_norm=norm)
    run_update(backend, case, PLAIN, False, exp_hessian=None, exp_avg_norm=norm)

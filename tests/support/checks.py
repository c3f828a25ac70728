"""What must hold after a call of an operator, element by element: the formula, and nothing else in memory changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.support.backends import device_of
from tests.support.calls import HYPER, hutchinson, perturb, run, update
from tests.support.cases import (
    AVERAGE_ULPS,
    GENERAL_POWER_ULPS,
    ULPS,
    UPDATE_ULPS,
    Case,
    assert_rounded,
    assert_same_bits,
    assert_untouched,
)
from tests.support.formulas import formula_perturb, formula_update
from tests.support.reference import memory_order, signs


def check_perturb(
    backend: str, before: Case, norm: float, rho: float | Tensor = 0.2, adaptive: bool = False, maximize: bool = False
) -> None:
    """rho may have a value for each parameter."""
    after = perturb(backend, before, norm, rho, adaptive, maximize)
    rho = before.per_element(rho) if isinstance(rho, Tensor) else rho
    w = before.in_order(before.params)
    exact = formula_perturb(w, before.in_order(before.grads), norm, rho, adaptive, maximize)
    assert_rounded(after.params, exact.w, exact.w_largest, ULPS)
    assert_same_bits(torch.cat(after.parts(after.backup)), w, "backup")
    assert_untouched(after, before, except_for=("params", "backup"))


def check_standstill(backend: str, before: Case, norm: float, measure: bool, adaptive: bool = False) -> None:
    """A perturbation by a norm that is not finite saves the weights and leaves them where they are."""
    on = before.to(device_of(backend))
    scalar = torch.tensor(norm, dtype=torch.float64, device=device_of(backend))
    run(backend, "perturb_", on, {**HYPER, "adaptive": adaptive}, norm=scalar, measure=measure)
    after = on.to("cpu")
    assert_untouched(after, before, except_for=("backup",))
    assert_same_bits(torch.cat(after.parts(after.backup)), before.in_order(before.params), "backup")
    assert not math.isfinite(float(scalar))


def check_update(
    backend: str,
    before: Case,
    hessian: bool,
    backup: bool = True,
    *,
    hyper: dict[str, Any] = HYPER,
    formula: dict[str, Any] | None = None,
    second: bool | None = None,
    **changes: Any,
) -> None:
    """lr and weight_decay may have a value for each parameter. Without backup the step is from what is in params.

    formula: what hyper is to the formula, where it has other words for it. second: whether the step writes D, where
    it does so without products.
    """
    hyper = {**hyper, **changes}
    second = hessian if second is None else second
    after = update(backend, before, hyper, hessian, backup=backup)
    counts = before.steps[before.rows]
    t, e = (
        int(count[0]) if (count == count[0]).all() else before.per_element(count.double()) for count in counts.unbind(1)
    )
    m, D = (torch.cat(before.parts(flat)) for flat in (before.exp_avg, before.exp_hessian))
    w = torch.cat(before.parts(before.backup)) if backup else before.in_order(before.params)
    grads, products = before.in_order(before.grads), before.in_order(before.products) if hessian else None
    words = hyper if formula is None else formula
    of_update = {name: value for name, value in words.items() if name not in ("rho", "adaptive", "method")}
    of_elements = {k: before.per_element(v) if isinstance(v, Tensor) else v for k, v in of_update.items()}
    exact = formula_update(w, grads, products, m, D, t, e, **of_elements)
    ulps = UPDATE_ULPS if words["hessian_power"] in (0.5, 1.0) else GENERAL_POWER_ULPS
    squares = words.get("second") in ("square", "gradient")
    assert_rounded(after.params, exact.w, exact.w_largest, ulps)
    assert_rounded(after.parts(after.exp_avg), exact.m, exact.m_largest, AVERAGE_ULPS)
    assert_rounded(after.parts(after.exp_hessian), exact.D, exact.D_largest, AVERAGE_ULPS + squares)
    expected = [
        [t + 1, (t if words["bias_correction"] == "step" else e) + 1 if second else e] for t, e in counts.tolist()
    ]
    assert after.steps[before.rows].tolist() == expected
    others = [row for row in range(len(before.steps)) if row not in set(before.rows)]
    assert_same_bits(after.steps[others], before.steps[others], "the counts of other parameters")
    assert after.skipped.tolist() == [0]
    # On a lazy step not one bit of D may change.
    written = ("params", "exp_avg", "steps", "skipped") + (("exp_hessian",) if second else ())
    assert_untouched(after, before, except_for=written)


def check_skip(backend: str, before: Case, *guards: Tensor, hessian: bool = True, guard_grads: bool = False) -> None:
    found = [torch.tensor(1.0), *guards]
    alone = update(backend, before, HYPER, hessian, found, guard_grads, backup=False)
    assert alone.skipped.tolist() == [1]
    assert_untouched(alone, before, except_for=("skipped",))
    after = update(backend, before, HYPER, hessian, found, guard_grads)
    restored = torch.cat([memory_order(w) for w in after.params])
    assert_same_bits(restored, torch.cat(before.parts(before.backup)), "w after a skipped step")
    assert after.skipped.tolist() == [1]
    assert_untouched(after, before, except_for=("params", "skipped"))


def check_hutchinson(backend: str, before: Case, sample: int, samples: int) -> None:
    after = hutchinson(backend, before, 5, 6, sample, samples)
    z = [signs(i, p.numel(), 5, 6, sample) for i, p in zip(before.indices, before.products, strict=True)]
    terms = [torch.cat(z) * before.in_order(before.products).double()]
    if sample > 0:
        terms.append(torch.cat(before.parts(before.estimate)).double())
    exact, largest = torch.stack(terms).sum(0), torch.stack(terms).abs().amax(0)
    if sample == samples - 1:
        exact, largest = exact / samples, largest / samples
    assert_rounded(after.parts(after.estimate), exact, largest, 2)
    assert_untouched(after, before, except_for=("estimate",))


def exact_norm(grads: Sequence[Tensor], params: Sequence[Tensor] | None = None) -> float:
    """The norm, with the squares summed without any rounding."""
    terms = [g.double() if params is None else g.double() * w.double() for g, w in zip(grads, params or grads)]
    return math.sqrt(math.fsum(torch.cat([memory_order(term) for term in terms]).square().tolist()))

"""Each step of the optimizer against the formulas, from the state before it: what float32 and 16 bits allow."""

import itertools
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sassha_fused import Sassha
from tests.support.backends import BACKENDS, each_backend
from tests.support.cases import (
    AVERAGE_ULPS,
    GENERAL_POWER_ULPS,
    ULPS,
    UPDATE_ULPS,
    Recorder,
    assert_rounded,
    assert_same_bits,
    each_dtype,
    flat_of,
)
from tests.support.formulas import formula_norm, formula_perturb, formula_update
from tests.support.network import (
    COMMON,
    Groups,
    Network,
    State,
    each_run,
    snapshot,
    steps_of,
)
from tests.support.problems import single_threaded
from tests.support.reference import from_memory_order, memory_order, signs

one_thread = pytest.fixture(autouse=True, scope="module")(single_threaded)


def is_hessian_step(step: int, active: list[State], interval: int, warmup: int) -> bool:
    """Whether a step is one, by the states before it of those that take part; no step before it was skipped."""
    never = any(int(state.get("hessian_step", 0)) == 0 for state in active)
    return step % interval == 0 or step < warmup or never


def products_of(due: list[Tensor], starts: dict[Tensor, int], samples: int, seed: int, evaluation: int) -> Any:
    """For each sample the terms z . Hz, in float64, from the graph that the gradients in .grad carry."""
    curved = [p for p in due if p.grad.requires_grad]
    for sample in range(samples):
        z = {p: from_memory_order(signs(starts[p], p.numel(), seed, evaluation, sample), p).to(p) for p in due}
        products = torch.autograd.grad(
            [p.grad for p in curved], due, [z[p] for p in curved], retain_graph=True, materialize_grads=True
        )
        yield [z[p].double() * product.double() for p, product in zip(due, products, strict=True)]


def check_update(
    group: dict[str, Any], p: Tensor, before: tuple[Tensor, State], state: State, g: Tensor, H: Any
) -> None:
    """Compares one parameter and its state after a step with the formula, taken from the state before."""
    w, old = before
    zeros = torch.zeros(w.shape)
    exact = formula_update(
        memory_order(w),
        flat_of(g, p),
        None if H is None else flat_of(H, p),
        flat_of(old.get("exp_avg", zeros), p),
        flat_of(old.get("exp_hessian", zeros), p),
        int(old.get("step", 0)),
        int(old.get("hessian_step", 0)),
        lr=group["lr"],
        betas=group["betas"],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        hessian_power=group["hessian_power"],
        bias_correction=group["bias_correction"],
        maximize=group["maximize"],
    )
    ulps = UPDATE_ULPS if group["hessian_power"] in (0.5, 1.0) else GENERAL_POWER_ULPS
    assert_rounded([p.detach().cpu()], exact.w, exact.w_largest, ulps)
    assert_rounded([state["exp_avg"].cpu()], exact.m, exact.m_largest, AVERAGE_ULPS)
    assert_rounded([state["exp_hessian"].cpu()], exact.D, exact.D_largest, AVERAGE_ULPS)
    assert (int(state["step"]), int(state["hessian_step"])) == (exact.t, exact.e)
    assert state["exp_avg"].dtype == state["exp_hessian"].dtype == torch.float32


def check_single_steps(backend: str, dtype: torch.dtype, groups: Groups, recorder: Recorder, **options: Any) -> None:
    network = Network(dtype, BACKENDS[backend])
    optimizer = Sassha(groups(network), backend=backend, **options)
    every = [(group, p) for group in optimizer.param_groups for p in group["params"]]
    params = [p for _, p in every]
    starts = dict(zip(params, itertools.accumulate((p.numel() for p in params), initial=0)))
    evaluations = 0
    for step in range(steps_of(backend)):
        optimizer.zero_grad()
        network.loss(step).backward()
        before = dict(zip(params, snapshot(optimizer), strict=True))
        active = [(group, p, p.grad.cpu().clone()) for group, p in every if p.grad is not None]

        optimizer.perturb()
        norms = [formula_norm([g], [before[p][0]] if group["adaptive"] else None) for group, p, g in active]
        for group, p, g in active:
            weights, modes = memory_order(before[p][0]), (group["rho"], group["adaptive"], group["maximize"])
            exact = formula_perturb(weights, flat_of(g, p), math.hypot(*norms), *modes)
            assert_rounded([p.detach().cpu()], exact.w, exact.w_largest, ULPS)

        states = [before[p][1] for _, p, _ in active]
        hessian_step = is_hessian_step(step, states, options["hessian_interval"], options["hessian_warmup"])
        due = [p for _, p, _ in active] if hessian_step else []
        assert optimizer.hessian_due == bool(due)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Using backward")
            network.loss(step).backward(create_graph=bool(due))
        gradients = {p: p.grad.detach().cpu().clone() for _, p, _ in active}
        samples = list(
            products_of(due, starts, options["hessian_samples"], options["seed"], evaluations) if due else ()
        )
        evaluations += bool(due)
        recorder.products.clear()
        optimizer.step()

        assert set(recorder.products) == set(due)
        for terms in zip(due, *samples):
            check_estimate(recorder.products[terms[0]], torch.stack(terms[1:]))
        for group, p, _ in active:
            check_update(group, p, before[p], optimizer.state[p], gradients[p], recorder.products.get(p))
        for p in set(params) - {p for _, p, _ in active}:
            w, state = before[p]
            assert_same_bits(p.detach().cpu(), w, "a parameter without a gradient")
            assert all(torch.equal(value.cpu(), state[name]) for name, value in optimizer.state.get(p, {}).items())
    assert optimizer.skipped_steps == 0
    network.assert_guards_untouched()


def check_estimate(found: Tensor, terms: Tensor) -> None:
    """What reached update_ is the mean of the terms z . Hz; of a single one the sign does not matter."""
    if len(terms) == 1:
        torch.testing.assert_close(found.double().abs().cpu(), terms[0].abs().cpu(), rtol=0, atol=0)
    else:
        exact, largest = (flat_of(t.cpu(), found) for t in (terms.mean(0), terms.abs().amax(0)))
        assert_rounded([found.cpu()], exact, largest, 2)


@each_run(
    BACKENDS,
    [
        {"hessian_interval": 3, "hessian_samples": 3, "hessian_power": 1.0, "adaptive": True},
        {"hessian_interval": 1, "hessian_samples": 3, "hessian_power": 0.7, "bias_correction": "update"},
        {"hessian_interval": 10, "hessian_warmup": 3, "maximize": True, "lr": 1e-3},
        {"hessian_interval": 3, "bias_correction": "none"},
    ],
)
def test_every_step_is_the_formula_from_the_state_before_it(
    backend: str, dtype: torch.dtype, groups: Groups, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**COMMON, "hessian_samples": 1, "hessian_warmup": 0, **options}
    check_single_steps(backend, dtype, groups, Recorder(monkeypatch), **options)


@each_backend
@each_dtype
def test_weights_stay_at_w_to_the_bit_where_the_first_norm_is_not_finite(backend: str, dtype: torch.dtype) -> None:
    device = BACKENDS[backend]
    for value, adaptive in [(math.inf, False), (-math.inf, True), (math.nan, False), (math.nan, True)]:
        params = [nn.Parameter(torch.tensor(w, dtype=dtype, device=device)) for w in ([1.0, -0.0, 3.0], [2.0])]
        groups = [{"params": [p], "lr": 0.1 / (i + 1)} for i, p in enumerate(params)]
        optimizer = Sassha(groups, adaptive=adaptive, backend=backend)
        before = [p.detach().clone() for p in params]
        params[0].grad = torch.tensor([1.0, 1.0, value], dtype=dtype, device=device)
        params[1].grad = torch.ones_like(params[1]).detach()
        optimizer.perturb()
        for p, w in zip(params, before, strict=True):
            assert_same_bits(p.detach(), w, f"w' where a gradient is {value}")
        sum(p.square().sum() for p in params).backward(create_graph=optimizer.hessian_due)
        optimizer.step()
        for p, w in zip(params, before, strict=True):
            assert_same_bits(p.detach(), w, f"w after a step whose gradient was {value}")
        assert optimizer.skipped_steps == 1

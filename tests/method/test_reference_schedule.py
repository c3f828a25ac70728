"""Who takes part in a step of the reference, and which steps are Hessian steps."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.quadratic import (
    EVERY,
    Attempt,
    assert_bitwise,
    check_against_closed_form,
    parameter,
    sign_by_definition,
    snapshot,
)
from tests.support.reference import ReferenceSassha


def test_only_parameters_with_gradients_in_both_passes_take_part() -> None:
    both, first, second, neither = (parameter(1.0, 2.0) for _ in range(4))
    params = [both, first, second, neither]
    opt = ReferenceSassha(params)
    used = iter([[both, first], [both, second]])
    opt.step(lambda: sum((p**2).sum() for p in next(used)))
    for p in (first, second, neither):
        assert_bitwise(p.detach(), torch.tensor([1.0, 2.0], dtype=torch.float64))
        assert p not in opt.state
    assert opt.state[both]["step"] == 1
    assert opt.hessian_evaluations == 1


def test_counters_of_a_parameter_without_gradients_stand_still() -> None:
    always, sometimes = parameter(1.0), parameter(1.0)
    opt = ReferenceSassha([always, sometimes], hessian_interval=3)
    steps, hessian_steps, evaluations = [], [], []
    for step in range(8):
        before = snapshot(opt)
        with_both = step not in (1, 2, 3)
        opt.step(lambda with_both=with_both: (always**2).sum() + ((sometimes**2).sum() if with_both else 0))
        if not with_both:
            assert_bitwise([snapshot(opt)[part][1] for part in (0, 1)], [before[part][1] for part in (0, 1)])
        steps.append((opt.state[always]["step"], opt.state[sometimes]["step"]))
        hessian_steps.append((opt.state[always]["hessian_step"], opt.state[sometimes]["hessian_step"]))
        evaluations.append(opt.hessian_evaluations)
    assert steps == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 3), (7, 4), (8, 5)]
    # The second one misses the Hessian step 4, and at 7 has taken four steps.
    assert hessian_steps == [(1, 1), (1, 1), (1, 1), (4, 1), (4, 1), (4, 1), (7, 4), (7, 4)]
    assert evaluations == [1, 1, 1, 2, 2, 2, 3, 3]


@pytest.mark.parametrize("correction", ["step", "update", "none"])
def test_a_late_parameter_makes_its_first_step_a_hessian_step_of_all(correction: str) -> None:
    early, late = parameter(1.0), parameter(1.0)
    opt = ReferenceSassha([early, late], betas=(0.9, 0.5), hessian_interval=10, bias_correction=correction)
    opt.step(lambda: early.square().sum())
    for _ in range(2):
        opt.step(lambda: early.square().sum() + 3 * (early * late).sum() + 2 * late.square().sum())
    # The Hessian is [[2, 3], [3, 4]], and both have signs: those of elements 0 and 1 in evaluation 1.
    mixed = 3 * sign_by_definition(0, 0, 1, 0) * sign_by_definition(1, 0, 1, 0)
    assert opt.state[early]["exp_hessian"].item() == 0.5 * (0.5 * 2) + 0.5 * abs(2 + mixed)
    assert opt.state[late]["exp_hessian"].item() == 0.5 * abs(4 + mixed)
    assert (opt.state[early]["hessian_step"], opt.state[late]["hessian_step"]) == (2, 1)
    assert (opt.steps_taken, opt.hessian_evaluations) == (3, 2)


def test_a_parameter_that_had_no_second_gradient_makes_no_hessian_step() -> None:
    always, once = parameter(1.0), parameter(1.0)
    opt = ReferenceSassha([always, once], hessian_interval=10)
    opt.step(lambda: always.square().sum())
    used = iter([[always, once], [always]])
    opt.step(lambda: sum(p.square().sum() for p in next(used)))
    assert (opt.steps_taken, opt.hessian_evaluations) == (2, 1)
    assert opt.state[always]["hessian_step"] == 1
    assert once not in opt.state


def hessian_steps_of(opt: ReferenceSassha, losses: Iterable[Callable[[], Tensor]]) -> list[int]:
    """Takes a step for each loss; which of them, counted from 0, were Hessian steps."""
    found = []
    for step, loss in enumerate(losses):
        before = opt.hessian_evaluations
        opt.step(loss)
        found += [step] * (opt.hessian_evaluations - before)
    return found


def test_layers_dropped_at_random_leave_hessian_steps_at_every_kth_step() -> None:
    layers = [parameter(1.0, -2.0) for _ in range(6)]
    opt = ReferenceSassha(layers, lr=0.01, hessian_interval=10)
    random = np.random.default_rng(0)

    def loss_of(kept: np.ndarray) -> Callable[[], Tensor]:
        return lambda: sum((p**4).sum() for p, yes in zip(layers, kept) if yes)

    # All in the first step, later the first layer and a half of the others; the same ones in both passes.
    kept = random.random((61, 6)) < 0.5
    kept[0] = kept[:, 0] = True
    assert hessian_steps_of(opt, map(loss_of, kept)) == [0, 10, 20, 30, 40, 50, 60]
    assert [opt.state[p]["step"] for p in layers] == np.sum(kept, axis=0).tolist()
    # c2 is that of the step, of this parameter, at which it last had a Hessian.
    last = [max(step for step in range(0, 61, 10) if kept[step][i]) for i in range(6)]
    steps = [sum(kept[step][i] for step in range(last[i] + 1)) for i in range(6)]
    assert [opt.state[p]["hessian_step"] for p in layers] == steps


def test_warm_up_counts_the_steps_of_the_optimizer() -> None:
    early, late = parameter(1.0), parameter(1.0)
    opt = ReferenceSassha([early, late], hessian_interval=6, hessian_warmup=3)

    def both() -> Tensor:
        return (early**2).sum() + (late**2).sum()

    # Steps 0 to 2 are the warm-up; the first step of the late one, 4, starts none of its own.
    losses = [lambda: (early**2).sum()] * 4 + [both] * 9
    assert hessian_steps_of(opt, losses) == [0, 1, 2, 4, 6, 12]


def test_skipped_steps_do_not_count_in_the_schedule() -> None:
    w = parameter(1.0)
    opt = ReferenceSassha([w], hessian_interval=3, hessian_warmup=2)

    def loss_of(step: int) -> Callable[[], Tensor]:
        return lambda: (w**2).sum() * (math.nan if step in (1, 4, 5) else 1)

    # T is 0, 1, 1, 2, 3, 3, 3, 4, 5, 6.
    assert hessian_steps_of(opt, map(loss_of, range(10))) == [0, 2, 6, 9]
    assert (opt.steps_taken, opt.skipped_steps) == (7, 3)


RANDOM = [
    pytest.param([{}], {}, id="base"),
    pytest.param([{"bias_correction": "update"}], {"hessian_samples": 2, "hessian_warmup": 4, "seed": 1}, id="update"),
    pytest.param([{"bias_correction": "none", "adaptive": True}], {"hessian_interval": 2, "seed": 2}, id="none"),
    pytest.param([{"rho": 0.0}], {"hessian_interval": 4, "hessian_samples": 2, "seed": 3}, id="one pass"),
    pytest.param(
        [
            {"bias_correction": "none", "rho": 0.0},
            {"bias_correction": "update", "adaptive": True, "maximize": True},
            {"betas": (0.5, 0.9), "weight_decay": 0.2},
        ],
        {"hessian_interval": 5, "hessian_samples": 3, "seed": 4},
        id="groups",
    ),
]


@pytest.mark.parametrize("groups, schedule", RANDOM)
def test_steps_with_random_parameters_and_skipped_ones_match_the_closed_form(
    groups: list[dict], schedule: dict[str, int]
) -> None:
    random = np.random.default_rng(schedule.get("seed", 0))
    passes = random.random((25, 2, len(EVERY))) < [0.9, 0.4, 0.6, 0.5]
    finite = random.random(25) < 0.8
    if all(group.get("rho") == 0 for group in groups):
        passes[:, 1] = passes[:, 0]
    attempts = [Attempt(*map(tuple, both), bool(yes)) for both, yes in zip(passes, finite)]
    taken = [bool((both.all(0)).any() and yes) for both, yes in zip(passes, finite)]
    opt = check_against_closed_form(groups, schedule, attempts)
    assert opt.steps_taken == sum(taken) < 25
    assert opt.skipped_steps == sum(not yes for yes in finite) > 0


def test_groups_may_be_added_at_any_time() -> None:
    a, b = parameter(1.0), parameter(2.0)
    opt = ReferenceSassha([a])
    opt.step(lambda: (a**2).sum() + (b**2).sum())
    opt.add_param_group({"params": [b], "lr": 0.01})
    for _ in range(3):
        opt.step(lambda: (a**2).sum() + (b**2).sum())
    assert (opt.state[a]["step"], opt.state[a]["hessian_step"]) == (4, 2)
    assert (opt.state[b]["step"], opt.state[b]["hessian_step"]) == (3, 1)


@pytest.mark.parametrize("name", ["hessian_interval", "hessian_warmup", "hessian_samples", "seed"])
def test_the_schedule_and_the_signs_are_no_matter_of_groups(name: str) -> None:
    with pytest.raises(ValueError, match=f"one value for the whole optimizer, not for a group: {name}"):
        ReferenceSassha([{"params": [parameter(1.0)], name: 3}])


def test_a_repeated_parameter_counts_once() -> None:
    runs = []
    for copies in (1, 2):
        a, b = parameter(1.0, 2.0), parameter(3.0)
        if copies == 2:
            with pytest.warns(UserWarning, match="duplicate"):
                opt = ReferenceSassha([a, a, b], hessian_samples=3)
        else:
            opt = ReferenceSassha([a, b], hessian_samples=3)
        for _ in range(3):
            opt.step(lambda a=a, b=b: a.prod() * b.sum() + a.pow(3).sum())
        runs.append(snapshot(opt))
    assert_bitwise(*runs)


def test_a_frozen_parameter_is_untouched() -> None:
    a, b = parameter(1.0), parameter(2.0)
    opt = ReferenceSassha([a, b])
    opt.step(lambda: (a * b).sum())
    b.requires_grad_(False)
    before = snapshot(opt)
    opt.step(lambda: (a * b).sum())
    assert_bitwise([snapshot(opt)[part][1] for part in (0, 1)], [before[part][1] for part in (0, 1)])
    assert opt.state[a]["step"] == 2


def test_a_step_without_any_gradient_changes_nothing() -> None:
    w = parameter(1.0)
    opt = ReferenceSassha([w])
    before = snapshot(opt)
    assert opt.step(lambda: torch.tensor(3.0)) == 3
    assert_bitwise(snapshot(opt), before)
    assert opt.skipped_steps == 0


def test_a_parameter_that_enters_linearly_has_hessian_zero() -> None:
    curved, linear, alone = parameter(1.0), parameter(2.0), parameter(3.0)
    opt = ReferenceSassha([curved, linear], betas=(0.9, 0.5))
    opt.step(lambda: curved.square().sum() + 5 * linear.sum())
    assert opt.state[curved]["exp_hessian"].item() == 1
    assert opt.state[linear]["exp_hessian"].item() == 0
    assert (opt.state[linear]["step"], opt.state[linear]["hessian_step"]) == (1, 1)

    opt = ReferenceSassha([alone])
    opt.step(lambda: 5 * alone.sum())
    assert opt.state[alone]["exp_hessian"].item() == 0


def test_the_graph_is_built_on_hessian_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    grad = torch.autograd.grad

    def recording(*args: Any, create_graph: bool = False, **kwargs: Any) -> Any:
        built.append(create_graph)
        return grad(*args, create_graph=create_graph, **kwargs)

    w, unused = parameter(1.0), parameter(1.0)
    opt = ReferenceSassha([w, unused], hessian_interval=3, hessian_warmup=2)
    monkeypatch.setattr(torch.autograd, "grad", recording)
    for due in [True, True, False, True, False]:
        built.clear()
        opt.step(lambda: (w**2).sum())
        assert built == ([False, True, False] if due else [False, False])
        assert not w.grad.requires_grad

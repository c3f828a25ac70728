"""Who takes part in a step of the reference, and which steps are Hessian steps."""

from typing import Any

import pytest
import torch

from tests.support.quadratic import assert_bitwise, parameter, snapshot
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
    assert hessian_steps == [(1, 1), (1, 1), (1, 1), (4, 1), (4, 1), (4, 1), (7, 4), (7, 4)]
    assert evaluations == [1, 1, 1, 2, 2, 2, 3, 3]


def test_a_late_parameter_starts_with_a_hessian_step_of_its_own() -> None:
    early, late = parameter(1.0), parameter(1.0)
    opt = ReferenceSassha([early, late], betas=(0.9, 0.5), hessian_interval=10)
    opt.step(lambda: early.square().sum())
    curvature = opt.state[early]["exp_hessian"].clone()
    opt.step(lambda: early.square().sum() + 3 * (early * late).sum() + 2 * late.square().sum())
    # Signs are drawn for due parameters only: the mixed derivative 3 does not enter.
    assert opt.state[late]["exp_hessian"].item() == 0.5 * 4
    assert_bitwise(opt.state[early]["exp_hessian"], curvature)
    assert (opt.state[early]["hessian_step"], opt.state[late]["hessian_step"]) == (1, 1)
    assert opt.hessian_evaluations == 2


def test_groups_may_be_added_at_any_time() -> None:
    a, b = parameter(1.0), parameter(2.0)
    opt = ReferenceSassha([a])
    opt.step(lambda: (a**2).sum() + (b**2).sum())
    opt.add_param_group({"params": [b], "hessian_interval": 2})
    for _ in range(3):
        opt.step(lambda: (a**2).sum() + (b**2).sum())
    assert (opt.state[a]["step"], opt.state[a]["hessian_step"]) == (4, 1)
    assert (opt.state[b]["step"], opt.state[b]["hessian_step"]) == (3, 3)


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

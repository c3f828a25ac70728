"""The ways to take a step agree bit for bit, and hessian_due, restore and the schedule hold in each of them."""

import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from sassha_fused import Sassha
from tests.support.problems import (
    BACKENDS,
    STYLES,
    Problem,
    assert_differ,
    assert_same,
    backward,
    parameter,
    single_threaded,
    undisturbed,
    weights,
)
from tests.support.reference import signs

one_thread = pytest.fixture(autouse=True)(single_threaded)
both_backends = pytest.mark.parametrize("backend", BACKENDS)
all_styles = pytest.mark.parametrize("style", STYLES)
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "adaptive": {"adaptive": True, "rho": 0.5},
    "three samples": {"hessian_samples": 3, "seed": 11},
    "warm-up, power, update": {"hessian_warmup": 2, "hessian_power": 0.8, "bias_correction": "update"},
    "maximize": {"maximize": True, "lr": 0.001},
    "bfloat16": {"dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64},
}


# ---------------------------------------------------------------------------------------------------------------------
# The same trajectory


@both_backends
@pytest.mark.parametrize("name", OPTIONS)
def test_every_style_takes_bitwise_the_same_steps_and_returns_the_first_loss(backend: str, name: str) -> None:
    problems = [Problem(backend, **OPTIONS[name]) for _ in STYLES]
    for _ in range(7):
        expected = problems[0].loss().detach()
        for problem, style in zip(problems, STYLES):
            loss = problem.step(style)
            assert_same(loss, expected)
            assert not loss.requires_grad
    first, *others = [problem.snapshot() for problem in problems]
    assert all(state["step"] == 7 for state in first["state"].values())
    for other in others:
        assert_same(other, first)


@both_backends
def test_styles_mix_freely(backend: str) -> None:
    problem = Problem(backend)
    for style in ("phase", "standard", "closure", "closure", "phase", "phase", "standard", "phase"):
        problem.step(style)
    assert_same(problem.snapshot(), undisturbed(Problem, backend, 8))


def test_two_runs_agree_bit_for_bit() -> None:
    assert_same(Problem(hessian_samples=2).train(7).snapshot(), Problem(hessian_samples=2).train(7).snapshot())


@both_backends
def test_a_closure_that_clears_gradients_itself_changes_nothing(backend: str) -> None:
    problem = Problem(backend)

    def closure() -> Tensor:
        problem.opt.zero_grad()
        loss = problem.loss()
        backward(loss, create_graph=problem.opt.hessian_due)
        return loss

    for _ in range(4):
        problem.opt.step(closure)
        problem.steps += 1
    assert_same(problem.snapshot(), undisturbed(Problem, backend, 4))


@both_backends
@pytest.mark.parametrize("style", ["closure", "standard"])
def test_gradients_left_over_from_elsewhere_do_not_enter_a_closure_step(backend: str, style: str) -> None:
    problem = Problem(backend)
    for _ in range(4):
        (100 * problem.loss()).backward()
        problem.step(style)
    assert_same(problem.snapshot(), undisturbed(Problem, backend, 4))


@pytest.mark.parametrize("style", ["standard", "phase"])
def test_a_graph_built_where_none_is_needed_does_no_harm(style: str) -> None:
    problem = Problem()
    for _ in range(7):
        if style == "standard":

            def closure() -> Tensor:
                loss = problem.loss()
                backward(loss, create_graph=True)
                return loss

            problem.opt.step(closure)
        else:
            problem.opt.zero_grad()
            backward(problem.loss(), create_graph=True)
            problem.opt.perturb()
            backward(problem.loss(), create_graph=True)
            problem.opt.step()
        assert not any(param.grad.requires_grad for param in problem.params)
        problem.steps += 1
    assert_same(problem.snapshot(), undisturbed(Problem, "cpu", 7))


def test_closure_style_shows_no_warning_about_graphs() -> None:
    code = (
        "import torch; torch.set_warn_always(True)\n"
        "from tests.support.problems import Problem\n"
        "problem = Problem()\n"
        "for _ in range(4): problem.opt.step(problem.loss)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


def test_torch_still_warns_of_graphs_that_others_build() -> None:
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        Problem().train(1)
        with pytest.warns(UserWarning, match="create_graph=True"):
            Problem().loss().backward(create_graph=True)
    finally:
        torch.set_warn_always(before)


# ---------------------------------------------------------------------------------------------------------------------
# hessian_due and perturbed


@both_backends
def test_hessian_due_says_at_every_point_whether_a_graph_is_needed(backend: str) -> None:
    problem = Problem(backend)
    opt = problem.opt
    for due in (True, False, False, True, False):
        assert (opt.hessian_due, opt.perturbed) == (due, False)
        opt.zero_grad()
        problem.loss().backward()
        assert (opt.hessian_due, opt.perturbed) == (due, False)
        opt.perturb()
        assert (opt.hessian_due, opt.perturbed) == (due, True)
        backward(problem.loss(), create_graph=due)
        assert (opt.hessian_due, opt.perturbed) == (due, True)
        opt.restore()
        assert (opt.hessian_due, opt.perturbed) == (due, False)
        opt.step()
        problem.steps += 1


@both_backends
def test_hessian_due_is_false_in_the_first_pass_of_a_closure(backend: str) -> None:
    problem = Problem(backend)
    seen = []

    def closure() -> Tensor:
        seen.append((problem.opt.hessian_due, problem.opt.perturbed))
        return problem.loss()

    for _ in range(3):
        problem.opt.step(closure)
    # Even where a step in the other style was begun and not finished.
    problem.perturb()
    backward(problem.loss(), create_graph=True)
    problem.opt.restore()
    problem.opt.step(closure)
    first, lazy, hessian = (False, False), (False, True), (True, True)
    assert seen == [first, hessian, first, lazy, first, lazy, first, hessian]


@both_backends
@pytest.mark.parametrize("interval, warmup", [(1, 0), (3, 0), (3, 2), (3, 4), (10, 3)])
def test_hessian_steps_follow_interval_and_warm_up(backend: str, interval: int, warmup: int) -> None:
    problem = Problem(backend, hessian_interval=interval, hessian_warmup=warmup)
    due = []
    for _ in range(12):
        before = problem.snapshot()["state"]
        due.append(problem.opt.hessian_due)
        problem.step()
        after = problem.snapshot()["state"]
        if before:
            changed = not torch.equal(before[0]["exp_hessian"], after[0]["exp_hessian"])
            assert changed == due[-1]
    assert due == [(t - 1) % interval == 0 or t <= warmup for t in range(1, 13)]


@both_backends
@pytest.mark.parametrize("own_group", [True, False])
def test_a_parameter_that_joins_late_has_a_schedule_of_its_own(backend: str, own_group: bool) -> None:
    first, late = parameter(1.0, 2.0), parameter(1.0, 2.0)
    groups = [{"params": [first]}, {"params": [late]}] if own_group else [{"params": [first, late]}]
    opt = Sassha(groups, lr=0.01, hessian_interval=3, backend=backend)
    due = []
    for t in range(8):

        def loss(joined: bool = t >= 2) -> Tensor:
            return (first**3).sum() + (late**3).sum() if joined else (first**3).sum()

        opt.zero_grad()
        loss().backward()
        opt.perturb()
        due.append(opt.hessian_due)
        backward(loss(), create_graph=due[-1])
        opt.step()
    assert due == [True, False, True, True, False, True, True, False]
    counts = [[int(opt.state[param][name]) for name in ("step", "hessian_step")] for param in (first, late)]
    assert counts == [[8, 7], [6, 4]]


@both_backends
def test_signs_of_a_late_evaluation_are_those_of_its_global_index(backend: str) -> None:
    first, late = nn.Parameter(torch.ones(130)), nn.Parameter(torch.ones(70))
    opt = Sassha(
        [{"params": [first]}, {"params": [late]}], hessian_samples=2, seed=3, betas=(0.9, 0.5), backend=backend
    )
    opt.step(lambda: first.sum() ** 2)
    # H = d^2/dw_i dw_j of (sum w)^2 = 2 for all i, j: z . Hz = 2 z_i sum z, here over the late parameter alone.
    opt.step(lambda: (first.sum() + late.sum()) ** 2)
    z = [signs(130, 70, seed=3, evaluation=1, sample=s) for s in range(2)]
    expected = sum(2 * zs * zs.sum() for zs in z).abs() / 2
    torch.testing.assert_close(2 * opt.state[late]["exp_hessian"].double(), expected)
    assert (opt.state[first]["hessian_step"], opt.state[late]["hessian_step"]) == (1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# restore


@both_backends
@pytest.mark.parametrize("samples", [1, 2])
def test_an_early_restore_changes_nothing_in_the_step(backend: str, samples: int) -> None:
    early, plain = Problem(backend, hessian_samples=samples), Problem(backend, hessian_samples=samples)
    for _ in range(7):
        before = weights(early.params)
        early.perturb()
        backward(early.loss(), create_graph=early.opt.hessian_due)
        for _ in range(2):
            early.opt.restore()
            assert_same(weights(early.params), before)
        early.opt.step()
        early.steps += 1
        plain.step("phase")
    assert_same(early.snapshot(), plain.snapshot())


@both_backends
@pytest.mark.parametrize("steps", [0, 1])
def test_restore_before_the_second_pass_gives_the_step_up(backend: str, steps: int) -> None:
    problem = Problem(backend).train(steps)
    before = weights(problem.params)
    problem.perturb()
    assert_differ(weights(problem.params), before)
    problem.opt.restore()
    problem.opt.step()
    assert_same(weights(problem.params), before)
    assert_same(problem.train(4, "phase").snapshot(), undisturbed(Problem, backend, steps + 4))


@both_backends
@pytest.mark.parametrize("steps", [0, 1])
def test_a_new_perturb_after_restore_gives_the_old_step_up(backend: str, steps: int) -> None:
    problem = Problem(backend).train(steps)
    problem.perturb()
    backward(problem.loss(), create_graph=problem.opt.hessian_due)
    problem.opt.restore()
    assert_same(problem.train(4, "phase").snapshot(), undisturbed(Problem, backend, steps + 4))


@both_backends
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("second_pass", [False, True])
def test_a_closure_step_after_perturb_starts_from_the_restored_weights(
    backend: str, steps: int, second_pass: bool
) -> None:
    problem = Problem(backend).train(steps)
    problem.perturb()
    if second_pass:
        backward(problem.loss(), create_graph=problem.opt.hessian_due)
    assert_same(problem.train(4).snapshot(), undisturbed(Problem, backend, steps + 4))


def test_restore_and_step_without_a_perturbation_do_nothing() -> None:
    problem = Problem().train(2)
    before = problem.snapshot()
    problem.opt.zero_grad()
    problem.opt.restore()
    problem.opt.step()
    assert_same(problem.snapshot(), before)


def test_a_graph_from_before_perturb_can_no_longer_be_used() -> None:
    problem = Problem().train(1)
    stale = problem.loss()
    problem.perturb()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()
    stale = problem.loss()
    problem.opt.restore()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


# ---------------------------------------------------------------------------------------------------------------------
# Who takes part


@both_backends
@all_styles
@pytest.mark.parametrize("present", [0, 1])
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("groups", [[[0, 1]], [[0], [1]], [[0, 1], [2]], [[2], [0, 1]]], ids=str)
def test_a_parameter_with_a_gradient_in_one_pass_only_is_untouched(
    backend: str, style: str, present: int, steps: int, groups: list[list[int]]
) -> None:
    params = [parameter(1.0, 2.0), parameter(3.0, 4.0), parameter(5.0)]
    chosen = [{"params": [params[i] for i in group]} for group in groups]
    opt = Sassha(chosen, hessian_interval=3, backend=backend)

    def one() -> Tensor:
        return (params[0] ** 3).sum() + (params[2] ** 3).sum()

    def both() -> Tensor:
        return one() + (params[1] ** 3).sum()

    for _ in range(steps):
        STYLES[style](opt, both)
    before = [*weights(params), *(value.clone() for value in opt.state[params[1]].values())]
    passes = iter(range(2))
    STYLES[style](opt, lambda: both() if next(passes) == present else one())
    assert not torch.equal(params[0], before[0])
    assert_same(params[1].detach(), before[1])
    assert [int(opt.state[param].get("step", 0)) for param in params[:2]] == [steps + 1, steps]
    if steps:
        assert_same(list(opt.state[params[1]].values()), before[3:])
    STYLES[style](opt, both)
    assert [int(opt.state[param]["step"]) for param in params[:2]] == [steps + 2, steps + 1]


@both_backends
@pytest.mark.parametrize("style", ["closure", "phase"])
@pytest.mark.parametrize("empty_pass", [0, 1])
def test_a_pass_without_any_gradient_is_no_step(backend: str, style: str, empty_pass: int) -> None:
    problem = Problem(backend).train(2)
    before = problem.snapshot()
    passes = iter(range(2))

    def loss() -> Tensor:
        return torch.ones((), requires_grad=True) * 1 if next(passes) == empty_pass else problem.loss()

    STYLES[style](problem.opt, loss)
    assert_same(problem.snapshot(), before)
    assert not problem.opt.perturbed


@both_backends
@all_styles
def test_a_frozen_parameter_rests_and_goes_on_where_it_stood(backend: str, style: str) -> None:
    problem = Problem(backend).train(2, style)
    frozen = problem.params[2]
    frozen.requires_grad_(False)
    before = [frozen.detach().clone(), {name: value.clone() for name, value in problem.opt.state[frozen].items()}]
    problem.train(3, style)
    assert_same([frozen.detach(), problem.opt.state[frozen]], before)
    frozen.requires_grad_(True)
    problem.train(3, style)
    assert int(problem.opt.state[frozen]["step"]) == 5
    assert int(problem.opt.state[problem.params[0]]["step"]) == 8


@both_backends
@all_styles
def test_everything_may_be_frozen(backend: str, style: str) -> None:
    problem = Problem(backend).train(1)
    before = problem.snapshot()
    problem.model.requires_grad_(False)
    outside = torch.ones((), requires_grad=True)
    STYLES[style](problem.opt, lambda: problem.loss() * outside)
    assert_same(problem.snapshot(), before)


@both_backends
def test_a_graph_that_is_gone_is_an_error_and_no_step(backend: str) -> None:
    problem = Problem(backend).train(1)
    before = problem.snapshot()
    once = problem.loss()
    with pytest.raises(RuntimeError, match="a second time"):
        problem.opt.step(lambda: once)
    assert_same(problem.snapshot(), before)


@both_backends
def test_backward_reaches_parameters_of_others_where_all_of_ours_are_frozen(backend: str) -> None:
    problem = Problem(backend)
    problem.model.requires_grad_(False)
    outside = torch.ones((), requires_grad=True)
    problem.opt.step(lambda: outside**2)
    assert outside.grad == 2


@both_backends
@all_styles
def test_a_parameter_listed_twice_is_stepped_once(backend: str, style: str) -> None:
    once, twice = parameter(1.0, 2.0), parameter(1.0, 2.0)
    opts = [Sassha([once], backend=backend)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opts.append(Sassha([twice, twice], backend=backend))
    for _ in range(4):
        for opt, w in zip(opts, (once, twice)):
            STYLES[style](opt, lambda: (w**3).sum())
    assert_same(twice.detach(), once.detach())
    assert int(opts[1].state[twice]["step"]) == 4


@both_backends
def test_tied_weights_are_one_parameter(backend: str) -> None:
    table, head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
    head.weight = table.weight
    model = nn.Sequential(table, nn.Tanh(), head)
    opt = Sassha(model.parameters(), hessian_interval=2, backend=backend)
    words = torch.tensor([0, 1, 2, 3])
    losses = [opt.step(lambda: nn.functional.cross_entropy(model(words), words + 1)).item() for _ in range(20)]
    assert losses[-1] < losses[0]
    assert len(opt.state) == 1
    assert head.weight is table.weight


@both_backends
@all_styles
def test_zero_dimensional_and_empty_parameters_take_part(backend: str, style: str) -> None:
    scalar, empty, vector = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.empty(0, 3)), parameter(2.0, 2.0)
    opt = Sassha([scalar, empty, vector], rho=0.0, hessian_interval=2, backend=backend)
    for _ in range(4):
        STYLES[style](opt, lambda: scalar**4 + (empty**2).sum() + (vector**4).sum())
    assert [int(state["step"]) for state in opt.state.values()] == [4, 4, 4]
    assert scalar.shape == () and scalar < 2
    assert_same(vector.detach(), scalar.detach().expand(2))


@both_backends
def test_only_empty_parameters_make_a_step_that_does_nothing(backend: str) -> None:
    empty = nn.Parameter(torch.empty(0))
    opt = Sassha([empty], backend=backend)
    for _ in range(3):
        opt.step(lambda: empty.sum() * 2)
    assert opt.skipped_steps == 0
    assert int(opt.state[empty]["step"]) == 3


@both_backends
def test_a_group_without_parameters_is_no_hindrance(backend: str) -> None:
    problem = Problem(backend)
    problem.opt.add_param_group({"params": []})
    assert_same(problem.train(4).snapshot()["weights"], undisturbed(Problem, backend, 4)["weights"])


# ---------------------------------------------------------------------------------------------------------------------
# Options of the groups


@both_backends
@pytest.mark.parametrize(
    "option",
    [
        {"lr": 0.01},
        {"betas": (0.5, 0.5)},
        {"eps": 0.5},
        {"weight_decay": 0.3},
        {"hessian_power": 1.0},
        {"hessian_interval": 2},
        {"hessian_warmup": 3},
        {"bias_correction": "update"},
        {"maximize": True},
    ],
    ids=str,
)
def test_an_option_of_one_group_concerns_that_group_alone(backend: str, option: dict[str, Any]) -> None:
    def run(first: dict[str, Any], second: dict[str, Any]) -> list[Tensor]:
        params = [parameter(1.0, -2.0), parameter(1.0, -2.0)]
        groups = [{"params": [params[0]], **first}, {"params": [params[1]], **second}]
        opt = Sassha(groups, rho=0.0, hessian_interval=4, backend=backend)
        for _ in range(6):  # a separable loss, without perturbation: nothing but the option links the groups
            opt.step(lambda: (params[0] ** 4).sum() + (params[1] ** 4).sum())
        return weights(params)

    plain, mixed, changed = run({}, {}), run({}, option), run(option, option)
    assert_same(mixed[0], plain[0])
    assert_same(mixed[1], changed[1])
    assert not torch.equal(mixed[1], plain[1])


@both_backends
def test_the_norm_is_one_over_all_groups_and_the_radius_each_groups_own(backend: str) -> None:
    params = [parameter(1.0, 2.0, dtype=torch.float64), parameter(3.0), parameter(5.0, dtype=torch.bfloat16)]
    groups = [{"params": [params[0]], "rho": 0.1}, {"params": params[1:], "rho": 0.6}]
    opt = Sassha(groups, backend=backend)
    (params[0] * torch.tensor([2.0, 3.0])).sum().backward()
    (params[1] * 6 + params[2].float() * 24).sum().backward()
    opt.perturb()
    norm = (4 + 9 + 36 + 576) ** 0.5  # = 25
    expected = torch.tensor([1.0, 2.0], dtype=torch.float64)
    expected += torch.tensor([2.0, 3.0], dtype=torch.float64) * 0.1 / norm
    torch.testing.assert_close(params[0].detach(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(params[1].detach(), torch.tensor([3.0 + 6 * 0.6 / 25]))
    assert_same(params[2].detach(), torch.tensor([5.0 + 24 * 0.6 / 25]).bfloat16())


@both_backends
def test_maximize_is_minimizing_the_negative(backend: str) -> None:
    up, down = parameter(1.0, -2.0), parameter(1.0, -2.0)
    climb, fall = Sassha([up], maximize=True, backend=backend), Sassha([down], backend=backend)
    for _ in range(5):
        climb.step(lambda: -(up**4).sum())
        fall.step(lambda: (down**4).sum())
    assert_same(up.detach(), down.detach())


# ---------------------------------------------------------------------------------------------------------------------
# Learning rates


@both_backends
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64])
def test_a_tensor_learning_rate_equals_the_float_bit_for_bit(
    backend: str, shape: tuple[int, ...], lr_dtype: torch.dtype
) -> None:
    lr = torch.full(shape, 0.0625, dtype=lr_dtype)
    params = [[parameter(1.0, -2.0), nn.Parameter(torch.tensor(3.0)), parameter(1.0).bfloat16()] for _ in range(2)]
    params = [[nn.Parameter(p.detach().clone()) for p in some] for some in params]
    opts = [Sassha(some, lr=rate, weight_decay=0.1, backend=backend) for some, rate in zip(params, (lr, 0.0625))]
    for t in range(4):
        for opt, some in zip(opts, params):
            opt.step(lambda: sum((p.float() ** 4).sum() for p in some))
        if t == 1:
            lr.fill_(0.125)
            opts[1].param_groups[0]["lr"] = 0.125
    assert_same(weights(params[0]), weights(params[1]))
    assert opts[0].param_groups[0]["lr"] is lr
    assert_same(lr, torch.full(shape, 0.125, dtype=lr_dtype))


SCHEDULERS: dict[str, Callable[[Sassha], Any]] = {
    "StepLR": lambda opt: torch.optim.lr_scheduler.StepLR(opt, 2, 0.5),
    "ExponentialLR": lambda opt: torch.optim.lr_scheduler.ExponentialLR(opt, 0.5),
    "LinearLR": lambda opt: torch.optim.lr_scheduler.LinearLR(opt, 0.25, total_iters=4),
    "CosineAnnealingLR": lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 6),
    "LambdaLR": lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1 / (1 + t)),
    "OneCycleLR": lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=8),
    "SequentialLR": lambda opt: torch.optim.lr_scheduler.SequentialLR(
        opt,
        [torch.optim.lr_scheduler.ConstantLR(opt, 0.5, 2), torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)],
        [2],
    ),
}


@both_backends
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_moves_a_tensor_learning_rate_as_it_moves_a_float(backend: str, name: str) -> None:
    rates: list[list[float]] = []
    finals = []
    for lr in (0.125, torch.tensor(0.125, dtype=torch.float64)):
        w = parameter(1.0, -2.0)
        opt = Sassha([w], lr=lr, backend=backend)
        scheduler = SCHEDULERS[name](opt)
        rates.append([])
        for _ in range(6):
            rates[-1].append(float(opt.param_groups[0]["lr"]))
            opt.step(lambda: (w**4).sum())
            scheduler.step()
        assert isinstance(opt.param_groups[0]["lr"], Tensor) == isinstance(lr, Tensor)
        finals.append(w.detach())
    assert len(set(rates[0])) > 1
    torch.testing.assert_close(rates[0], rates[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(finals[0], finals[1], rtol=1e-6, atol=0)


@both_backends
def test_the_learning_rate_of_the_moment_is_used(backend: str) -> None:
    problem = Problem(backend).train(2)
    before = weights(problem.params)
    for group in problem.opt.param_groups:
        group["lr"] = 0.0
    problem.step()
    assert_same(weights(problem.params), before)


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of parameters


@both_backends
@all_styles
def test_parameters_of_several_dtypes_train_together(backend: str, style: str) -> None:
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    params = [parameter(1.0, -2.0, 3.0, dtype=dtype) for dtype in dtypes]
    opt = Sassha(params, lr=0.01, hessian_interval=2, hessian_samples=2, backend=backend)
    for _ in range(5):
        STYLES[style](opt, lambda: sum((p.double() ** 4).sum() for p in params))
    assert opt.skipped_steps == 0
    for param in params[1:]:
        state = opt.state[param]
        assert (state["exp_avg"].dtype, state["exp_hessian"].dtype) == (torch.float32, torch.float32)
        # Each step rounds the weights once, by half an eps, and not always to the same side.
        torch.testing.assert_close(param.double(), params[0], rtol=2 * torch.finfo(param.dtype).eps, atol=0)
    assert opt.state[params[0]]["exp_avg"].dtype == torch.float64


@both_backends
def test_the_default_dtype_has_no_influence(backend: str) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        snapshot = Problem(backend, hessian_samples=2).train(4).snapshot()
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(snapshot["state"], Problem(backend, hessian_samples=2).train(4).snapshot()["state"])


def convolution(backend: str, memory_format: torch.memory_format) -> tuple[nn.Module, Sassha, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 3)).double().to(memory_format=memory_format)
    images = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    opt = Sassha(model.parameters(), lr=0.01, hessian_interval=2, backend=backend)
    return model, opt, lambda: model(images).square().mean()


@both_backends
@all_styles
def test_channels_last_takes_the_same_steps_but_for_the_signs(backend: str, style: str) -> None:
    # Without the Hessian's random signs (their order is that of memory) both layouts compute the same numbers.
    runs = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model, opt, loss = convolution(backend, memory_format)
        opt.param_groups[0].update(betas=(0.9, 0.0), hessian_power=1e-9)
        for _ in range(5):
            STYLES[style](opt, loss)
        assert all(opt.state[p]["exp_avg"].stride() == p.stride() for p in model.parameters())
        assert model[2].weight.is_contiguous(memory_format=memory_format)
        runs.append(weights(model.parameters()))
    torch.testing.assert_close(*runs, rtol=1e-6, atol=1e-9)


@both_backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_converted_before_the_first_step_is_as_if_made_so(backend: str, dtype: torch.dtype) -> None:
    converted = Problem(backend)
    converted.model.to(dtype)
    converted.inputs, converted.targets = converted.inputs.to(dtype), converted.targets.to(dtype)
    assert_same(converted.train(4).snapshot(), Problem(backend, dtype=dtype).train(4).snapshot())


@both_backends
@all_styles
def test_a_model_converted_between_steps_keeps_its_state(backend: str, style: str) -> None:
    problem, single = Problem(backend).train(2), Problem(backend).train(4)
    problem.model.double()
    problem.inputs, problem.targets = problem.inputs.double(), problem.targets.double()
    problem.train(2, style)
    for param, other in zip(problem.params, single.params):
        state, other_state = problem.opt.state[param], single.opt.state[other]
        assert param.dtype == state["exp_avg"].dtype == torch.float64
        assert int(state["step"]) == 4
        assert_same(state["hessian_step"], other_state["hessian_step"])
        torch.testing.assert_close(param.float(), other, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(state["exp_hessian"].float(), other_state["exp_hessian"])


@both_backends
def test_a_part_of_a_model_may_be_converted_between_steps(backend: str) -> None:
    params = [parameter(1.0, -2.0, dtype=torch.bfloat16), parameter(0.1, 0.2, dtype=torch.bfloat16)]
    opt = Sassha(params, lr=0.01, backend=backend)

    def loss() -> Tensor:
        return sum((p.double() ** 4).sum() for p in params)

    opt.step(loss)
    params[1].data = params[1].data.double() + 1e-9  # what bfloat16 cannot hold
    before = weights(params)
    opt.zero_grad()
    loss().backward()
    opt.perturb()
    opt.restore()
    assert_same(weights(params), before)
    opt.step(loss)
    assert [int(opt.state[param]["step"]) for param in params] == [2, 2]
    assert opt.state[params[1]]["exp_avg"].dtype == torch.float64


@both_backends
@pytest.mark.parametrize("perturbed", [True, False])
def test_a_part_of_a_model_may_be_converted_while_the_rest_is_frozen(backend: str, perturbed: bool) -> None:
    large, small = parameter(*range(1, 9), dtype=torch.float32), parameter(1.0, 2.0, dtype=torch.float32)
    opt = Sassha([large, small], lr=0.01, backend=backend)

    def loss() -> Tensor:
        return (large**4).sum() + (small**4).sum()

    opt.step(loss)
    large.requires_grad_(False)
    small.data = small.data.double() + 1e-12
    before = weights([small])
    for steps in (2, 3):
        opt.zero_grad()
        backward(loss(), create_graph=opt.hessian_due)
        if perturbed:
            opt.perturb()
            opt.restore()
            assert_same(weights([small]), before)
            backward(loss(), create_graph=opt.hessian_due)
        opt.step()
        assert int(opt.state[small]["step"]) == steps
        assert opt.state[small]["exp_avg"].dtype == torch.float64
        before = weights([small])


@both_backends
@pytest.mark.parametrize("part", [slice(None), slice(0, 1)], ids=["all", "largest"])
def test_a_model_or_part_of_it_may_change_its_memory_format_between_steps(backend: str, part: slice) -> None:
    moved_model, moved, moved_loss = convolution(backend, torch.contiguous_format)
    model, opt, loss = convolution(backend, torch.contiguous_format)
    opt.step(loss)
    moved.step(moved_loss)
    moved_model[part].to(memory_format=torch.channels_last)
    opt.step(loss)  # a lazy step, which needs no signs
    moved.step(moved_loss)
    for param, other in zip(moved_model.parameters(), model.parameters()):
        torch.testing.assert_close(param, other, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(moved.state[param]["exp_avg"], opt.state[other]["exp_avg"], rtol=1e-9, atol=1e-12)


@both_backends
def test_other_numbers_put_into_param_data_are_taken_over(backend: str) -> None:
    problem, other = Problem(backend).train(2), Problem(backend).train(2)
    for param, same in zip(problem.params, other.params):
        param.data = torch.full_like(param, 0.1)
        same.detach().fill_(0.1)
    assert_same(problem.train(2).snapshot(), other.train(2).snapshot())


# ---------------------------------------------------------------------------------------------------------------------
# Gradients changed by the user


@both_backends
def test_gradients_can_be_clipped_before_either_pass_is_used(backend: str) -> None:
    problem = Problem(backend).train(1)
    before = weights(problem.params)
    problem.opt.zero_grad()
    problem.loss().backward()
    direction = [param.grad.clone() for param in problem.params]
    clip_grad_norm_(problem.params, 1e-3)
    problem.opt.perturb()
    moved = torch.cat([(param.detach() - w).reshape(-1) for param, w in zip(problem.params, before)])
    flat = torch.cat([g.reshape(-1) for g in direction])
    torch.testing.assert_close(moved, 0.2 * flat / flat.norm(), rtol=1e-6, atol=1e-7)
    averages = [problem.opt.state[param]["exp_avg"].clone() for param in problem.params]
    problem.loss().backward()
    clip_grad_norm_(problem.params, 1e-3)
    clipped = [param.grad.clone() for param in problem.params]
    problem.opt.step()
    for param, average, gradient in zip(problem.params, averages, clipped):
        expected = 0.9 * average + 0.1 * gradient
        torch.testing.assert_close(problem.opt.state[param]["exp_avg"], expected)


@both_backends
def test_clipping_in_a_hessian_step_leaves_the_product_whole(backend: str) -> None:
    clipped, plain = Problem(backend), Problem(backend)
    for problem in (clipped, plain):
        problem.loss().backward()
        problem.opt.perturb()
        backward(problem.loss(), create_graph=True)
        if problem is clipped:
            clip_grad_norm_(problem.params, 1e-3)
        problem.opt.step()
    for a, b in zip(clipped.params, plain.params):
        assert_same(clipped.opt.state[a]["exp_hessian"], plain.opt.state[b]["exp_hessian"])
        assert clipped.opt.state[a]["exp_avg"].norm() < 0.01 * plain.opt.state[b]["exp_avg"].norm()


@both_backends
def test_gradients_may_lie_in_other_strides_than_their_parameters(backend: str) -> None:
    w, plain = (nn.Parameter(torch.arange(12.0).reshape(3, 4) / 10) for _ in range(2))
    opts = [Sassha([p], hessian_interval=100, backend=backend) for p in (w, plain)]
    for t in range(3):
        for opt, p in zip(opts, (w, plain)):
            opt.zero_grad()
            if t == 0:
                opt.step(lambda: (p**3).sum())
                continue
            for phase in (opt.perturb, opt.step):
                p.grad = 3 * p.detach() ** 2
                if p is w:
                    p.grad = p.grad.t().contiguous().t()
                    assert not p.grad.is_contiguous()
                phase()
    assert_same(w.detach(), plain.detach())
    assert_same(opts[0].state[w], opts[1].state[plain])

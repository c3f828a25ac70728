"""The defects of the published code, by number as in the README, each turned into a claim that holds here."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sassha_fused import Sassha
from tests.support.problems import (
    BACKENDS,
    STYLES,
    Problem,
    assert_differ,
    assert_same,
    backward,
    continued,
    parameter,
    weights,
)
from tests.support.reference import signs

both_backends = pytest.mark.parametrize("backend", BACKENDS)
all_styles = pytest.mark.parametrize("style", STYLES)


# ---------------------------------------------------------------------------------------------------------------------
# 1


def flat_hessian(problem: Problem, at: Tensor) -> Tensor:
    """The float64 Hessian of the current loss over all parameters, at the point given as one vector."""
    sizes = [param.numel() for param in problem.params]
    names = [name for name, _ in problem.model.named_parameters()]

    def loss(vector: Tensor) -> Tensor:
        parts = [part.view_as(p) for part, p in zip(vector.split(sizes), problem.params, strict=True)]
        outputs = torch.func.functional_call(problem.model, dict(zip(names, parts)), problem.inputs[0])
        return (outputs - problem.targets[0]).square().mean()

    return torch.autograd.functional.hessian(loss, at)


@both_backends
@all_styles
@pytest.mark.parametrize("samples", [1, 3])
def test_1_the_product_is_the_exact_hessian_at_the_perturbed_weights(backend: str, style: str, samples: int) -> None:
    problem = Problem(backend, torch.float64, rho=0.2, betas=(0.9, 0.5), hessian_samples=samples, seed=7)
    start = torch.cat([param.detach().reshape(-1) for param in problem.params])
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(problem.loss(), problem.params)])
    perturbed = start + 0.2 * gradient / gradient.norm()
    probes = [signs(0, start.numel(), 7, 0, sample) for sample in range(samples)]
    at_start, at_perturbed = (
        torch.stack([z * (flat_hessian(problem, point) @ z) for z in probes]).mean(0).abs()
        for point in (start, perturbed)
    )
    problem.step(style)
    estimate = torch.cat([2 * problem.opt.state[param]["exp_hessian"].reshape(-1) for param in problem.params])
    torch.testing.assert_close(estimate, at_perturbed, rtol=1e-11, atol=1e-12 * at_perturbed.max())
    assert (estimate - at_start).norm() > 0.01 * at_start.norm(), "the two points are too close for this test to tell"


# ---------------------------------------------------------------------------------------------------------------------
# 2


@all_styles
def test_2_defaults_construct_and_train(style: str) -> None:
    problem = Problem()
    opt = Sassha(problem.model.parameters())
    before = problem.loss().item()
    for _ in range(25):
        STYLES[style](opt, problem.loss)
    assert problem.loss().item() < 0.8 * before


def test_2_defaults_are_the_published_ones() -> None:
    published = {
        "lr": 0.15,
        "betas": (0.9, 0.999),
        "eps": 1e-4,
        "weight_decay": 0.0,
        "rho": 0.2,
        "adaptive": False,
        "hessian_interval": 10,
        "hessian_warmup": 0,
        "hessian_samples": 1,
        "hessian_batches": None,
        "hessian_power": 0.5,
        "hessian_block": 1,
        "bias_correction": "step",
        "maximize": False,
        "seed": 0,
    }
    assert Sassha([parameter(1.0)]).defaults == published


# ---------------------------------------------------------------------------------------------------------------------
# 4


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.slow
@both_backends
@pytest.mark.parametrize("correction", ["step", "update", "none"])
@pytest.mark.parametrize("stop", range(8))
def test_4_a_resumed_run_is_bitwise_the_uninterrupted_one_from_any_step(
    backend: str, correction: str, stop: int
) -> None:
    options = {"backend": backend, "bias_correction": correction, "hessian_samples": 3, "hessian_warmup": 2}
    whole = Problem(**options)
    whole.train(stop)
    other = continued(whole, through_a_file(whole.opt.state_dict()), **options)
    for _ in range(7):
        whole.step()
        other.step()
        assert_same(other.snapshot()["weights"], whole.snapshot()["weights"])
        assert_same(other.snapshot()["state"], whole.snapshot()["state"])


@both_backends
def test_4_a_run_resumed_before_every_step_is_bitwise_the_uninterrupted_one(backend: str) -> None:
    options = {"backend": backend, "hessian_samples": 2, "dtype": torch.bfloat16}
    whole, other = Problem(**options), Problem(**options)
    for style in ("phase", "closure", "standard") * 3:
        whole.step(style)
        other = continued(other, through_a_file(other.opt.state_dict()), **options)
        other.step(style)
    assert_same(weights(other.params), weights(whole.params))
    assert_same(other.snapshot()["state"], whole.snapshot()["state"])


@both_backends
@pytest.mark.parametrize("stop", range(6))
def test_4_a_resumed_run_goes_on_in_a_schedule_of_which_no_parameter_took_every_step(backend: str, stop: int) -> None:
    def begin() -> tuple[list[nn.Parameter], Sassha]:
        params = [parameter(1.0, -2.0), parameter(3.0)]
        return params, Sassha(params, lr=0.01, hessian_interval=4, hessian_samples=2, backend=backend)

    def step(params: list[nn.Parameter], opt: Sassha, number: int) -> None:
        opt.step(lambda: (params[number % 2] ** 4).sum())

    (params, opt), (others, other) = begin(), begin()
    for number in range(stop):
        step(params, opt, number)
    for param, same in zip(others, params, strict=True):
        param.data.copy_(same.detach())
    other.load_state_dict(through_a_file(opt.state_dict()))
    for number in range(stop, stop + 6):
        step(params, opt, number)
        step(others, other, number)
        assert_same(other.state_dict()["state"], opt.state_dict()["state"])
    assert_same(weights(others), weights(params))


# ---------------------------------------------------------------------------------------------------------------------
# 5


@both_backends
@pytest.mark.parametrize("steps", range(3))
def test_5_a_step_without_perturb_where_rho_is_positive_is_an_error_that_says_so(backend: str, steps: int) -> None:
    problem = Problem(backend)
    problem.train(steps, "phase")
    before = problem.snapshot()
    backward(problem.loss(), create_graph=True)
    with pytest.raises(ValueError, match=r"perturb\(\)"):
        problem.opt.step()
    assert_same(problem.snapshot(), before)
    problem.opt.zero_grad()
    undisturbed = Problem(backend)
    undisturbed.train(steps, "phase")
    for _ in range(3):
        problem.step("phase")
        undisturbed.step("phase")
    assert_same(problem.snapshot(), undisturbed.snapshot())


@both_backends
def test_5_a_step_without_perturb_is_an_error_where_rho_is_positive_in_a_single_group(backend: str) -> None:
    still, moving = parameter(1.0), parameter(2.0)
    opt = Sassha([{"params": [still], "rho": 0.0}, {"params": [moving]}], backend=backend)
    backward((still**2 + moving**2).sum(), create_graph=True)
    with pytest.raises(ValueError, match=r"perturb\(\)"):
        opt.step()


@both_backends
def test_5_a_step_without_perturb_is_a_step_of_radius_zero(backend: str) -> None:
    plain, zero = Problem(backend, rho=0.0), Problem(backend, rho=0.0)
    for _ in range(7):
        backward(plain.loss(), create_graph=plain.opt.hessian_due)
        plain.opt.step()
        plain.opt.zero_grad()
        plain.steps += 1
        zero.step("phase")
        assert_same(weights(plain.params), weights(zero.params))


@both_backends
def test_5_a_step_without_perturb_on_a_linear_loss_has_hessian_zero(backend: str) -> None:
    w = parameter(1.0, 2.0)
    opt = Sassha([w], lr=0.5, eps=1.0, rho=0.0, backend=backend)
    with opt.hessian_pass():
        (3 * w).sum().backward()
    opt.step()
    assert_same(opt.state[w]["exp_hessian"], torch.zeros(2))
    torch.testing.assert_close(w.detach(), torch.tensor([-0.5, 0.5]))


@both_backends
@all_styles
@pytest.mark.parametrize("when", range(5))
def test_5_a_parameter_group_can_be_added_at_any_time(backend: str, style: str, when: int) -> None:
    problem, untouched = Problem(backend), Problem(backend)
    extra = parameter(1.0, -2.0, 3.0)

    def loss() -> Tensor:
        return problem.loss() + (extra**3).sum()

    problem.train(when, style)
    untouched.train(when, style)
    problem.opt.add_param_group({"params": [extra], "lr": 0.01})
    before = problem.snapshot()
    assert_same(before["weights"], untouched.snapshot()["weights"])
    assert_same(before["state"], untouched.snapshot()["state"])
    STYLES[style](problem.opt, loss)
    assert problem.opt.state[extra]["step"] == problem.opt.state[extra]["hessian_step"] == 1
    assert problem.opt.state[problem.params[0]]["step"] == when + 1
    assert (problem.opt.state[extra]["exp_hessian"] > 0).all()


@both_backends
@pytest.mark.parametrize("when", range(5))
def test_5_a_group_added_later_can_be_stepped_without_perturb(backend: str, when: int) -> None:
    problem = Problem(backend, rho=0.0)
    problem.train(when)
    extra = parameter(1.0, -2.0)
    problem.opt.add_param_group({"params": [extra]})
    backward(problem.loss() + (extra**3).sum(), create_graph=problem.opt.hessian_due)
    problem.opt.step()
    assert problem.opt.state[extra]["hessian_step"] == 1


@both_backends
def test_5_a_group_added_between_perturb_and_step_leaves_the_step_as_it_is(backend: str) -> None:
    ends = []
    for added in (False, True):
        problem = Problem(backend)
        problem.train(2, "phase")
        problem.perturb()
        if added:
            problem.opt.add_param_group({"params": [parameter(1.0)]})
        with problem.opt.hessian_pass():
            problem.loss().backward()
        problem.opt.step()
        problem.steps += 1
        ends.append(weights(problem.train(3).params))
    assert_same(*ends)


# ---------------------------------------------------------------------------------------------------------------------
# 6


@both_backends
@all_styles
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_6_a_parameter_that_stops_getting_gradients_is_untouched(backend: str, style: str, stop: int) -> None:
    problem = Problem(backend)
    extra = parameter(0.5, -1.5)
    problem.opt.add_param_group({"params": [extra], "weight_decay": 0.1})
    for _ in range(stop):
        STYLES[style](problem.opt, lambda: problem.loss() + (extra**4).sum())
        problem.steps += 1
    before = [*weights([extra]), {name: value.clone() for name, value in problem.opt.state[extra].items()}]
    problem.train(5, style)
    assert_same([extra.detach(), problem.opt.state[extra]], before)


# ---------------------------------------------------------------------------------------------------------------------
# 7

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear in one parameter": lambda curved, linear: (curved**3).sum() + (2 * linear).sum(),
    "linear in all": lambda curved, linear: (3 * curved).sum() + (2 * linear).sum(),
    "bilinear": lambda curved, linear: (curved * linear.detach()).sum() + linear.sum(),
}


@both_backends
@all_styles
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_7_a_parameter_that_enters_the_loss_linearly_has_hessian_zero(
    backend: str, style: str, samples: int, name: str
) -> None:
    curved, linear = parameter(1.0, 2.0), parameter(3.0, 4.0)
    opt = Sassha([curved, linear], hessian_samples=samples, hessian_interval=2, backend=backend)
    before = weights([curved, linear])
    for _ in range(4):
        STYLES[style](opt, lambda: LOSSES[name](curved, linear))
    assert_same(opt.state[linear]["exp_hessian"], torch.zeros(2))
    assert opt.state[linear]["step"] == 4
    assert opt.state[linear]["hessian_step"] == 3
    assert bool((opt.state[curved]["exp_hessian"] > 0).all()) == (name == "linear in one parameter")
    assert_differ(weights([curved, linear]), before)


@both_backends
@all_styles
def test_7_a_parameter_outside_the_loss_does_not_break_the_hessian_step(backend: str, style: str) -> None:
    problem = Problem(backend)
    unused = parameter(1.0, 2.0)
    problem.opt.add_param_group({"params": [unused], "weight_decay": 0.5})
    problem.train(4, style)
    assert_same(unused.detach(), torch.tensor([1.0, 2.0]))
    alone = Problem(backend)
    alone.train(4, style)
    assert_same(weights(problem.params), weights(alone.params))


# ---------------------------------------------------------------------------------------------------------------------
# 8 (the exact errors: test_gradients.py and test_parameters.py; more closures: test_closures.py)


@both_backends
def test_8_both_kinds_of_closure_work_and_return_the_first_loss(backend: str) -> None:
    for style in ("closure", "standard"):
        problem = Problem(backend)
        for _ in range(4):
            expected = problem.loss().detach()
            assert_same(problem.step(style), expected)


# ---------------------------------------------------------------------------------------------------------------------
# 10


@pytest.mark.slow
@both_backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_10_weights_are_bitwise_unchanged_by_a_thousand_perturbations(backend: str, dtype: torch.dtype) -> None:
    w = nn.Parameter(torch.linspace(-3, 3, 300).to(dtype))
    opt = Sassha([w], rho=0.05, backend=backend)
    before = weights([w])
    gradient = torch.linspace(1, -1, 300).to(dtype)
    for _ in range(1000):
        w.grad = gradient
        opt.perturb()
        assert opt.perturbed
        opt.restore()
    assert_same(weights([w]), before)


# ---------------------------------------------------------------------------------------------------------------------
# 12


class GraphSpy(torch.autograd.Function):
    """The identity; notes for each backward pass whether it builds a graph of its own."""

    built: list[bool]

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        GraphSpy.built.append(torch.is_grad_enabled())
        return gradient.view_as(gradient)


@both_backends
@all_styles
def test_12_a_graph_is_built_in_the_second_pass_of_hessian_steps_only(backend: str, style: str) -> None:
    problem = Problem(backend, hessian_warmup=2)
    GraphSpy.built = []
    for _ in range(7):
        STYLES[style](problem.opt, lambda: GraphSpy.apply(problem.loss()))
        problem.steps += 1
    # The double backward of a Hessian step runs the spy again, without a graph.
    hessian_step, lazy_step = [False, True], [False, False]
    steps = [hessian_step, hessian_step, lazy_step, hessian_step, lazy_step, lazy_step, hessian_step]
    assert GraphSpy.built == [built for step in steps for built in step]


@both_backends
@pytest.mark.parametrize("style", ["closure", "standard"])
def test_12_one_pass_builds_its_graph_on_hessian_steps_only(backend: str, style: str) -> None:
    problem = Problem(backend, hessian_warmup=2, rho=0.0)
    GraphSpy.built = []
    for _ in range(7):
        STYLES[style](problem.opt, lambda: GraphSpy.apply(problem.loss()))
        problem.steps += 1
    assert GraphSpy.built == [True, True, False, True, False, False, True]


@both_backends
@all_styles
def test_12_layers_dropped_at_random_leave_hessian_steps_at_every_kth_step(backend: str, style: str) -> None:
    layers = [parameter(1.0, -2.0) for _ in range(6)]
    opt = Sassha(layers, lr=0.01, hessian_interval=10, backend=backend)
    generator = torch.Generator().manual_seed(0)
    found = []
    for step in range(41):
        # All in the first step, later the first one and a half of the others.
        kept = [p for p in layers if torch.rand((), generator=generator) < 0.5 or p is layers[0] or step == 0]
        GraphSpy.built = []
        STYLES[style](opt, lambda: GraphSpy.apply(sum((p**4).sum() for p in kept)))
        found += [step] * any(GraphSpy.built)
    assert found == [0, 10, 20, 30, 40]


def hooks(params: list[nn.Parameter]) -> list[int]:
    """How many hooks each parameter carries."""
    return [len(p._backward_hooks or ()) + len(p._post_accumulate_grad_hooks or ()) for p in params]


@both_backends
def test_12_reading_hessian_due_tells_of_the_coming_step_and_installs_nothing(backend: str) -> None:
    problem, unread = Problem(backend, hessian_warmup=2), Problem(backend, hessian_warmup=2)
    for due in [True, True, False, True, False, False, True]:
        before = hooks(problem.params)
        assert [problem.opt.hessian_due for _ in range(3)] == [due] * 3
        assert hooks(problem.params) == before
        problem.step("closure")
        unread.step("closure")
    assert_same(problem.snapshot(), unread.snapshot())


# ---------------------------------------------------------------------------------------------------------------------
# 13 (bytes: test_memory.py)


@both_backends
@all_styles
def test_13_a_parameter_has_two_states_of_its_size_and_a_backup(backend: str, style: str) -> None:
    problem = Problem(backend)
    problem.train(4, style)
    for state in problem.opt.state.values():
        assert [name for name, value in state.items() if value.dim() > 0] == ["exp_avg", "exp_hessian"]
        assert set(state) == {"step", "hessian_step", "exp_avg", "exp_hessian"}

"""A part of the model is converted, in place or by swapping tensors: its state follows, numbers and all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.support.kinds import all_styles, assert_clean
from tests.support.problems import Problem, assert_same, single_threaded, weights

one_thread = pytest.fixture(autouse=True)(single_threaded)

PARTS = {"all": slice(0, 3), "first layer": slice(0, 1), "last layer": slice(2, 3)}


@pytest.fixture(params=[False, True], ids=["in place", "swapped"], autouse=True)
def swapping(request: pytest.FixtureRequest) -> Iterator[bool]:
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(request.param)
    yield request.param
    torch.__future__.set_swap_module_params_on_conversion(before)


class Mixed(Problem):
    """Each layer computes in its own dtype."""

    def loss(self) -> torch.Tensor:
        x = self.inputs[self.steps % len(self.inputs)]
        for layer in self.model:
            x = layer(x.to(next(iter(layer.parameters())).dtype) if [*layer.parameters()] else x)
        return (x - self.targets[self.steps % len(self.targets)]).square().mean()


def state_of(problem: Problem) -> list[dict[str, torch.Tensor]]:
    return [{k: v.clone() for k, v in problem.opt.state[param].items()} for param in problem.model.parameters()]


def convert(problem: Problem, part: slice, dtype: torch.dtype) -> None:
    for layer in problem.model[part]:
        layer.to(dtype)
    problem.params = [*problem.model.parameters()]


@all_styles
@pytest.mark.parametrize("gradients", ["none", "used", "new"])
@pytest.mark.parametrize("steps", [1, 3], ids=["lazy", "Hessian"])
@pytest.mark.parametrize("part", PARTS)
def test_state_follows_to_another_dtype(part: str, steps: int, gradients: str, style: str, swapping: bool) -> None:
    problem = Mixed().train(steps, style)
    if gradients != "used":
        problem.opt.zero_grad()
    if gradients == "new":
        problem.loss().backward()
    convert(problem, PARTS[part], torch.float64)
    if gradients == "new" or swapping:  # swapped gradients are others than those that a step has used
        problem.opt.zero_grad()
    before = state_of(problem)
    listed = [param for group in problem.opt.param_groups for param in group["params"]]
    assert all(one is two for one, two in zip(problem.params, listed))

    # The right result: a problem made in these dtypes that loads this state.
    expected = Mixed()
    convert(expected, PARTS[part], torch.float64)
    expected.model.load_state_dict(problem.model.state_dict())
    expected.opt.load_state_dict(problem.opt.state_dict())
    expected.steps = problem.steps
    problem.train(3, style), expected.train(3, style)
    assert_same(weights(problem.params), weights(expected.params))
    assert_same(state_of(problem), state_of(expected))
    assert all(
        not torch.equal(one["exp_avg"].float(), two["exp_avg"].float()) for one, two in zip(state_of(problem), before)
    )
    problem.opt.zero_grad()
    assert_clean(problem.params)


@pytest.mark.parametrize("part", PARTS)
def test_there_and_back_is_as_if_nothing_had_been(part: str) -> None:
    problem = Mixed().train(2)
    convert(problem, PARTS[part], torch.float64)
    convert(problem, PARTS[part], torch.float32)
    problem.opt.zero_grad()
    problem.train(3)
    assert_same(weights(problem.params), weights(Mixed().train(5).params))


@pytest.mark.parametrize("part", PARTS)
def test_a_conversion_with_the_gradients_of_the_coming_step(part: str) -> None:
    problem = Mixed().train(1)
    problem.opt.zero_grad()
    problem.loss().backward()
    convert(problem, PARTS[part], torch.float64)  # takes the gradients along
    problem.opt.perturb()
    problem.loss().backward(create_graph=problem.opt.hessian_due)
    problem.opt.step()
    problem.steps += 1
    plain = Mixed().train(2)
    for one, two in zip(problem.params, plain.params):
        torch.testing.assert_close(one.float(), two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("second_pass", [False, True])
def test_a_conversion_between_the_passes_is_refused_or_right_and_never_loses_w(part: str, second_pass: bool) -> None:
    problem = Mixed().train(1)
    before = weights(problem.params)
    problem.perturb()
    if second_pass:
        problem.loss().backward()
    try:
        convert(problem, PARTS[part], torch.float64)
    except RuntimeError:  # torch refuses to swap what somebody holds
        problem.opt.restore()
        assert_same(weights(problem.params), before)
        return
    if not second_pass:
        problem.loss().backward()
    try:
        problem.opt.step()
    except (ValueError, RuntimeError):
        assert not problem.opt.perturbed
        for one, two in zip(problem.params, before):
            torch.testing.assert_close(one.float(), two, rtol=0, atol=0)
        return
    plain = Mixed().train(2)
    for one, two in zip(problem.params, plain.params):
        torch.testing.assert_close(one.float(), two, rtol=1e-5, atol=1e-6)

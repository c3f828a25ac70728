"""Gradients that lost their graph on the way to a Hessian step: refused, and never taken for zero curvature."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sassha_fused import Sassha
from tests.support.kinds import (
    Net,
    all_styles,
    assert_clean,
    assert_close,
    assert_goes_on,
    assert_states_close,
    by_reference,
    reference_of,
    refused,
)
from tests.support.problems import ALL_STYLES, Problem, assert_same, single_threaded, weights

one_thread = pytest.fixture(autouse=True)(single_threaded)

Change = Callable[[nn.Parameter], None]


def detached(param: nn.Parameter) -> None:
    param.grad = param.grad.detach()


def detached_in_place(param: nn.Parameter) -> None:
    param.grad.detach_()


def copied(param: nn.Parameter) -> None:
    param.grad = param.grad.detach().clone()


def clipped_by_assignment(param: nn.Parameter) -> None:
    param.grad = param.grad.detach().clamp(-1, 1)


def scaled_under_no_grad(param: nn.Parameter) -> None:
    with torch.no_grad():
        param.grad = param.grad * 0.5


def replaced(param: nn.Parameter) -> None:
    param.grad = torch.ones_like(param)


def rounded(param: nn.Parameter) -> None:
    param.grad = param.grad.data.bfloat16().to(param.dtype)


CHANGES = [detached, detached_in_place, copied, clipped_by_assignment, scaled_under_no_grad, replaced, rounded]
each_change = pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
which = pytest.mark.parametrize("which", [slice(0, 1), slice(3, 4), slice(0, 4)], ids=["first", "last", "all"])


def changing(opt: Sassha, loss: Callable[[], Tensor], change: Callable[[], None], style: str) -> None:
    """A step in some style whose second gradients are changed."""
    if style == "closure":

        def closure() -> Tensor:
            value = loss()
            value.backward()
            if opt.perturbed:
                change()
            return value

        opt.step(closure)
        return
    opt.zero_grad()
    loss().backward()
    opt.perturb()
    if style == "phase":
        loss().backward(create_graph=opt.hessian_due)
    else:
        with opt.hessian_pass():
            loss().backward()
    change()
    opt.step()


@which
@each_change
@pytest.mark.parametrize("style", ["closure", "phase", "hessian_pass"])
@pytest.mark.parametrize("steps", [0, 3])
def test_what_takes_the_graph_off_a_gradient_is_refused(steps: int, style: str, change: Change, which: slice) -> None:
    problem = Problem().train(steps)

    def change_some() -> None:
        for param in problem.params[which]:
            change(param)

    with refused(problem, "this is a Hessian step, and the gradient of parameter . of group ., .* lost its graph"):
        changing(problem.opt, problem.loss, change_some, style)
    problem.opt.zero_grad()
    assert_clean(problem.params)
    assert_goes_on(problem)


@each_change
@pytest.mark.parametrize("style", ["closure", "phase", "hessian_pass"])
def test_on_lazy_steps_gradients_are_their_owners(style: str, change: Change) -> None:
    problem = Problem().train(1)
    before = weights(problem.params)
    changing(problem.opt, problem.loss, lambda: [change(p) for p in problem.params] and None, style)
    assert all(not torch.equal(p, b) for p, b in zip(problem.params, before))


# ---------------------------------------------------------------------------------------------------------------------
# Hooks


def hook_that_detaches(param: nn.Parameter) -> None:
    param.register_hook(lambda grad: grad.detach())


def hook_that_clips_under_no_grad(param: nn.Parameter) -> None:
    def clip(grad: Tensor) -> Tensor:
        with torch.no_grad():
            return grad.clamp(-1, 1)

    param.register_hook(clip)


def hook_that_replaces(param: nn.Parameter) -> None:
    param.register_hook(lambda grad: torch.ones_like(grad))


def post_hook_that_detaches(param: nn.Parameter) -> None:
    param.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", p.grad.detach()))


def post_hook_that_clips(param: nn.Parameter) -> None:
    param.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", p.grad.detach().clamp(-1, 1)))


HOOKS = [
    hook_that_detaches,
    hook_that_clips_under_no_grad,
    hook_that_replaces,
    post_hook_that_detaches,
    post_hook_that_clips,
]


@all_styles
@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.__name__)
def test_hooks_that_take_the_graph_off_are_found(hook: Change, at: int, style: str) -> None:
    problem = Problem()
    hook(problem.params[at])
    number = {0: "0 of group 0", 3: "1 of group 1"}[at]
    with refused(problem, f"the gradient of parameter {number}, .* has lost its graph since it arrived"):
        ALL_STYLES[style](problem.opt, problem.loss)


@all_styles
def test_hooks_that_keep_the_graph_change_what_they_say(style: str) -> None:
    mine, theirs = Net(), Net()
    for net in (mine, theirs):
        net[0].weight.register_hook(lambda grad: grad * 0.5)
    opt = Sassha(mine.parameters(), hessian_interval=2, backend="cpu")
    other = Sassha(theirs.parameters(), hessian_interval=2, backend="eager")
    for _ in range(4):
        ALL_STYLES[style](opt, mine.loss)
        other.step(theirs.loss)
    assert_states_close([*mine.parameters()], opt, [*theirs.parameters()], other, 1e-11)


# ---------------------------------------------------------------------------------------------------------------------
# Several backward calls in the second pass


def halves(problem: Problem) -> tuple[Tensor, Tensor]:
    """Two losses whose sum is the problem's."""
    batch = problem.steps % len(problem.inputs)
    errors = (problem.model(problem.inputs[batch]) - problem.targets[batch]).square()
    again = (problem.model(problem.inputs[batch]) - problem.targets[batch]).square()
    return errors[:5].sum() / errors.numel(), again[5:].sum() / errors.numel()


@pytest.mark.parametrize("graphs", [(True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("steps", [0, 3])
def test_each_backward_by_hand_needs_a_graph(steps: int, graphs: tuple[bool, bool]) -> None:
    problem = Problem().train(steps)
    with refused(problem, "this is a Hessian step, and"):
        problem.perturb()
        for part, graph in zip(halves(problem), graphs):
            part.backward(create_graph=graph)
        problem.opt.step()
    assert_goes_on(problem)


@pytest.mark.parametrize("style", ["by hand", "hessian_pass", "each in its own", "closure"])
def test_two_backward_calls_make_the_gradient_of_the_sum(style: str) -> None:
    problem = Problem(dtype=torch.float64)
    for _ in range(7):
        if style == "closure":

            def closure() -> Tensor:
                parts = halves(problem)
                for part in parts:
                    part.backward()
                return sum(parts)

            problem.opt.step(closure)
        else:
            problem.perturb()
            if style == "hessian_pass":
                with problem.opt.hessian_pass():
                    for part in halves(problem):
                        part.backward()
            else:
                for part in halves(problem):
                    with problem.opt.hessian_pass() if style == "each in its own" else torch.enable_grad():
                        part.backward(create_graph=style == "by hand" and problem.opt.hessian_due)
            problem.opt.step()
        problem.steps += 1
    assert_close(problem, by_reference(Problem, 7))


# ---------------------------------------------------------------------------------------------------------------------
# Reentrant checkpoints


class Checkpointed(Net):
    """Blocks, some of them under a checkpoint, whose input may require a gradient."""

    def __init__(self, inside: int, reentrant: bool | None, wanted: bool) -> None:
        super().__init__(*(layer for _ in range(3) for layer in (nn.Linear(5, 5), nn.Tanh())), nn.Linear(5, 3))
        self.inside, self.reentrant = inside, reentrant
        self.inputs.requires_grad_(wanted)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(3):
            block = nn.Sequential(self[2 * i], self[2 * i + 1])
            checkpointed = self.reentrant is not None and i == self.inside
            x = checkpoint(block, x, use_reentrant=self.reentrant) if checkpointed else block(x)
        return self[-1](x)


@all_styles
@pytest.mark.parametrize("inside", [0, 1, 2])
def test_a_reentrant_checkpoint_is_refused_wherever_it_stands(inside: int, style: str) -> None:
    net = Checkpointed(inside, True, wanted=True)
    opt = Sassha(net.parameters(), backend="cpu")
    before = weights(net.parameters())
    with pytest.raises(ValueError, match=r"reentrant checkpoint \(use_reentrant=False works\)"):
        ALL_STYLES[style](opt, net.loss)
    assert_same(weights(net.parameters()), before)
    opt.zero_grad()
    net.reentrant = False
    expected = Checkpointed(inside, None, wanted=False)
    reference = reference_of(Sassha(expected.parameters()))
    for _ in range(2):
        ALL_STYLES[style](opt, net.loss)
        reference.step(expected.loss)
    assert_states_close([*net.parameters()], opt, [*expected.parameters()], reference, 1e-11)


# ---------------------------------------------------------------------------------------------------------------------
# What is right without a graph, or in place


class PartlyLinear(Problem):
    """Its last bias enters linearly."""

    def loss(self) -> Tensor:
        batch = self.steps % len(self.inputs)
        return self.model[:2](self.inputs[batch]).square().mean() + self.params[3].sum()


@all_styles
def test_a_parameter_that_enters_linearly_keeps_a_curvature_of_0(style: str) -> None:
    problem = PartlyLinear(dtype=torch.float64).train(7, style)
    assert_close(problem, by_reference(PartlyLinear, 7))
    assert not problem.opt.state[problem.params[3]]["exp_hessian"].any()
    assert problem.opt.state[problem.params[0]]["exp_hessian"].any()


@all_styles
def test_a_loss_that_is_linear_in_all_parameters_is_no_error(style: str) -> None:
    class Linear(Problem):
        def loss(self) -> Tensor:
            return sum(param.sum() for param in self.params)

    assert_close(Linear(dtype=torch.float64, eps=0.1).train(4, style), by_reference(Linear, 4, eps=0.1))


@pytest.mark.parametrize("style", ["closure", "phase", "hessian_pass"])
def test_clipping_in_place_scales_the_gradient_and_not_the_product(style: str) -> None:
    clipped, whole = Problem(dtype=torch.float64), Problem(dtype=torch.float64)
    changing(clipped.opt, clipped.loss, lambda: nn.utils.clip_grad_norm_(clipped.params, 1e-3) and None, style)
    whole.step()
    for one, two in zip(clipped.params, whole.params):
        mine, theirs = clipped.opt.state[one], whole.opt.state[two]
        assert_same(mine["exp_hessian"], theirs["exp_hessian"])
    largest = max(float(clipped.opt.state[p]["exp_avg"].norm()) for p in clipped.params)
    assert 0 < largest <= 1e-4 * (1 + 1e-6)

"""Losses, gradients and products that are not finite: the step is skipped and leaves no trace."""

import math
import warnings
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
    assert_same,
    backward,
    single_threaded,
    undisturbed,
    weights,
)

one_thread = pytest.fixture(autouse=True)(single_threaded)
both_backends = pytest.mark.parametrize("backend", BACKENDS)
NAN, INF = math.nan, math.inf


class SpoiledProduct(torch.autograd.Function):
    """x -> 0 with gradient 0, whose own gradient is not finite: a product Hz that is not, while gradients are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.zeros((), dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return SpoiledGradient.apply(*ctx.saved_tensors, gradient)


class SpoiledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Tensor) -> Tensor:
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, z: Tensor) -> tuple[Tensor, None]:
        product = torch.zeros_like(z)
        product.view(-1)[-1] = NAN
        return product, None


class SpoiledElement(torch.autograd.Function):
    """x -> 0 with gradient 0 but for one element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: float) -> Tensor:
        ctx.value, ctx.like = value, x
        return torch.zeros((), dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        gradient = torch.zeros_like(ctx.like)
        gradient.view(-1)[-1] = ctx.value
        return gradient, None


SPOILERS: dict[str, Callable[[Problem, Tensor], Tensor]] = {
    "loss and gradients NaN": lambda problem, loss: loss * NAN,
    "loss alone NaN": lambda problem, loss: loss + NAN,
    "loss alone inf": lambda problem, loss: loss + INF,
    "one NaN in the last gradient": lambda problem, loss: loss + SpoiledElement.apply(problem.params[-1], NAN),
    "one -inf in the first gradient": lambda problem, loss: loss + SpoiledElement.apply(problem.params[0], -INF),
    "one NaN in the last product": lambda problem, loss: loss + SpoiledProduct.apply(problem.params[-1]),
    "one NaN in the first product": lambda problem, loss: loss + SpoiledProduct.apply(problem.params[0]),
}


class Mixed(Problem):
    """Parameters of three dtypes in two groups: four buckets."""

    def __init__(self, backend: str) -> None:
        super().__init__(backend, hessian_samples=2)
        self.double = nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64))
        self.bfloat = nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.bfloat16))
        self.opt.add_param_group({"params": [self.double, self.bfloat], "weight_decay": 0.1})
        self.params += [self.double, self.bfloat]

    def loss(self) -> Tensor:
        return super().loss() + (self.double**4).mean().float() + (self.bfloat**2).mean().float()


class OneBucket(Problem):
    """All parameters in one group: one bucket, for which the operators measure and check by themselves."""

    def __init__(self, backend: str) -> None:
        super().__init__(backend)
        self.opt = Sassha(self.params, lr=0.05, hessian_interval=3, backend=backend)


CASES = [
    (kind, spoiler, style, steps, bad_pass)
    for kind in (Mixed, OneBucket)
    for spoiler in SPOILERS
    for style in ("closure", "phase")
    for steps in (0, 1, 3)
    for bad_pass in (0, 1)
    # In phase style the optimizer does not see the loss; products are taken in the second pass of Hessian steps.
    if not (spoiler.startswith("loss alone") and style == "phase")
    and not (spoiler.endswith("product") and (bad_pass == 0 or steps == 1))
]


@pytest.mark.parametrize("backend", ["cpu", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind, spoiler, style, steps, bad_pass", CASES)
def test_a_step_that_is_not_finite_leaves_no_trace(
    backend: str, kind: type[Problem], spoiler: str, style: str, steps: int, bad_pass: int
) -> None:
    problem = kind(backend).train(steps, style)
    before, after = (undisturbed(kind, backend, count) for count in (steps, steps + 4))
    passes = iter(range(2))

    def loss() -> Tensor:
        value = problem.loss()
        return SPOILERS[spoiler](problem, value) if next(passes) == bad_pass else value

    STYLES[style](problem.opt, loss)
    assert next(passes, None) is None
    assert not problem.opt.perturbed
    assert_same(weights(problem.params), before["weights"])
    assert problem.opt.skipped_steps == 1
    assert problem.opt.hessian_due == (steps % 3 == 0)
    if steps:
        assert_same(problem.snapshot()["state"], before["state"])
    result = problem.train(4, style).snapshot()
    for group in result["param_groups"]:
        assert group.pop("skipped_steps") == 1
    assert_same(result, without_skips(after))


@both_backends
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("kind", [Mixed, OneBucket])
def test_a_learning_rate_tensor_into_which_what_is_not_finite_is_written_skips_the_step(
    backend: str, kind: type[Problem], value: float
) -> None:
    problem = kind(backend).train(1)
    lr = problem.opt.param_groups[-1]["lr"] = torch.tensor([0.01])
    problem.step()
    before = weights(problem.params)
    lr.fill_(value)  # the host does not look: on a device it would have to wait
    problem.step()
    assert_same(weights(problem.params), before)
    assert problem.opt.skipped_steps == 1
    lr.fill_(0.01)
    problem.step()
    assert problem.opt.skipped_steps == 1


def without_skips(snapshot: dict[str, Any]) -> dict[str, Any]:
    groups = [{k: v for k, v in group.items() if k != "skipped_steps"} for group in snapshot["param_groups"]]
    return {**snapshot, "param_groups": groups}


@both_backends
@pytest.mark.parametrize("adaptive", [False, True])
def test_skipped_steps_are_counted_one_by_one(backend: str, adaptive: bool) -> None:
    problem = Problem(backend, adaptive=adaptive).train(2)
    before = problem.snapshot()
    for count in range(1, 6):
        problem.opt.step(lambda: problem.loss() * NAN)
        assert problem.opt.skipped_steps == count
    assert_same(problem.snapshot()["state"], before["state"])
    assert_same(weights(problem.params), before["weights"])


@both_backends
def test_a_skip_without_perturb_leaves_no_trace(backend: str) -> None:
    problem = Problem(backend, rho=0.0).train(2)
    before = problem.snapshot()
    problem.opt.zero_grad()
    (problem.loss() * NAN).backward()
    problem.opt.step()
    assert_same(weights(problem.params), before["weights"])
    assert problem.opt.skipped_steps == 1
    assert_same(problem.snapshot()["state"], before["state"])


@both_backends
def test_a_skip_after_an_early_restore_leaves_no_trace(backend: str) -> None:
    problem = Problem(backend).train(3)
    before = problem.snapshot()
    problem.perturb()
    backward(problem.loss() + SpoiledProduct.apply(problem.params[1]), create_graph=True)
    problem.opt.restore()
    problem.opt.step()
    assert_same(weights(problem.params), before["weights"])
    assert problem.opt.skipped_steps == 1
    assert_same(problem.snapshot()["state"], before["state"])


@both_backends
def test_an_overflowing_perturbation_is_skipped(backend: str) -> None:
    w = nn.Parameter(torch.tensor([6e4, 1.0], dtype=torch.float16))
    opt = Sassha([w], rho=1e4, backend=backend)
    before = weights([w])
    opt.step(lambda: (w.float() ** 2).sum())
    assert opt.skipped_steps == 1
    assert_same(weights([w]), before)


@both_backends
def test_a_restart_from_the_state_after_a_skip_goes_on_as_if_it_had_not_been(backend: str) -> None:
    problem, undisturbed = (Problem(backend).train(2) for _ in range(2))
    problem.opt.step(lambda: problem.loss() * NAN)
    other = Problem(backend)
    other.model.load_state_dict(problem.model.state_dict())
    other.opt.load_state_dict(problem.opt.state_dict())
    other.steps = problem.steps
    assert other.opt.skipped_steps == 1
    other.train(4)
    undisturbed.train(4)
    assert_same(weights(other.params), weights(undisturbed.params))
    assert_same(other.snapshot()["state"], undisturbed.snapshot()["state"])


def test_no_warning_is_shown_in_a_skipped_step() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem = Problem()
        problem.opt.step(lambda: problem.loss() * NAN)
    assert problem.opt.skipped_steps == 1

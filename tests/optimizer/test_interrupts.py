"""Whatever breaks a step, the weights come back bit for bit, and training goes on as if the call had not been made."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sassha_fused import Sassha, eager
from tests.support.problems import (
    BACKENDS,
    Problem,
    TwoBuckets,
    assert_differ,
    assert_same,
    backward,
    continued,
    undisturbed,
    weights,
)

both_backends = pytest.mark.parametrize("backend", BACKENDS)
STEPS = pytest.mark.parametrize("steps", [0, 1, 3], ids=["first step", "lazy step", "Hessian step"])
ERRORS = (ValueError, MemoryError, KeyboardInterrupt)


def refused_step(opt: Sassha) -> None:
    """step() where the second gradients are missing, or somebody has given the step up."""
    with contextlib.suppress(ValueError):
        opt.step()


HEALERS: dict[str, Callable[[Sassha], Any]] = {
    "restore": Sassha.restore,
    "step": refused_step,
    "state_dict": Sassha.state_dict,
}


class Raises(torch.autograd.Function):
    """The identity, until its backward, or the backward of that, is run."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, error: BaseException, twice: bool) -> Tensor:
        ctx.error, ctx.twice = error, twice
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if not ctx.twice:
            raise ctx.error
        return Raises.apply(gradient, ctx.error, False), None, None


def in_forward(loss: Tensor, error: BaseException) -> Tensor:
    raise error


def in_backward(loss: Tensor, error: BaseException) -> Tensor:
    return Raises.apply(loss, error, False)


def in_double_backward(loss: Tensor, error: BaseException) -> Tensor:
    return Raises.apply(loss, error, True).square()


PLACES = {"forward": in_forward, "backward": in_backward}


# ---------------------------------------------------------------------------------------------------------------------
# Errors in the user's code


@both_backends
@STEPS
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("bad_pass", [0, 1])
@pytest.mark.parametrize("place", PLACES)
def test_an_error_in_a_closure_leaves_no_trace(
    backend: str, steps: int, error: type[BaseException], bad_pass: int, place: str
) -> None:
    problem = Problem(backend).train(steps)
    before = weights(problem.params)
    passes = iter(range(2))
    with pytest.raises(error):
        problem.opt.step(lambda: PLACES[place](problem.loss(), error()) if next(passes) == bad_pass else problem.loss())
    assert_same(weights(problem.params), before)
    assert not problem.opt.perturbed
    assert all(param.grad is None for param in problem.params)
    assert_same(problem.train(4).snapshot(), undisturbed(Problem, backend, steps + 4))


@both_backends
@STEPS
@pytest.mark.parametrize("heal", HEALERS)
@pytest.mark.parametrize("place", PLACES)
def test_an_error_in_a_hand_written_loop_is_healed_by_the_next_call(
    backend: str, steps: int, heal: str, place: str
) -> None:
    problem = Problem(backend).train(steps)
    before = weights(problem.params)
    problem.perturb()
    assert_differ(weights(problem.params), before)
    with pytest.raises(KeyboardInterrupt):
        PLACES[place](problem.loss(), KeyboardInterrupt()).backward(create_graph=problem.opt.hessian_due)
    HEALERS[heal](problem.opt)
    assert_same(weights(problem.params), before)
    assert_same(problem.train(4, "phase").snapshot(), undisturbed(Problem, backend, steps + 4))


@both_backends
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("samples", [1, 2])
def test_an_error_in_the_hessian_product_leaves_no_trace(
    backend: str, steps: int, error: type[BaseException], samples: int
) -> None:
    problem, plain = (Problem(backend, hessian_samples=samples).train(steps) for _ in range(2))
    before = weights(problem.params)
    with pytest.raises(error):
        problem.opt.step(lambda: in_double_backward(problem.loss(), error()))
    assert_same(weights(problem.params), before)
    assert_same(problem.train(4).snapshot(), plain.train(4).snapshot())


@both_backends
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("heal", HEALERS)
@pytest.mark.parametrize("first", ["step", "restore", "state_dict"])
def test_a_failed_hessian_product_in_a_hand_written_loop_is_healed_by_the_next_call(
    backend: str, steps: int, heal: str, first: str
) -> None:
    problem = Problem(backend).train(steps)
    before = weights(problem.params)
    problem.perturb()
    backward(in_double_backward(problem.loss(), MemoryError()), create_graph=True)
    with contextlib.suppress(MemoryError) if first != "step" else pytest.raises(MemoryError):
        HEALERS[first](problem.opt)
    if first != "step":
        assert_same(weights(problem.params), before)
    problem.opt.zero_grad()
    HEALERS[heal](problem.opt)
    assert_same(weights(problem.params), before)
    assert_same(problem.train(4, "phase").snapshot(), undisturbed(Problem, backend, steps + 4))


@both_backends
def test_a_state_dict_can_be_saved_right_after_a_hessian_product_ran_out_of_memory(backend: str) -> None:
    problem = Problem(backend).train(3)
    before = problem.snapshot()
    problem.perturb()
    backward(in_double_backward(problem.loss(), MemoryError()), create_graph=True)
    with pytest.raises(MemoryError):
        problem.opt.step()
    state = problem.opt.state_dict()
    assert_same(weights(problem.params), before["weights"])
    assert_same(state["state"], before["state"])


def test_a_function_without_double_backward_is_reported_and_leaves_no_trace() -> None:
    problem = Problem()
    before = weights(problem.params)

    def distances() -> Tensor:
        x = problem.loss() * torch.arange(6.0).reshape(3, 2)
        return torch.cdist(x, x + 1).sum()

    with pytest.raises(RuntimeError, match=r"derivative for .*cdist.* is not implemented"):
        problem.opt.step(distances)
    assert_same(weights(problem.params), before)
    assert_same(problem.train(4).snapshot(), undisturbed(Problem, "cpu", 4))


# ---------------------------------------------------------------------------------------------------------------------
# Errors in the operators


class Breakdown(Exception):
    """What a broken operator raises."""


@contextlib.contextmanager
def breaking(function: str, call: int, before: bool = True) -> Iterator[None]:
    """The function of the eager backend raises in its call-th call, before or after its work."""
    original = getattr(eager, function)
    calls = iter(range(1000))

    def broken(*args: Any) -> Any:
        now = next(calls) == call
        if now and before:
            raise Breakdown
        result = original(*args)
        if now:
            raise Breakdown
        return result

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Breakdown):
        patch.setattr(eager, function, broken)
        yield


# Each pass calls each operator twice: there are two buckets.
BEFORE_ANY_UPDATE = [
    ("grad_norm", 0, True),
    ("grad_norm", 1, False),
    ("grad_norm", 2, False),
    ("perturb_", 0, True),
    ("perturb_", 1, True),
    ("rademacher_", 1, True),
    ("hutchinson_", 3, False),
    ("update_", 0, True),
]


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name, call, before", BEFORE_ANY_UPDATE)
def test_an_operator_that_breaks_leaves_no_trace(steps: int, name: str, call: int, before: bool) -> None:
    if steps == 1 and name in ("rademacher_", "hutchinson_"):
        return  # lazy steps do not call them
    problem, plain = (TwoBuckets("eager", hessian_samples=2).train(steps) for _ in range(2))
    start = weights(problem.params)
    with breaking(name, call, before):
        problem.step()
    assert_same(weights(problem.params), start)
    assert_same(problem.train(4).snapshot(), plain.train(4).snapshot())


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("heal", ["restore", "state_dict"])
@pytest.mark.parametrize("name, call, before", BEFORE_ANY_UPDATE[3:])
def test_an_operator_that_breaks_in_a_hand_written_loop_is_healed(
    steps: int, heal: str, name: str, call: int, before: bool
) -> None:
    if steps == 1 and name in ("rademacher_", "hutchinson_"):
        return  # lazy steps do not call them
    problem, plain = (TwoBuckets("eager", hessian_samples=2).train(steps) for _ in range(2))
    start = weights(problem.params)
    with breaking(name, call, before):
        problem.step("phase")
    with contextlib.suppress(RuntimeError):  # the product may be gone; the weights must not be
        HEALERS[heal](problem.opt)
    assert_same(weights(problem.params), start)
    assert_same(problem.train(4, "phase").snapshot(), plain.train(4, "phase").snapshot())


@pytest.mark.parametrize("style", ["closure", "phase"])
@pytest.mark.parametrize("steps", [1, 3])
def test_running_out_of_memory_anywhere_in_an_operator_leaves_the_weights_restored(style: str, steps: int) -> None:
    problem = Problem("eager").train(steps)
    start = weights(problem.params)
    parts = 4 + 3 * 4  # what eager works on: 4 backups in perturb_, and 3 views for each of 4 parameters in update_
    for call in range(parts):
        with breaking("view_of", call):
            problem.step(style)
        if style == "phase":
            problem.opt.restore()
        assert_same(weights(problem.params), start, f"call {call}")
    problem.step(style)
    assert_differ(weights(problem.params), start)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("call, before", [(0, False), (1, True)])
def test_a_break_between_two_updates_restores_the_weights_and_keeps_the_counts_in_step(
    steps: int, call: int, before: bool
) -> None:
    problem = TwoBuckets("eager").train(steps)
    start = weights(problem.params)
    with breaking("update_", call, before):
        problem.step()
    assert_same(weights(problem.params), start)
    # What is in the state is what the schedule follows: a restart from it goes the same way.
    restarted = continued(problem, problem.opt.state_dict(), kind=TwoBuckets, backend="eager")
    assert_same(problem.train(4).snapshot()["state"], restarted.train(4).snapshot()["state"])
    assert_same(weights(problem.params), weights(restarted.params))


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("call, before", [(0, False), (1, True), (1, False)])
def test_a_break_between_two_updates_restores_weights_that_were_at_w(call: int, before: bool, restored: bool) -> None:
    problem = TwoBuckets("eager", rho=0.2 if restored else 0.0).train(1)
    start = weights(problem.params)
    problem.opt.zero_grad()
    problem.loss().backward()
    if restored:
        problem.opt.perturb()
        backward(problem.loss(), create_graph=problem.opt.hessian_due)
        problem.opt.restore()
    with breaking("update_", call, before):
        problem.opt.step()
    assert_same(weights(problem.params), start)
    state = problem.opt.state_dict()["state"]
    problem.opt.zero_grad()
    problem.train(1)
    assert [int(problem.opt.state[param]["step"]) for param in problem.params] == [
        int(s["step"]) + 1 for s in state.values()
    ]


@both_backends
@pytest.mark.parametrize("name, value", [("lr", None), ("weight_decay", "a"), ("betas", (0.9, None)), ("rho", None)])
def test_a_hyperparameter_spoilt_between_steps_is_named_before_anything_changes(
    backend: str, name: str, value: Any
) -> None:
    problem = Problem(backend).train(1)
    good, before = problem.opt.param_groups[1][name], problem.snapshot()
    problem.opt.param_groups[1][name] = value
    with pytest.raises((TypeError, ValueError), match=name):
        problem.step()
    problem.opt.param_groups[1][name] = good
    assert_same(problem.snapshot(), before)
    assert_same(problem.train(3).snapshot(), undisturbed(Problem, backend, 4))


@both_backends
def test_running_out_of_memory_for_the_state_can_be_mended(backend: str) -> None:
    for call in range(6):
        problem = Problem(backend)
        calls = iter(range(1000))
        original = torch.zeros

        def scarce(*args: Any, **options: Any) -> Tensor:
            if next(calls) == call:
                raise MemoryError
            return original(*args, **options)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(torch, "zeros", scarce)
            problem.step()
        assert_same(problem.train(4).snapshot(), undisturbed(Problem, backend, 4))


def test_an_optimizer_in_trouble_can_be_dropped() -> None:
    w = nn.Parameter(torch.ones(3))
    opt = Sassha([w])
    (w**3).sum().backward()
    opt.perturb()
    del opt
    other = Sassha([w])
    other.step(lambda: (w**3).sum())
    assert other.state[w]["step"] == 1

"""Closures: what they may return and do, and what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.problems import (
    ALL_STYLES,
    BACKENDS,
    Problem,
    assert_same,
    backward,
    naming,
    refused,
    single_threaded,
    undisturbed,
    weights,
)

one_thread = pytest.fixture(autouse=True)(single_threaded)
both_backends = pytest.mark.parametrize("backend", BACKENDS)


BAD_RESULTS: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "nothing": (lambda loss: None, TypeError, "closure must return.*None"),
    "a float": (lambda loss: loss.item(), TypeError, r"closure must return.*\d\.\d"),
    "a tuple": (lambda loss: (loss, loss), TypeError, r"closure must return.*\(tensor"),
    "a vector": (lambda loss: loss.expand(3), ValueError, r"scalar.*\(3,\)"),
    "an empty tensor": (lambda loss: loss.expand(0), ValueError, r"scalar.*\(0,\)"),
    "a detached loss": (lambda loss: loss.detach(), ValueError, "requires grad"),
}


@both_backends
@pytest.mark.parametrize("bad_pass", [0, 1])
@pytest.mark.parametrize("result", BAD_RESULTS)
def test_a_closure_that_returns_no_loss_is_refused(backend: str, bad_pass: int, result: str) -> None:
    spoil, error, message = BAD_RESULTS[result]
    passes = iter(range(2))
    problem = Problem(backend).train(3)
    with refused(problem, error, message):
        problem.opt.step(lambda: spoil(problem.loss()) if next(passes) == bad_pass else problem.loss())


@pytest.mark.parametrize("closure", [3, "loss", torch.tensor(1.0)])
def test_a_closure_that_cannot_be_called_is_refused(closure: Any) -> None:
    problem = Problem().train(2)
    with refused(problem, TypeError, naming("closure", closure)):
        problem.opt.step(closure)


@both_backends
def test_a_loss_of_one_element_and_any_shape_is_a_scalar(backend: str) -> None:
    problem = Problem(backend)
    for _ in range(4):
        assert problem.opt.step(lambda: problem.loss().reshape(1, 1)).numel() == 1
        problem.steps += 1
    assert_same(problem.snapshot(), undisturbed(Problem, backend, 4))


@both_backends
@pytest.mark.parametrize("dtype", [torch.int64, torch.float16])
def test_what_a_standard_closure_returns_may_have_any_dtype(backend: str, dtype: torch.dtype) -> None:
    problem = Problem(backend)

    def closure() -> Tensor:
        loss = problem.loss()
        backward(loss, create_graph=problem.opt.hessian_due)
        return (1000 * loss).to(dtype)

    for _ in range(4):
        assert problem.opt.step(closure).dtype == dtype
        problem.steps += 1
    assert_same(problem.snapshot(), undisturbed(Problem, backend, 4))


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
def test_gradients_from_elsewhere_are_not_dropped_but_refused(backend: str, style: str) -> None:
    problem = Problem(backend)
    for steps in range(3):
        problem.step(style)
        before = weights(problem.params)
        problem.opt.zero_grad()
        (100 * problem.loss()).backward()
        gradients = [param.grad.clone() for param in problem.params]
        with pytest.raises(ValueError, match=r"(?s)gradients that it would drop.*zero_grad\(\)"):
            ALL_STYLES[style](problem.opt, problem.loss)
        assert problem.steps == steps + 1
        assert_same(weights(problem.params), before)
        assert_same([param.grad for param in problem.params], gradients)
        problem.opt.zero_grad()
    assert_same(problem.snapshot(), undisturbed(Problem, backend, 3))

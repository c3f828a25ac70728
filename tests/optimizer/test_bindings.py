"""Closures that are kept for a second pass: a variable that has changed meanwhile is found, and nothing else is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sassha_fused import AdaHessian, Sassha
from tests.support.problems import assert_same, single_threaded, weights

one_thread = pytest.fixture(autouse=True)(single_threaded)

batch: Any = None  # a script's own variables
calls = 0


class Fit:
    """A vector that is fitted to three batches."""

    def __init__(self, kind: Any = Sassha) -> None:
        self.w = nn.Parameter(torch.linspace(-1, 1, 4, dtype=torch.float64))
        self.opt = kind([self.w], lr=0.05, backend="cpu")
        generator = torch.Generator().manual_seed(1)
        self.batches = [torch.randn(4, generator=generator, dtype=torch.float64) for _ in range(3)]

    def loss(self, values: Tensor) -> Tensor:
        return (self.w * values).cos().sum() + self.w.exp().sum()


def by_list(fit: Fit) -> None:
    fit.opt.step([functools.partial(fit.loss, values) for values in fit.batches])


def assert_right(way: Callable[[Fit], None], kind: Any = Sassha) -> None:
    found, expected = Fit(kind), Fit(kind)
    for _ in range(2):
        way(found)
        by_list(expected)
        for fit in (found, expected):
            fit.opt.zero_grad()
    assert_same(weights([found.w]), weights([expected.w]))


def assert_refused(way: Callable[[Fit], None], name: str) -> None:
    fit = Fit()
    before = weights([fit.w])
    with pytest.raises(ValueError, match=f"reads '{name}', which has changed since.*lambda {name}={name}: "):
        way(fit)
    assert_same(weights([fit.w]), before)
    assert not fit.opt.perturbed and fit.w.grad is None


# ---------------------------------------------------------------------------------------------------------------------
# Found


def a_lambda(fit: Fit) -> None:
    for values in fit.batches[:-1]:
        fit.opt.accumulate(lambda: fit.loss(values))
    fit.opt.step(lambda: fit.loss(fit.batches[-1]))


def an_index(fit: Fit) -> None:
    for i in range(3):
        if i < 2:
            fit.opt.accumulate(lambda: fit.loss(fit.batches[i]))
        else:
            fit.opt.step(lambda: fit.loss(fit.batches[i]))


def a_function(fit: Fit) -> None:
    for values in fit.batches[:-1]:

        def closure() -> Tensor:
            loss = fit.loss(values)
            loss.backward()
            return loss

        fit.opt.accumulate(closure)
    fit.opt.step(functools.partial(fit.loss, fit.batches[-1]))


def a_global(fit: Fit) -> None:
    global batch
    for batch in fit.batches[:-1]:
        fit.opt.accumulate(lambda: fit.loss(batch))
    fit.opt.step(lambda: fit.loss(fit.batches[-1]))


def a_comprehension(fit: Fit) -> None:
    for values in fit.batches[:-1]:
        fit.opt.accumulate(lambda: sum(fit.loss(values) / 2 for _ in range(2)))
    fit.opt.step(lambda: fit.loss(fit.batches[-1]))


def a_nested_function(fit: Fit) -> None:
    for values in fit.batches[:-1]:

        def closure() -> Tensor:
            def inner() -> Tensor:
                return (lambda: fit.loss(values))()

            return inner()

        fit.opt.accumulate(closure)
    fit.opt.step(lambda: fit.loss(fit.batches[-1]))


def a_global_of_a_nested_function(fit: Fit) -> None:
    global batch
    for batch in fit.batches[:-1]:
        fit.opt.accumulate(lambda: (lambda: fit.loss(batch))())
    fit.opt.step(lambda: fit.loss(fit.batches[-1]))


def an_assignment(fit: Fit) -> None:
    values: Any = None
    closures = [lambda: fit.loss(values)]
    values = fit.batches[0]
    fit.opt.accumulate(closures[0])
    values = fit.batches[1]
    fit.opt.step(lambda: fit.loss(fit.batches[2]))


@pytest.mark.parametrize(
    "way, name",
    [
        (a_lambda, "values"),
        (an_index, "i"),
        (a_function, "values"),
        (a_global, "batch"),
        (a_comprehension, "values"),
        (a_nested_function, "values"),
        (a_global_of_a_nested_function, "batch"),
        (an_assignment, "values"),
    ],
)
def test_a_variable_that_has_changed_since_the_first_pass_is_found(way: Callable[[Fit], None], name: str) -> None:
    assert_refused(way, name)


def test_one_that_is_gone_is_the_closures_own_error() -> None:
    fit = Fit()
    values = fit.batches[0]
    fit.opt.accumulate(lambda: fit.loss(values))  # noqa: F821
    del values
    with pytest.raises(NameError, match="values"):
        fit.opt.step(lambda: fit.loss(fit.batches[1]))
    assert not fit.opt.perturbed


# ---------------------------------------------------------------------------------------------------------------------
# Right


def a_partial(fit: Fit) -> None:
    for values in fit.batches[:-1]:
        fit.opt.accumulate(functools.partial(fit.loss, values))
    fit.opt.step(functools.partial(fit.loss, fit.batches[-1]))


def a_default(fit: Fit) -> None:
    for values in fit.batches[:-1]:
        fit.opt.accumulate(lambda values=values: fit.loss(values))
    fit.opt.step(lambda: fit.loss(fit.batches[-1]))


def a_function_that_makes_closures(fit: Fit) -> None:
    def closure_of(values: Tensor) -> Callable[[], Tensor]:
        return lambda: fit.loss(values)

    for values in fit.batches[:-1]:
        fit.opt.accumulate(closure_of(values))
    fit.opt.step(closure_of(fit.batches[-1]))


def an_object(fit: Fit) -> None:
    class Closure:
        def __init__(self, values: Tensor) -> None:
            self.values = values

        def __call__(self) -> Tensor:
            return fit.loss(self.values)

    for values in fit.batches[:-1]:
        fit.opt.accumulate(Closure(values))
    fit.opt.step(Closure(fit.batches[-1]))


def the_last_may_read_the_loops_variable(fit: Fit) -> None:
    for values in fit.batches:
        if values is fit.batches[-1]:
            fit.opt.step(lambda: fit.loss(values))
        else:
            fit.opt.accumulate(functools.partial(fit.loss, values))


def a_counter_of_its_own(fit: Fit) -> None:
    global calls
    count = 0

    def closure_of(values: Tensor) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            global calls
            nonlocal count

            def tell() -> None:
                nonlocal count
                count += 1

            tell()
            calls += 1
            return fit.loss(values)

        return closure

    for values in fit.batches[:-1]:
        fit.opt.accumulate(closure_of(values))
    calls, count = 0, 0
    fit.opt.step(closure_of(fit.batches[-1]))
    assert count == calls == 4


def equal_numbers_and_names(fit: Fit) -> None:
    scale, name = float("1000.5"), "".join(["lo", "ss"])
    closures = [lambda v=v: getattr(fit, name)(v) * (scale / 1000.5) for v in fit.batches]
    for closure in closures[:-1]:
        fit.opt.accumulate(closure)
    scale, name = float("1000.50"), "".join(["l", "oss"])
    fit.opt.step(closures[-1])


@pytest.mark.parametrize(
    "way",
    [
        a_partial,
        a_default,
        a_function_that_makes_closures,
        an_object,
        the_last_may_read_the_loops_variable,
        a_counter_of_its_own,
        equal_numbers_and_names,
    ],
)
def test_closures_that_see_their_own_micro_batch_are_taken(way: Callable[[Fit], None]) -> None:
    assert_right(way)


def test_a_step_of_one_pass_needs_no_second_look() -> None:
    assert_right(a_lambda, AdaHessian)

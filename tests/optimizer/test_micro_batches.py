"""A step in several micro-batches is that of the one large batch, for every member, kind of step and style."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.kinds import assert_clean, reference_of
from tests.support.micro_batches import (
    KINDS,
    STYLES,
    Batches,
    Loss,
    assert_equal_to_rounding,
)
from tests.support.problems import assert_differ, assert_same, single_threaded, weights

one_thread = pytest.fixture(autouse=True)(single_threaded)
each_style = pytest.mark.parametrize("style", STYLES)
# The ways through a step: two passes; one, along the momentum or at w; and two without a Hessian.
ONE_OF_EACH = ["Sassha", "MSassha", "AdaHessian", "SAMAdamW"]
each_way = pytest.mark.parametrize("kind", ONE_OF_EACH)
ONE_OF_EACH_IS_QUICK = [pytest.param(k, marks=() if k in ONE_OF_EACH else pytest.mark.slow) for k in KINDS]


def assert_equal(micro: Batches, whole: Batches) -> None:
    assert_equal_to_rounding(micro.snapshot(), whole.snapshot())


@each_style
@pytest.mark.parametrize("kind", ONE_OF_EACH_IS_QUICK)
def test_micro_batches_take_the_step_of_the_batch(kind: str, style: str) -> None:
    micro, whole = Batches(kind), Batches(kind)
    before = weights(micro.params[:7])
    for _ in range(5):  # Hessian, lazy, lazy, Hessian, lazy
        loss, expected = micro.step(style), whole.step_of_whole()
        assert_equal_to_rounding(loss.reshape(1), expected.reshape(1))
        assert_equal(micro, whole)
    assert_differ(micro.params[:7], before)
    micro.opt.zero_grad()
    assert_clean([*micro.params, micro.outside])


@pytest.mark.parametrize("style", ["list", "accumulate", "list of standard closures"])
@pytest.mark.parametrize("options", [{}, {"hessian_samples": 2, "adaptive": True}], ids=["", "samples, adaptive"])
def test_they_take_the_step_of_the_reference(options: dict[str, Any], style: str) -> None:
    micro, by_reference = Batches(**options), Batches(**options)
    by_reference.opt = reference_of(by_reference.opt)
    for _ in range(5):
        micro.step(style), by_reference.step_of_whole()
    assert_equal_to_rounding(weights(micro.params), weights(by_reference.params), 1e-11)
    for mine, theirs in zip(micro.params, by_reference.params):
        for name, value in by_reference.opt.state.get(theirs, {}).items():
            found = torch.as_tensor(micro.opt.state[mine][name])
            assert_equal_to_rounding(found, torch.as_tensor(value).to(found.dtype), 1e-11, name)


@pytest.mark.parametrize("take", [lambda opt, loss: opt.step([loss]), lambda opt, loss: opt.step((loss,))])
@each_way
def test_one_micro_batch_is_a_plain_step_bit_for_bit(kind: str, take: Callable[[Any, Loss], Tensor]) -> None:
    alone, plain = Batches(kind), Batches(kind)
    for _ in range(4):
        loss, expected = take(alone.opt, alone.whole), plain.step_of_whole()
        alone.steps += 1
        assert_same(loss, expected)
    assert_same(alone.snapshot(), plain.snapshot())


@pytest.mark.parametrize("join_with", [0, 3], ids=["first", "last"])
@pytest.mark.parametrize("kind", ["Sassha", "MSassha", "AdaHessian", "SophiaH", "Sassha with samples"])
def test_a_parameter_that_joins_in_one_micro_batch_of_a_lazy_step_brings_the_products_of_all(
    kind: str, join_with: int
) -> None:
    micro, whole = Batches(kind), Batches(kind)
    for problem in (micro, whole):
        late = problem.params[-1]
        loss_of = problem.loss_of

        def joined(step: int, part: int, loss_of: Any = loss_of, late: Tensor = late) -> Loss:
            loss = loss_of(step, part)
            return (lambda: loss() + (late**2).sum().exp() / 100) if step >= 2 and part == join_with else loss

        problem.loss_of = joined  # type: ignore[method-assign]
    for _ in range(5):  # Hessian, lazy, joined, Hessian, lazy
        micro.step(), whole.step_of_whole()
        assert_equal(micro, whole)
    assert int(micro.opt.state[micro.params[-1]]["hessian_step"]) == 2


def test_a_graph_in_vain_is_counted_by_steps() -> None:
    micro = Batches("MSassha", hessian_interval=100)  # of its parameters one never has a gradient
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        micro.inputs, micro.targets = micro.inputs.repeat(2, 1, 1, 1), micro.targets.repeat(2, 1, 1, 1)
        for step in range(21):
            assert not caught, step
            micro.step()
    assert ["steps have built a graph" in str(warning.message) for warning in caught] == [True]

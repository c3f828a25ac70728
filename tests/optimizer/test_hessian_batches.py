"""hessian_batches=n: the estimate is M/n times the sum of the products of the first n of M micro-batches."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sassha_fused import AdaHessian, MSassha, Sassha, SophiaH
from sassha_fused.curvature import exact
from tests.support.micro_batches import STYLES, Batches, assert_equal_to_rounding
from tests.support.problems import assert_same, single_threaded, weights

one_thread = pytest.fixture(autouse=True)(single_threaded)
each_kind = pytest.mark.parametrize("kind", ["Sassha", "MSassha", "AdaHessian", "SophiaH", "Sassha with samples"])
TAKING_PRODUCTS = [Sassha, MSassha, AdaHessian, SophiaH]
each_member = pytest.mark.parametrize("member", TAKING_PRODUCTS, ids=lambda member: member.__name__)


def used_by_the_first(problem: Batches) -> Batches:
    """The same without what later micro-batches alone use."""
    loss_of = problem.loss_of
    problem.loss_of = lambda step, part: loss_of(step, part if part % 2 == 0 else 2)  # type: ignore[method-assign]
    return problem


def step_by_products_of(problem: Batches, count: int) -> None:
    """A step of the whole batch whose products are those of a few micro-batches, from gradients of their own."""

    def products(params: Sequence[Tensor], _: Any, signs: Sequence[Tensor], keep_graph: bool) -> list[Tensor]:
        with torch.enable_grad():
            loss = sum(loss() for loss in problem.losses()[:count])
            grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True, materialize_grads=True)
            inner = sum((grad * z).sum() for grad, z in zip(grads, signs))
        found = torch.autograd.grad(inner, params, allow_unused=True, materialize_grads=True, retain_graph=True)
        return [product * (problem.parts / count) for product in found]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(exact.SOURCES, "autograd", exact.HessianSource(products, needs_graph=False))
        problem.step_of_whole()


@each_kind
@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("style", ["list of every kind", "accumulate every kind"])
def test_products_come_from_the_first_micro_batches_alone(style: str, count: int, kind: str) -> None:
    few, reference = (used_by_the_first(Batches(kind, **options)) for options in ({"hessian_batches": count}, {}))
    for _ in range(4):
        few.step(style)
        step_by_products_of(reference, min(count, 4))
    found, expected = few.snapshot(), reference.snapshot()
    assert [group.pop("hessian_batches") for group in found["param_groups"]] == [count] * 3
    assert [group.pop("hessian_batches") for group in expected["param_groups"]] == [None] * 3
    assert_equal_to_rounding(found, expected)


def test_the_others_build_no_graph() -> None:
    problem = used_by_the_first(Batches(hessian_batches=2))
    seen: list[bool] = []

    def closure_of(loss: Any) -> Any:
        def closure() -> Tensor:
            value = loss()
            value.backward()
            seen.append(problem.model[2].bias.grad.requires_grad)
            return value

        return closure

    problem.opt.step([closure_of(loss) for loss in problem.losses()])
    assert seen == [False] * 4 + [True] * 2 + [False] * 2


def test_one_batch_and_phases_do_not_ask() -> None:
    for style in ("phases", None):
        one, other = Batches(hessian_batches=1), Batches()
        for problem in (one, other):
            for _ in range(4):
                problem.step(style) if style else problem.step_of_whole()
        assert_same(one.snapshot()["weights"], other.snapshot()["weights"])


@pytest.mark.parametrize("style", ["list", "accumulate"])
def test_a_first_curvature_that_would_be_0_is_refused(style: str) -> None:
    problem = Batches(hessian_batches=1)  # the second micro-batch uses a parameter that the first does not
    before = weights(problem.params)
    with pytest.raises(ValueError, match=r"hessian_batches=1.*none of the first 1.*parameter 0 of group 2, \(3, 2\)"):
        STYLES[style](problem, problem.losses())
    assert_same(weights(problem.params), before)
    for group in problem.opt.param_groups:
        group["hessian_batches"] = None
    assert_same(problem.train(3).snapshot(), Batches().train(3).snapshot())


def test_a_later_one_counts_as_0() -> None:
    problem = Batches().train(3)
    for group in problem.opt.param_groups:
        group["hessian_batches"] = 1
    before = problem.opt.state[problem.of_some]["exp_hessian"].clone()
    problem.step()
    expected = problem.opt.param_groups[2]["betas"][1] * before
    torch.testing.assert_close(problem.opt.state[problem.of_some]["exp_hessian"], expected, rtol=1e-14, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Its values

BAD = [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError), ("2", TypeError)]


@each_member
@pytest.mark.parametrize("value, error", BAD)
def test_bad_values_are_refused_at_construction(value: Any, error: type[Exception], member: Any) -> None:
    with pytest.raises(error, match=f"hessian_batches must be .*got {value!r}"):
        member([nn.Parameter(torch.ones(2))], hessian_batches=value)


@pytest.mark.parametrize("value, error", BAD)
def test_and_when_edited(value: Any, error: type[Exception]) -> None:
    problem = Batches().train(1)
    before = weights(problem.params)
    for group in problem.opt.param_groups:
        group["hessian_batches"] = value
    with pytest.raises(error, match=f"hessian_batches must be .*got {value!r}"):
        problem.step()
    assert_same(weights(problem.params), before)


def test_all_groups_have_the_same() -> None:
    problem = Batches()
    problem.opt.param_groups[1]["hessian_batches"] = 2
    with pytest.raises(ValueError, match="hessian_batches"):
        problem.step()


@each_member
def test_a_checkpoint_carries_it_and_an_older_one_lacks_it(member: Any) -> None:
    params = [nn.Parameter(torch.ones(2))]
    saved = member(params, hessian_batches=3).state_dict()
    other = member(params)
    other.load_state_dict(saved)
    assert other.param_groups[0]["hessian_batches"] == 3
    older = copy.deepcopy(saved)
    del older["param_groups"][0]["hessian_batches"]
    opt = member(params, hessian_batches=2)
    opt.load_state_dict(older)
    assert opt.param_groups[0]["hessian_batches"] == 2
    opt.step([lambda: params[0].square().sum(), lambda: params[0].exp().sum()])

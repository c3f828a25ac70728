"""Mistakes that users of the family make, and unusual things that they do: refused, or done right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sassha_fused import SAMSGD, AdaHessian, MSassha, SAMAdamW, Sassha, SophiaH
from tests.support.members import (
    MEMBERS,
    OfMember,
    assert_at_w,
    each_along_momentum,
    each_inexact,
    trained,
)
from tests.support.problems import assert_same, parameter, weights


@each_along_momentum
def test_gradients_of_a_backward_before_perturb_are_refused(member: str) -> None:
    problem = trained(member, 2)
    before = weights(problem.params)
    problem.opt.zero_grad()
    problem.loss().backward()
    with pytest.raises(ValueError, match="comes before the one backward of a step"):
        problem.opt.perturb()
    assert_same(weights(problem.params), before)


@each_along_momentum
def test_gradients_that_were_used_or_cleared_in_place_are_not_in_the_way(member: str) -> None:
    problem, expected = trained(member, 2, "phases"), trained(member, 4, "phases")
    for clear in (lambda: None, lambda: problem.opt.zero_grad(set_to_none=False)):
        clear()
        problem.opt.perturb()
        with problem.opt.hessian_pass():
            problem.loss().backward()
        problem.opt.step()
        problem.steps += 1
    assert_same(problem.snapshot(), expected.snapshot())


@each_inexact
@pytest.mark.parametrize("edit", [{"rho": 0.9}, {"rho": 0.0}, {"exact_restore": True}], ids=str)
def test_what_tells_the_way_back_is_not_edited_on_the_way(member: str, edit: dict[str, Any]) -> None:
    problem = trained(member, 3)
    before = weights(problem.params)
    problem.opt.zero_grad()
    problem.opt.perturb()
    problem.loss().backward()
    for group in problem.opt.param_groups:
        group.update(edit)
    with pytest.raises(ValueError, match="rho, ascent or exact_restore was edited"):
        problem.opt.step()
    assert_at_w(problem, before)


@each_inexact
def test_weights_that_were_loaded_on_the_way_stay_as_they_are(member: str) -> None:
    for end in ("step", "restore"):
        problem = trained(member, 3)
        problem.opt.zero_grad()
        problem.opt.perturb()
        problem.loss().backward()
        loaded = [torch.randn_like(p) for p in problem.params]
        with torch.no_grad():
            for param, value in zip(problem.params, loaded, strict=True):
                param.copy_(value)
        if end == "step":
            with pytest.raises(ValueError, match="the weights were written"):
                problem.opt.step()
        else:
            problem.opt.restore()
        assert_same(weights(problem.params), loaded)
        assert not problem.opt.perturbed


def test_the_state_of_one_member_does_not_turn_another_into_a_third() -> None:
    saved = trained("MSassha by blocks", 3).opt.state_dict()
    other = OfMember("Sassha by blocks")
    other.opt.load_state_dict(saved)
    assert "exact_restore" not in other.opt.param_groups[0]
    with pytest.raises(ValueError, match="exp_hessian_signed: is it that of SophiaH"):
        OfMember("SophiaH").opt.load_state_dict(trained("Sassha by blocks", 2).opt.state_dict())
    adam = torch.optim.AdamW([parameter(1.0)], amsgrad=True)
    with pytest.raises(ValueError, match="amsgrad"):
        SAMAdamW([parameter(1.0)]).load_state_dict(adam.state_dict())


@pytest.mark.parametrize(
    ("kind", "entry"),
    [
        (AdaHessian, {"rho": 0.5}),
        (SAMSGD, {"betas": (0.5, 0.9)}),
        (Sassha, {"exact_restore": False}),
        (SophiaH, {"hessian_block": 3}),
    ],
    ids=str,
)
def test_hyperparameters_of_other_members_are_refused_in_groups(kind: Any, entry: dict[str, Any]) -> None:
    (name,) = entry
    with pytest.raises(ValueError, match=f"{name} is no hyperparameter of this optimizer"):
        kind([{"params": [parameter(1.0)], **entry}])


@pytest.mark.parametrize("member", ["SAMAdamW", "AdaHessian"])
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_squares_beyond_float32_give_no_nan(member: str, backend: str) -> None:
    kind, options = MEMBERS[member]
    w = nn.Parameter(torch.ones(5))
    opt = kind([w], backend=backend, **options)
    for scale in (1e20, 1.0, 1e25, 1.0):
        opt.step(lambda: scale * (w**2).sum())
        assert w.isfinite().all()
    assert opt.skipped_steps == 0


def test_a_first_step_with_a_learning_rate_of_0_is_a_step() -> None:
    w = parameter(1.0, 2.0)
    opt = SAMAdamW([w], lr=0.0, rho=0.0)
    (w**2).sum().backward()
    opt.step()
    assert int(opt.state[w]["step"]) == 1


@each_along_momentum
def test_where_all_is_frozen_the_closure_is_evaluated(member: str) -> None:
    problem = OfMember(member)
    for param in problem.params:
        param.requires_grad_(False)
    assert problem.opt.step(problem.loss).isfinite()


def test_rho_may_be_warmed_up_from_0_along_the_momentum() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        problem = OfMember("MSassha", dtype=dtype)
        for rho in (0.0, 0.0, 0.05, 0.1):
            for group in problem.opt.param_groups:
                group["rho"] = rho
            problem.opt.zero_grad(set_to_none=False)
            problem.opt.perturb()
            with problem.opt.hessian_pass():
                problem.loss().backward()
            problem.opt.step()
        assert problem.opt.skipped_steps == 0


def test_a_model_in_two_buckets_may_change_its_memory_format_along_the_momentum() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Conv2d(4, 2, 3))
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "eps": 1e-2}]
    opt = MSassha(groups, lr=0.05, hessian_interval=3)
    x = torch.randn(2, 3, 8, 8)
    for step in range(5):
        if step == 2:
            model[2].to(memory_format=torch.channels_last)
        opt.step(lambda: model(x).square().mean())
    assert opt.skipped_steps == 0


@pytest.mark.parametrize("member", ["AdaHessian", "SophiaH"])
def test_no_copy_of_the_weights_stays_where_nothing_is_perturbed(member: str) -> None:
    kind, options = MEMBERS[member]
    wide, narrow = nn.Linear(3, 3), nn.Linear(3, 1).double()
    opt = kind([*wide.parameters(), *narrow.parameters()], **options)
    for _ in range(2):
        opt.step(lambda: narrow(wide(torch.ones(2, 3)).double()).square().mean())
    assert not any("backup" in vars(bucket) for bucket in opt._run.flat.buckets)

"""What every member of the family inherits: styles, saving, skipping, restoring, copies, memory, refusals."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sassha_fused
from sassha_fused import SAMSGD, AdaHessian, MSassha, SAMAdamW, Sassha, SophiaH, running_stats_once
from sassha_fused.optimizer import FusedOptimizer
from tests.support.members import (
    MEMBERS,
    STYLES,
    OfMember,
    assert_at_w,
    each_along_momentum,
    each_inexact,
    each_member,
    trained,
)
from tests.support.problems import assert_differ, assert_same, naming, parameter, weights
from tests.support.scaling import Amplified

both_backends = pytest.mark.parametrize("backend", ["cpu", pytest.param("eager", marks=pytest.mark.slow)])


@each_member
def test_every_style_takes_the_same_steps(member: str) -> None:
    start = weights(OfMember(member).params)
    expected = trained(member)
    assert_differ(expected.params, start)
    for style in STYLES:
        assert_same(trained(member, style=style).snapshot(), expected.snapshot(), style)


@each_member
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_run_goes_on_bit_for_bit_from_a_file(member: str, at: int) -> None:
    expected = trained(member, at + 4)
    first = trained(member, at)
    file = io.BytesIO()
    torch.save([first.model.state_dict(), first.opt.state_dict()], file)
    file.seek(0)
    model, state = torch.load(file, weights_only=True)
    other = OfMember(member)
    other.model.load_state_dict(model)
    other.opt.load_state_dict(state)
    other.steps = at
    for _ in range(4):
        other.step()
    assert_same(other.snapshot(), expected.snapshot())
    for key, param in enumerate(first.params):
        assert {v.shape for v in state["state"][key].values() if v.dim()} == {param.shape}


@each_member
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["copy", "pickle"])
def test_a_copy_goes_on_bit_for_bit(member: str, copied: Callable[[Any], Any]) -> None:
    problem = trained(member, 4)
    other = OfMember(member)
    other.model, other.opt, other.steps = *copied((problem.model, problem.opt)), problem.steps
    for _ in range(3):
        problem.step()
        other.step()
    expected = weights(problem.params)
    assert_same(weights(other.model.parameters()), expected)


@each_member
@both_backends
def test_a_step_that_is_not_finite_leaves_no_trace(member: str, backend: str) -> None:
    problem = trained(member, 4, backend=backend)
    before = problem.snapshot()
    exact = problem.opt.defaults.get("exact_restore", True)
    batch = problem.inputs[problem.steps].clone()
    problem.inputs[problem.steps] = math.nan
    problem.opt.zero_grad()
    problem.opt.step(problem.loss)
    assert problem.opt.skipped_steps == 1
    problem.inputs[problem.steps] = batch
    after = problem.snapshot()
    for group in (*before["param_groups"], *after["param_groups"]):
        group.pop("skipped_steps")
    if not exact:
        for found, expected in zip(after.pop("weights"), before.pop("weights"), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    assert_same(after, before)


@pytest.mark.parametrize(
    "member", [member for member, (_, options) in MEMBERS.items() if "hessian_interval" in options]
)
@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nor_does_one_whose_product_alone_is_not_finite(value: float, backend: str, member: str) -> None:
    problem = OfMember(member, backend)
    for param in (problem.params[0], problem.params[3]):
        before = weights(problem.params)
        problem.opt.step(lambda param=param: problem.loss() + Amplified.apply(param, 0.0, value))
        assert_at_w(problem, before)
        assert not any(state.any() for entry in problem.opt.state.values() for state in entry.values())
    assert problem.opt.skipped_steps == 2


@each_member
def test_an_error_in_the_closure_leaves_the_weights_at_w(member: str) -> None:
    problem = trained(member, 4)
    before = weights(problem.params)

    def fails() -> Tensor:
        problem.loss().backward()
        raise MemoryError("the batch is too large")

    with pytest.raises(MemoryError):
        problem.opt.step(fails)
    assert not problem.opt.perturbed
    assert_at_w(problem, before)


@each_along_momentum
def test_perturb_needs_no_gradient_and_restore_takes_it_back(member: str) -> None:
    problem = trained(member, 4)
    before = weights(problem.params)
    problem.opt.zero_grad()
    problem.opt.perturb()
    assert problem.opt.perturbed and not problem.opt.second_pass
    assert_differ(problem.params, before)
    problem.opt.restore()
    assert not problem.opt.perturbed
    assert_at_w(problem, before)


@each_along_momentum
def test_after_restore_the_step_goes_on_from_w(member: str) -> None:
    problem, other = trained(member, 4), trained(member, 4)
    other.step()
    problem.opt.zero_grad()
    problem.opt.perturb()
    with problem.opt.hessian_pass():
        problem.loss().backward()
    problem.opt.restore()
    problem.opt.step()
    for found, expected in zip(problem.params, other.params, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@each_along_momentum
def test_a_step_without_perturb_is_refused(member: str) -> None:
    problem = trained(member, 2)
    before = weights(problem.params)
    problem.opt.zero_grad()
    problem.loss().backward()
    with pytest.raises(ValueError, match=r"step\(\) without perturb\(\), though rho is"):
        problem.opt.step()
    assert_same(weights(problem.params), before)


@each_along_momentum
def test_the_same_gradients_are_used_once(member: str) -> None:
    problem = trained(member, 2, style="phases")
    problem.opt.perturb()
    with pytest.raises(ValueError, match="found no parameter with a gradient"):
        problem.opt.step()


@each_along_momentum
def test_the_closure_is_called_once(member: str) -> None:
    problem = trained(member, 2)
    calls = []

    def loss() -> Tensor:
        calls.append(problem.opt.perturbed)
        return problem.loss()

    problem.opt.zero_grad()
    problem.opt.step(loss)
    assert calls == [True]


@each_along_momentum
def test_the_one_pass_updates_running_statistics(member: str) -> None:
    kind, options = MEMBERS[member]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    opt = kind(model.parameters(), **options)
    running_stats_once(model, opt)
    x = torch.randn(8, 4)
    for count in (1, 2, 3):
        opt.step(lambda: model(x).square().mean())
        assert int(model[1].num_batches_tracked) == count


@each_inexact
def test_w_worked_out_a_thousand_times_drifts_little(member: str) -> None:
    # lr 0: whatever changes is the drift. Rounding w - s m and back is off by half a ulp of w and one of s m.
    kind, options = MEMBERS[member]
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(1000))
    opt = kind([w], **{**options, "lr": 0.0, "rho": 0.1, "weight_decay": 0.0})
    start = w.detach().clone()
    for step in range(1000):
        generator = torch.Generator().manual_seed(step)
        target = torch.randn(1000, generator=generator)
        opt.step(lambda: (w - target).square().sum())
    drift = (w.detach() - start).abs()
    assert 0 < drift.max() < 1000 * 2**-23
    assert drift.mean() < 2e-6


# ---------------------------------------------------------------------------------------------------------------------
# State


def bytes_of(problem: Any) -> float:
    """Per parameter, what the optimizer keeps in float buffers between steps and while the weights are at w'."""
    opt = problem.opt
    found = 0
    for bucket in opt._run.flat.buckets:
        buffers = [bucket.exp_avg, bucket.exp_hessian, vars(bucket).get("backup")]
        found += sum(b.nbytes for b in buffers if b is not None)
    return found / sum(p.numel() for p in problem.params)


class Large(OfMember):
    """With enough elements that padding does not count."""

    def __init__(self, member: str, **options: Any) -> None:
        super().__init__(member, **options)
        self.params = [nn.Parameter(torch.randn(512, 512)), nn.Parameter(torch.randn(1024, 128))]
        kind, defaults = MEMBERS[member]
        self.opt = kind(self.params, **{**defaults, **options})

    def loss(self) -> Tensor:
        return torch.stack([p.sin().sum() for p in self.params]).sum()


@pytest.mark.parametrize(
    ("member", "options", "expected"),
    [
        ("Sassha by blocks", {"hessian_block": 1}, 12),
        ("Sassha by blocks", {"hessian_block": 32}, 8 + 4 / 32),
        ("MSassha", {}, 12),
        ("MSassha", {"exact_restore": False}, 8),
        ("MSassha", {"exact_restore": False, "hessian_block": 32}, 4.125),
        ("SAMSGD", {}, 8),
        ("SAMSGD without copy", {}, 4),
        ("SAMAdamW", {}, 12),
        ("SAMAdamW along momentum", {"exact_restore": False}, 8),
        ("AdaHessian", {}, 8),
        ("SophiaH", {}, 8),
    ],
    ids=str,
)
def test_no_member_keeps_more_than_it_needs(member: str, options: dict[str, Any], expected: float) -> None:
    problem = Large(member, **options)
    for _ in range(2):
        problem.opt.step(problem.loss)
    assert bytes_of(problem) == expected


@pytest.mark.parametrize("member", ["Sassha by blocks", "MSassha by blocks", "AdaHessian by blocks"])
@pytest.mark.parametrize(("saved", "loaded"), [(1, 8), (8, 1), (8, 32), (32, 4), (4, 4)])
def test_a_state_of_any_block_loads_into_any_other(member: str, saved: int, loaded: int) -> None:
    first = trained(member, 4, hessian_block=saved)
    state = first.opt.state_dict()
    other = OfMember(member, hessian_block=loaded)
    other.model.load_state_dict(first.model.state_dict())
    other.opt.load_state_dict(state)
    assert other.opt.param_groups[0]["hessian_block"] == loaded
    name = first.opt.method.averages[1]
    for key, param in enumerate(first.params):
        before, after = (s["state"][key][name].flatten() for s in (state, other.opt.state_dict()))
        # Constant within a block: of each the first element.
        expected = before[::loaded].repeat_interleave(loaded)[: len(before)] if param.dim() > 1 else before
        assert_same(after, expected, f"{name} {key}")
    other.steps = first.steps
    for _ in range(3):
        other.step()


def test_a_block_is_fixed_once_there_is_state() -> None:
    problem = trained("Sassha by blocks", 2)
    for group in problem.opt.param_groups:
        group["hessian_block"] = 8
    with pytest.raises(ValueError, match="hessian_block cannot change from 4 to 8"):
        problem.step()
    for group in problem.opt.param_groups:
        group["hessian_block"] = 4
    problem.step()


def test_a_model_that_changes_its_memory_format_takes_its_blocks_along() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(8 * 16, 2))
    x = torch.randn(5, 4, 6, 6)
    opt = Sassha(model.parameters(), hessian_block=8, hessian_interval=3, lr=0.05)

    def loss() -> Tensor:
        return model(x).square().mean()

    for _ in range(2):
        opt.step(loss)
    before = opt.state_dict()["state"][0]["exp_hessian"].clone()
    model.to(memory_format=torch.channels_last)
    opt.step(loss)
    after = opt.state_dict()["state"][0]["exp_hessian"]
    # Of each block of the new order the first element.
    order = before.permute(0, 2, 3, 1).reshape(-1)
    expected = order[::8].repeat_interleave(8)[: order.numel()]
    torch.testing.assert_close(after.permute(0, 2, 3, 1).reshape(-1), expected, rtol=0, atol=0)


def test_one_dimensional_parameters_have_no_blocks() -> None:
    problem = trained("Sassha by blocks", 4)
    (bucket,) = (
        {id(b): b for b in problem.opt._run.flat.buckets}.values()
        if len(problem.opt._run.flat.buckets) == 1
        else (problem.opt._run.flat.buckets[0],)
    )
    shapes = [tuple(bucket.state_of(row)["exp_hessian"].shape) for row in bucket.rows]
    expected = [(-(-p.numel() // 4),) if p.dim() > 1 else tuple(p.shape) for p in bucket.params]
    assert shapes == expected


@pytest.mark.parametrize(
    ("kind", "options", "name", "value"),
    [
        (SAMSGD, {"momentum": 1.0}, "momentum", 1.0),
        (SAMSGD, {"dampening": -0.1}, "dampening", -0.1),
        (SAMSGD, {"nesterov": 1}, "nesterov", 1),
        (SAMSGD, {"ascent": "up"}, "ascent", "up"),
        (SAMAdamW, {"exact_restore": 0}, "exact_restore", 0),
        (SophiaH, {"clip_threshold": -1.0}, "clip_threshold", -1.0),
        (MSassha, {"hessian_block": 3}, "hessian_block", 3),
        (MSassha, {"hessian_block": 256}, "hessian_block", 256),
        (Sassha, {"hessian_block": 2.0}, "hessian_block", 2.0),
        (AdaHessian, {"hessian_power": 1.5}, "hessian_power", 1.5),
    ],
    ids=str,
)
def test_a_hyperparameter_that_is_wrong_is_named(kind: Any, options: dict[str, Any], name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=naming(name, value)):
        kind([parameter(1.0)], **options)


@pytest.mark.parametrize(
    ("kind", "options", "dtype", "message"),
    [
        (SAMSGD, {"nesterov": True}, torch.float32, "nesterov needs momentum > 0"),
        (SAMSGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, torch.float32, "nesterov needs momentum > 0"),
        (SAMSGD, {"ascent": "momentum"}, torch.float32, "'momentum' needs momentum > 0"),
        (SAMAdamW, {"exact_restore": False}, torch.float32, "exact_restore=False needs ascent='momentum'"),
        (MSassha, {"exact_restore": False, "adaptive": True}, torch.float32, "does not go with adaptive=True"),
        (MSassha, {"exact_restore": False}, torch.bfloat16, "needs float64 or float32 parameters"),
        (MSassha, {"adaptive": True}, torch.float16, "adaptive=True along the momentum needs"),
    ],
    ids=str,
)
def test_hyperparameters_that_do_not_go_together_are_refused(
    kind: Any, options: dict[str, Any], dtype: torch.dtype, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kind([parameter(1.0, dtype=dtype)], **options)


def test_a_state_of_another_member_is_refused() -> None:
    state = trained("SAMAdamW", 2).opt.state_dict()
    with pytest.raises(ValueError, match=r"is it that of MSassha|is missing in a parameter group"):
        OfMember("MSassha").opt.load_state_dict(state)


def test_all_members_are_in_the_package() -> None:
    kinds = {kind for kind, _ in MEMBERS.values()}
    named = {getattr(sassha_fused, name) for name in sassha_fused.__all__}
    assert {kind for kind in named if isinstance(kind, type) and issubclass(kind, FusedOptimizer)} == kinds


@pytest.mark.parametrize("exact_restore", [False])
def test_no_edit_leads_to_weights_that_cannot_be_worked_out(exact_restore: bool) -> None:
    problem = OfMember("MSassha", dtype=torch.bfloat16)
    problem.step()
    before = weights(problem.params)
    for group in problem.opt.param_groups:
        group["exact_restore"] = exact_restore
    with pytest.raises(ValueError, match="exact_restore=False needs float64 or float32 parameters"):
        problem.step()
    assert_same(weights(problem.params), before)


@pytest.mark.parametrize(
    ("kind", "options"), [(MSassha, {}), (Sassha, {"rho": 0.0}), (AdaHessian, {"hessian_interval": 5})]
)
def test_a_parameter_that_never_has_a_gradient_is_named_before_it_costs_much(
    kind: Any, options: dict[str, Any]
) -> None:
    model, unused = nn.Linear(3, 1), nn.Parameter(torch.ones(4))
    opt = kind([*model.parameters(), unused], lr=0.01, **options)
    with pytest.warns(UserWarning, match=r"parameter 2 of group 0, \(4,\): freeze these") as found:
        for _ in range(60):
            opt.step(lambda: model(torch.ones(2, 3)).square().mean())
    assert len(found) == 1


@pytest.mark.parametrize("steps", [1, 3])
def test_samadamw_goes_on_from_a_checkpoint_of_adamw(steps: int) -> None:
    theirs, ours = OfMember("SAMAdamW", dtype=torch.float64), OfMember("SAMAdamW", dtype=torch.float64)
    adamw = torch.optim.AdamW(theirs.params, lr=0.01)

    def step() -> None:
        adamw.zero_grad()
        theirs.loss().backward()
        adamw.step()
        theirs.steps += 1

    for _ in range(steps):
        step()
    ours.model.load_state_dict(theirs.model.state_dict())
    ours.steps, ours.opt = theirs.steps, SAMAdamW(ours.params, lr=0.01, rho=0.0)
    ours.opt.load_state_dict(adamw.state_dict())
    for _ in range(3):
        step()
        ours.step()
    for a, b in zip(theirs.params, ours.params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@each_member
@pytest.mark.parametrize("rho", [None, 0.0])
def test_parameters_of_several_dtypes_take_steps_together(member: str, rho: float | None) -> None:
    # Each bucket's step is that of its parameters alone but for the norm, which is one: the sums of squares tell it.
    kind, options = MEMBERS[member]
    if rho is not None and "rho" in kind([parameter(1.0)]).defaults:
        options = {**options, "rho": rho}
    options = {k: v for k, v in options.items() if k != "exact_restore"}
    torch.manual_seed(0)
    wide, narrow = nn.Linear(4, 8), nn.Linear(8, 2).bfloat16()
    start = weights([*wide.parameters(), *narrow.parameters()])
    opt = kind([*wide.parameters(), *narrow.parameters()], **options)
    x, y = torch.randn(16, 4), torch.randn(16, 2)

    def loss() -> Tensor:
        return (narrow(wide(x).tanh().bfloat16()).float() - y).square().mean()

    losses = [opt.step(loss).item() for _ in range(20)]
    assert opt.skipped_steps == 0 and losses[-1] < losses[0]
    assert len(opt._run.flat.buckets) == 2
    assert_differ([*wide.parameters(), *narrow.parameters()], start)
    if rho != 0.0 and ("along" in member or "MSassha" in member):
        norms = [float(torch.cat([a.double().flatten() for a in b.averages]).norm()) for b in opt._run.flat.buckets]
        opt.perturb()
        assert float(opt._run.step._norm) == pytest.approx(math.hypot(*norms), rel=1e-12)


def test_whether_a_copy_is_kept_is_not_loaded() -> None:
    saved = trained("MSassha", 3).opt.state_dict()
    other = OfMember("MSassha by blocks")
    other.opt.load_state_dict(saved)
    assert not any(group["exact_restore"] for group in other.opt.param_groups)
    along_the_gradient = trained("SAMAdamW", 3).opt.state_dict()
    without = OfMember("SAMAdamW along momentum", exact_restore=False)
    with pytest.raises(ValueError, match="exact_restore=False needs ascent='momentum'"):
        without.opt.load_state_dict(along_the_gradient)

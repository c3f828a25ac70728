"""What closures may do to gradients of micro-batches: clip and unscale them, build their graph, reach others'."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_

from tests.support.micro_batches import Batches, Loss, assert_equal_to_rounding, standard
from tests.support.problems import assert_same, single_threaded

one_thread = pytest.fixture(autouse=True)(single_threaded)
each_member = pytest.mark.parametrize("kind", ["Sassha", "MSassha", "AdaHessian", "SAMSGD", "Sassha with samples"])
Closures = Callable[[Batches, Sequence[Loss]], list[Loss]]


def take_as_list(problem: Batches, closures: Sequence[Loss], **scaling: GradScaler) -> Tensor:
    return problem.opt.step(list(closures), **scaling)


def take_by_accumulating(problem: Batches, closures: Sequence[Loss], **scaling: GradScaler) -> Tensor:
    for closure in closures[:-1]:
        problem.opt.accumulate(closure, **scaling)
    return problem.opt.step(closures[-1], **scaling)


each_taking = pytest.mark.parametrize("take", [take_as_list, take_by_accumulating])


def clipping(problem: Batches, loss: Loss, norms: list[Tensor], **of_backward: bool) -> Loss:
    """A standard closure that clips what it finds in .grad."""
    closure = standard(problem, loss, **of_backward)

    def clipped() -> Tensor:
        value = closure()
        norms.append(clip_grad_norm_(problem.params, 0.05))
        return value

    return clipped


@each_taking
@each_member
def test_clipping_in_the_last_closure_is_that_of_the_batch(kind: str, take: Callable[..., Tensor]) -> None:
    micro, whole = Batches(kind), Batches(kind)
    norms, expected = list[Tensor](), list[Tensor]()
    for _ in range(5):
        *others, last = micro.losses()
        take(micro, [*(standard(micro, loss) for loss in others), clipping(micro, last, norms)])
        whole.opt.step(clipping(whole, whole.whole, expected))
        micro.steps, whole.steps = micro.steps + 1, whole.steps + 1
    assert_equal_to_rounding(torch.stack(norms), torch.stack(expected))
    assert min(norms) > 0.05
    assert_equal_to_rounding(micro.snapshot(), whole.snapshot())


@each_taking
@pytest.mark.parametrize("clips", [False, True])
@each_member
def test_a_scaled_step_is_the_plain_one(kind: str, clips: bool, take: Callable[..., Tensor]) -> None:
    micro, whole = Batches(kind), Batches(kind)
    scaler = GradScaler("cpu", init_scale=2.0**12, growth_interval=2)

    def scaled(loss: Loss) -> Loss:
        def closure() -> Tensor:
            value = loss()
            scaler.scale(value).backward()
            return value

        return closure

    for _ in range(5):
        *others, last = micro.losses()
        closure = last
        if clips:
            inner = scaled(last)

            def closure() -> Tensor:
                value = inner()
                scaler.unscale_(micro.opt)
                clip_grad_norm_(micro.params, 0.05)
                return value

        mixed = [scaled(loss) if i % 2 else loss for i, loss in enumerate(others)]
        loss = take(micro, [*mixed, closure], scaler=scaler)
        scaler.update()
        expected = whole.opt.step(clipping(whole, whole.whole, []) if clips else whole.whole)
        if take is take_as_list:
            assert_equal_to_rounding(loss.reshape(1), expected.reshape(1))
        micro.steps, whole.steps = micro.steps + 1, whole.steps + 1
    assert scaler.get_scale() == 2.0**14
    assert_equal_to_rounding(micro.snapshot(), whole.snapshot())


@each_taking
@pytest.mark.parametrize("bad_pass", [0, 1])
@pytest.mark.parametrize("part", [0, 2, 3])
def test_an_overflow_in_one_micro_batch_skips_the_step_and_halves_the_scale(
    part: int, bad_pass: int, take: Callable[..., Tensor]
) -> None:
    problem = Batches().train(1)
    scaler = GradScaler("cpu", init_scale=2.0**12)
    before = problem.snapshot()
    losses = problem.losses()
    loss, passes = losses[part], iter(range(2))
    losses[part] = lambda: loss() * (torch.inf if next(passes) == bad_pass else 1)
    problem.opt.zero_grad()
    take(problem, losses, scaler=scaler)
    scaler.update()
    assert scaler.get_scale() == 2.0**11
    assert problem.opt.skipped_steps == 1
    after = problem.snapshot()
    assert_same(after["weights"], before["weights"])
    assert_same(after["state"], before["state"])


@each_taking
@each_member
def test_closures_that_always_build_the_graph_change_nothing(kind: str, take: Callable[..., Tensor]) -> None:
    micro, whole = Batches(kind), Batches(kind)
    for _ in range(5):
        take(micro, [standard(micro, loss, create_graph=True) for loss in micro.losses()])
        micro.steps += 1
        whole.step_of_whole()
    assert not any(param.grad.requires_grad for param in micro.params if param.grad is not None)
    assert_equal_to_rounding(micro.snapshot(), whole.snapshot())


@each_taking
def test_losses_of_one_element_may_have_any_shape_and_dtype(take: Callable[..., Tensor]) -> None:
    micro, plain = Batches(), Batches()
    for _ in range(2):
        first, second, third, last = micro.losses()
        found = take(
            micro,
            [first, lambda: second().reshape(1, 1), standard(micro, third), lambda: last().float().reshape(1)],
        )
        micro.steps += 1
        expected = plain.step()
        assert found.numel() == 1
        if take is take_as_list:
            torch.testing.assert_close(found.reshape(()), expected, rtol=1e-6, atol=0, check_dtype=False)
    assert_equal_to_rounding(micro.snapshot(), plain.snapshot(), 1e-5)


@each_taking
@each_member
def test_parameters_of_nobody_get_the_gradients_of_the_first_pass_once(kind: str, take: Callable[..., Tensor]) -> None:
    micro, whole = Batches(kind), Batches(kind)
    for problem in (micro, whole):
        others = [nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(problem.parts)]

        def with_other(step: int, part: int, own=(problem.params[3], others, problem.loss_of)) -> Loss:
            param, others, loss_of = own  # each micro-batch has another of these
            return lambda: loss_of(step, part)() + (others[part] ** 2).sum() * param.square().sum()

        problem.loss_of, problem.others = with_other, [*others, problem.outside]
    for _ in range(5):
        for param in (*micro.others, *whole.others):
            param.grad = None
        take(micro, micro.losses())
        micro.steps += 1
        whole.step_of_whole()
        for mine, theirs in zip(micro.others, whole.others):
            assert_equal_to_rounding(mine.grad, theirs.grad)
            assert not mine.grad.requires_grad

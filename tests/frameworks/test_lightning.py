"""Lightning's automatic optimization takes the steps of a plain loop: as it is, clipped, accumulated, scheduled."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sassha_fused import running_stats_once
from tests.support.kinds import assert_states_close, reference_of
from tests.support.lightning_runs import BATCHES, fit, groups_of_batches, loss_of, module_of, plain_loop, snapshot
from tests.support.members import MEMBERS, OfMember
from tests.support.problems import Problem, assert_same, single_threaded
from tests.support.reference import ReferenceSassha

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
one_thread = pytest.fixture(autouse=True)(single_threaded)

CLIPS: dict[str, tuple[dict[str, Any], Callable[[Sequence[Tensor]], Any]]] = {
    "unclipped": ({}, lambda params: None),
    "norm": ({"gradient_clip_val": 0.05}, partial(nn.utils.clip_grad_norm_, max_norm=0.05)),
    "value": (
        {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
        partial(nn.utils.clip_grad_value_, clip_value=0.02),
    ),
}
each_clip = pytest.mark.parametrize("clip", CLIPS)
each_count = pytest.mark.parametrize("count", [1, 3, BATCHES, 10])


def accumulating(count: int) -> dict[str, Any]:
    from sassha_fused.lightning import Accumulate

    return {"accumulate_grad_batches": count, "callbacks": [Accumulate()]} if count > 1 else {}


def problem_of(member: str, **options: Any) -> Problem:
    return Problem(**options) if member == "Sassha" else OfMember(member, **options)


def reference(clip: Callable[[Sequence[Tensor]], Any]) -> Problem:
    """The problem with the reference, whose gradients are clipped, and its products not."""
    problem = Problem(dtype=torch.float64)
    opt = problem.opt = reference_of(problem.opt)  # type: ignore[assignment]

    def backward(*args: Any, **options: Any) -> Any:
        results = ReferenceSassha._backward(opt, *args, **options)
        for param in problem.params:
            param.grad = param.grad.clone()  # apart from that of the graph
        clip(problem.params)
        return results

    opt._backward = backward
    return problem


@each_count
@each_clip
def test_steps_are_those_of_the_reference(clip: str, count: int, tmp_path: Any) -> None:
    problem = Problem(dtype=torch.float64)
    options, clipped = CLIPS[clip]
    fit(problem, tmp_path, **options, **accumulating(count))
    expected = reference(clipped)
    for batches in groups_of_batches(count) * 2:
        expected.opt.step(lambda: sum(loss_of(expected, batch) for batch in batches) / count)
    assert_states_close(problem.params, problem.opt, expected.params, expected.opt, 1e-12)


@each_clip
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("member", ["Sassha", *MEMBERS])
def test_steps_of_every_member_are_those_of_its_plain_loop(member: str, count: int, clip: str, tmp_path: Any) -> None:
    problem, expected = problem_of(member), problem_of(member)
    options, clipped = CLIPS[clip]
    trainer = fit(problem, tmp_path, **options, **accumulating(count))
    plain_loop(expected, count, at_the_end=lambda: clipped(expected.params))
    assert_same(snapshot(problem), snapshot(expected))
    assert trainer.global_step == problem.opt.param_groups[0]["steps"] == 2 * math.ceil(BATCHES / count)


def test_a_run_without_the_callback_is_refused_and_not_trained_on_the_last_batch_alone(tmp_path: Any) -> None:
    problem = Problem()
    with pytest.raises(ValueError, match=r"it would drop.*opt.accumulate\(closure\)"):
        fit(problem, tmp_path, accumulate_grad_batches=3)
    assert_same(snapshot(problem)["weights"], snapshot(Problem())["weights"])


def test_the_callback_leaves_other_optimizers_alone(tmp_path: Any) -> None:
    def trained(**options: Any) -> Problem:
        problem = Problem()
        problem.opt = torch.optim.AdamW(problem.params)  # type: ignore[assignment]
        fit(problem, tmp_path, **options)
        return problem

    assert_same(snapshot(trained(**accumulating(3))), snapshot(trained(accumulate_grad_batches=3)))


def test_counts_that_change_from_epoch_to_epoch(tmp_path: Any) -> None:
    from lightning.pytorch.callbacks import GradientAccumulationScheduler

    from sassha_fused.lightning import Accumulate

    problem, expected = Problem(), Problem()
    fit(problem, tmp_path, max_epochs=3, callbacks=[Accumulate(), GradientAccumulationScheduler({1: 2, 2: 3})])
    for count in (1, 2, 3):
        plain_loop(expected, count, epochs=1)
    assert_same(snapshot(problem), snapshot(expected))


@pytest.mark.parametrize("count", [1, 3])
def test_a_scheduler_of_the_learning_rate(count: int, tmp_path: Any) -> None:
    problem, expected = Problem(), Problem()

    def scheduler(opt: Any) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=15)

    def configure_optimizers(self: Any) -> Any:
        config = {"scheduler": scheduler(problem.opt), "interval": "step"}
        return {"optimizer": problem.opt, "lr_scheduler": config}

    fit(problem, tmp_path, module_of(problem, configure_optimizers=configure_optimizers), **accumulating(count))
    plain_loop(expected, count, after=scheduler(expected.opt).step)
    assert_same(snapshot(problem), snapshot(expected))


class WithBatchNorm(Problem):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.model.insert(1, nn.BatchNorm1d(7))
        running_stats_once(self.model, self.opt)


@pytest.mark.parametrize("count", [1, 3])
def test_running_statistics_see_each_batch_once(count: int, tmp_path: Any) -> None:
    problem, expected = WithBatchNorm(), WithBatchNorm()
    fit(problem, tmp_path, **accumulating(count))
    plain_loop(expected, count)
    assert_same(snapshot(problem), snapshot(expected))
    assert_same([*problem.model.buffers()], [*expected.model.buffers()])
    assert int(problem.model[1].num_batches_tracked) == 2 * BATCHES


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("what", ["model", "module"])
def test_what_is_compiled_is_the_plain_loop_of_what_is_not(what: str, count: int, tmp_path: Any) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    problem, expected = Problem(dtype=torch.float64), Problem(dtype=torch.float64)
    backend = CompileCounterWithBackend("aot_eager")
    if what == "model":
        problem.model = torch.compile(problem.model, backend=backend)
    module = module_of(problem)
    if what == "module":
        module = torch.compile(module, backend=backend)
    fit(problem, tmp_path, module, **accumulating(count))
    plain_loop(expected, count)
    assert backend.frame_count > 0
    assert_states_close(problem.params, problem.opt, expected.params, expected.opt, 1e-12)


@pytest.mark.parametrize("count", [1, 3])
def test_metrics_of_first_passes_alone(count: int, tmp_path: Any) -> None:
    problem, first, outputs = Problem(), [], []

    def training_step(self: Any, batch: int, index: int) -> Tensor:
        loss = loss_of(problem, batch)
        if not self.optimizers().second_pass:
            first.append((batch, loss.item()))
            self.log("loss", loss, on_step=True, on_epoch=True, batch_size=1)
        return loss

    module = module_of(problem, training_step=training_step)
    module.automatic_optimization = True
    module.on_train_batch_end = lambda outputs_, batch, index: outputs.append(batch)
    trainer = fit(problem, tmp_path, module, max_epochs=1, **accumulating(count))
    assert [batch for batch, _ in first] == outputs == [*range(BATCHES)]
    expected = sum(loss for _, loss in first) / BATCHES
    assert float(trainer.callback_metrics["loss_epoch"]) == pytest.approx(expected, rel=1e-6)


def test_batches_whose_step_does_not_come_are_given_up(tmp_path: Any) -> None:
    problem = Problem()

    def on_train_batch_end(self: Any, outputs: Any, batch: int, index: int) -> None:
        self.trainer.should_stop = batch == 4  # 3 make a step

    fit(problem, tmp_path, module_of(problem, on_train_batch_end=on_train_batch_end), **accumulating(3))
    assert problem.opt._run.step is None and snapshot(problem)["param_groups"][0]["steps"] == 1


@pytest.mark.parametrize("batch", [1, 2])
def test_after_an_exception_the_weights_are_w_and_the_trainer_trains_again(batch: int, tmp_path: Any) -> None:
    problem, raises = Problem(), [True]

    def training_step(self: Any, index: int, _: int) -> Tensor:
        if index == batch and raises:
            raise KeyError(raises.pop())
        return loss_of(problem, index)

    module = module_of(problem, training_step=training_step)
    module.automatic_optimization = True
    options = accumulating(3)
    with pytest.raises(KeyError):
        fit(problem, tmp_path, module, **options)
    assert not problem.opt.perturbed and problem.opt._run.step is None
    assert_same(snapshot(problem)["weights"], snapshot(Problem())["weights"])
    problem.opt.zero_grad()
    fit(problem, tmp_path, module, **options)
    assert_same(snapshot(problem), snapshot(plain_loop(Problem(), 3)))


@pytest.mark.parametrize("steps", [1, 7])
def test_the_example_is_its_plain_loop(
    steps: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from examples import lightning_digits

    def digits() -> lightning_digits.data.Digits:
        return lightning_digits.data.Digits(torch.randn(100, 1, 28, 28), torch.arange(100) % 10)

    monkeypatch.setattr(lightning_digits.data, "load", lambda: (digits(), digits()))
    monkeypatch.chdir(tmp_path)
    lightning_digits.main(["--steps", str(steps)])
    difference = float(capsys.readouterr().out.rsplit(":", 1)[1])
    assert difference < 1e-5


def test_without_lightning_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, "sassha_fused.lightning", raising=False)
    with pytest.raises(ImportError, match="pip install 'lightning"):
        import sassha_fused.lightning  # noqa: F401


class Token(torch.autograd.Function):
    """Keeps an object alive as long as its graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Any) -> Tensor:
        ctx.token = token
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def test_a_graph_goes_before_the_next_batch_comes(tmp_path: Any) -> None:
    problem, alive = Problem(), []

    class Thing:
        pass

    def training_step(self: Any, batch: int, index: int) -> Tensor:
        tokens.append(weakref.ref(thing := Thing()))
        alive.append(sum(token() is not None for token in tokens))
        return Token.apply(loss_of(problem, batch), thing)

    tokens: list[Any] = []
    module = module_of(problem, training_step=training_step)
    module.automatic_optimization = True
    fit(problem, tmp_path, module, max_epochs=1, **accumulating(BATCHES))
    assert len(alive) == 2 * BATCHES and max(alive) <= 2

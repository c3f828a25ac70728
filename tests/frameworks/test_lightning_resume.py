"""A Lightning checkpoint resumes bit for bit, in the middle of an epoch too; saving and validating disturb nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.lightning_runs import BATCHES, Resumable, fit, groups_of_batches, module_of, snapshot
from tests.support.members import MEMBERS, OfMember
from tests.support.problems import Problem, assert_differ, assert_same, single_threaded, weights

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
one_thread = pytest.fixture(autouse=True)(single_threaded)


def options_of(count: int, half: bool) -> dict[str, Any]:
    from sassha_fused.lightning import Accumulate, HalfPrecision

    plugin = HalfPrecision("cpu", torch.amp.GradScaler("cpu", init_scale=2.0**17, growth_interval=5)) if half else None
    return {"accumulate_grad_batches": count, "callbacks": [Accumulate()], "plugins": plugin}


def scheduled(problem: Problem, **methods: Any) -> Any:
    def configure_optimizers(self: Any) -> Any:
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(problem.opt, 21)
        return {"optimizer": problem.opt, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    return module_of(problem, configure_optimizers=configure_optimizers, **methods)


def saving(problem: Problem, folder: Path, when: Any) -> Any:
    """Saves a checkpoint after those batches of which when says so."""

    def on_train_batch_end(self: Any, outputs: Any, batch: int, index: int) -> None:
        if when(index):
            self.trainer.save_checkpoint(folder / f"epoch {self.trainer.current_epoch} batch {index}.ckpt")

    return scheduled(problem, on_train_batch_end=on_train_batch_end)


def assert_resumes(member: str, count: int, half: bool, folder: Path) -> None:
    def made() -> Problem:
        return Problem() if member == "Sassha" else OfMember(member)

    def is_boundary(index: int) -> bool:
        return index % count == count - 1 or index == BATCHES - 1

    undisturbed, straight = made(), made()
    fit(undisturbed, folder, scheduled(undisturbed), **options_of(count, half))
    trainer = fit(straight, folder, saving(straight, folder, is_boundary), **options_of(count, half))
    assert_same(snapshot(straight), snapshot(undisturbed))
    checkpoints = sorted(folder.glob("epoch 0*.ckpt"))
    assert len(checkpoints) == len(groups_of_batches(count))
    for checkpoint in checkpoints:
        resumed = made()
        with torch.no_grad():
            for param in resumed.params:
                param.zero_()
        other = fit(resumed, folder, scheduled(resumed), checkpoint=checkpoint, **options_of(count, half))
        assert other.global_step == trainer.global_step
        assert other.precision_plugin.state_dict() == trainer.precision_plugin.state_dict()
        assert_same(snapshot(resumed), snapshot(straight), f"from {checkpoint.name}")


@pytest.mark.parametrize("half", [False, True], ids=["float32", "16-mixed"])
@pytest.mark.parametrize("count", [1, 3])
def test_from_every_step(count: int, half: bool, tmp_path: Path) -> None:
    assert_resumes("Sassha", count, half, tmp_path)


@pytest.mark.parametrize("member", MEMBERS)
def test_for_every_member(member: str, tmp_path: Path) -> None:
    assert_resumes(member, 3, False, tmp_path)


@pytest.mark.parametrize("member", ["Sassha", *MEMBERS])
def test_saving_and_validating_between_the_batches_of_a_step_disturb_nothing(member: str, tmp_path: Path) -> None:
    def trained(disturb: bool) -> tuple[Problem, list[Any]]:
        problem = Problem() if member == "Sassha" else OfMember(member)
        seen = []

        def validation_step(self: Any, batch: int, index: int) -> None:
            if index == 0:
                seen.append(weights(problem.params))

        module = saving(problem, tmp_path, lambda index: disturb)
        if disturb:
            type(module).validation_step = validation_step
            type(module).val_dataloader = lambda self: Resumable()
        fit(problem, tmp_path, module, **options_of(3, False), val_check_interval=1 if disturb else None)
        return problem, seen

    (disturbed, seen), (expected, _) = trained(True), trained(False)
    assert_same(snapshot(disturbed), snapshot(expected))
    before = seen[-BATCHES - 1]
    exact = disturbed.opt.defaults.get("exact_restore", True)
    for found in seen[-BATCHES:][:2]:  # of the three batches of a step
        torch.testing.assert_close(found, before, rtol=0, atol=0 if exact else 1e-7)
    assert_differ(seen[-BATCHES:][2], before)

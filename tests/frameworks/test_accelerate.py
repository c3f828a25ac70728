"""Accelerate's wrappers around model, optimizer and loader: the steps of a plain loop, by closures and by phases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sassha_fused import Sassha
from sassha_fused.optimizer import FusedOptimizer
from tests.support import gpt2
from tests.support.problems import assert_same, single_threaded, weights

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]
one_thread = pytest.fixture(autouse=True, scope="module")(single_threaded)

CLIP = 0.3


@pytest.fixture(scope="module")
def accelerate() -> Any:
    """Not imported before it is needed: that takes seconds."""
    return pytest.importorskip("accelerate", reason="accelerate is not installed (requirements-dev.txt, frameworks)")


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip(
        "transformers", reason="transformers is not installed (requirements-dev.txt, frameworks)"
    )


@pytest.fixture(autouse=True)
def own_precision(accelerate: Any) -> Iterator[None]:
    """The first Accelerator says for the whole process in what precision all compute."""
    accelerate.state.AcceleratorState._reset_state()
    yield
    accelerate.state.AcceleratorState._reset_state()


class Run:
    """A model, its optimizer, and both as Accelerate has prepared them; four batches of four sequences."""

    def __init__(self, accelerate: Any, transformers: Any, dtype: torch.dtype = torch.float64, **options: Any) -> None:
        self.accelerator = accelerate.Accelerator(cpu=True, **options)
        self.plain = gpt2.model_of(transformers, dtype=dtype)
        self.opt = Sassha(self.plain.parameters(), lr=0.01, hessian_interval=2, backend="cpu")
        loader = torch.utils.data.DataLoader(gpt2.sequences(16), batch_size=4)
        self.model, self.prepared, self.loader = self.accelerator.prepare(self.plain, self.opt, loader)

    def backward(self, batch: Any) -> Tensor:
        self.opt.zero_grad()
        loss = self.model(**batch).loss
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), CLIP)
        return loss

    def by_closures(self, batch: Any) -> None:
        self.prepared.step(lambda: self.backward(batch))

    def by_phases(self, batch: Any) -> None:
        """perturb() and hessian_pass() are the optimizer's own, which Accelerate's does not hand on."""
        self.backward(batch)
        self.opt.perturb()
        with self.opt.hessian_pass():
            self.backward(batch)
        self.prepared.step()

    def train(self, style: str, batches: int = 4) -> Run:
        for batch in list(self.loader)[4 - batches :]:
            getattr(self, style)(batch)
        return self

    @property
    def everything(self) -> list[Any]:
        return [weights(self.plain.parameters()), self.opt.state_dict()["state"]]


def plain(transformers: Any, dtype: torch.dtype = torch.float64) -> tuple[Any, FusedOptimizer]:
    model = gpt2.model_of(transformers, dtype=dtype)
    opt = Sassha(model.parameters(), lr=0.01, hessian_interval=2, backend="cpu")
    gpt2.plain_loop(model, opt, gpt2.batches_of(gpt2.sequences(16), 4), CLIP)
    return model, opt


@pytest.mark.parametrize("style", ["by_closures", "by_phases"])
def test_its_steps_are_those_of_the_plain_loop(accelerate: Any, transformers: Any, style: str) -> None:
    run = Run(accelerate, transformers).train(style)
    gpt2.assert_same_run(run.plain, run.opt, *plain(transformers), 1e-12)


def test_several_micro_batches_go_to_the_optimizer_itself(accelerate: Any, transformers: Any) -> None:
    run = Run(accelerate, transformers)
    model = gpt2.model_of(transformers)
    opt = Sassha(model.parameters(), lr=0.01, hessian_interval=2, backend="cpu")
    for batch in gpt2.batches_of(gpt2.sequences(16), 4):
        items = batch["labels"][:, 1:].ne(-100).sum()
        halves = [{name: value[rows] for name, value in batch.items()} for rows in (slice(2), slice(2, 4))]
        run.opt.step([lambda half=half: run.model(**half, num_items_in_batch=items).loss for half in halves])
        opt.step(lambda: model(**batch).loss)
    gpt2.assert_same_run(run.plain, run.opt, model, opt, 1e-12)


@pytest.mark.parametrize("style", ["by_closures", "by_phases"])
def test_a_resumed_run_goes_on_bit_for_bit(accelerate: Any, transformers: Any, style: str, tmp_path: Path) -> None:
    whole = Run(accelerate, transformers)
    for i, batch in enumerate(whole.loader):
        getattr(whole, style)(batch)
        if i == 0:
            whole.accelerator.save_state(str(tmp_path))
    resumed = Run(accelerate, transformers)
    resumed.accelerator.load_state(str(tmp_path))
    assert_same(resumed.train(style, batches=3).everything, whole.everything)


def test_passes_in_bfloat16_are_those_of_autocast(
    accelerate: Any, transformers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(accelerate, transformers, torch.float32, mixed_precision="bf16").train("by_phases")
    model = gpt2.model_of(transformers, dtype=torch.float32)
    opt = Sassha(model.parameters(), lr=0.01, hessian_interval=2, backend="cpu")
    forward = model.forward

    def autocast(**inputs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return forward(**inputs)

    monkeypatch.setattr(model, "forward", autocast)
    gpt2.plain_loop(model, opt, gpt2.batches_of(gpt2.sequences(16), 4), CLIP)
    assert_same(run.everything, [weights(model.parameters()), opt.state_dict()["state"]])


@pytest.mark.parametrize("style", ["by_closures", "by_phases"])
def test_a_loss_scale_is_given_to_the_optimizer_itself(accelerate: Any, transformers: Any, style: str) -> None:
    """What Accelerate has for float16, on GPUs alone: accelerator.scaler. Nothing is in float16 here."""
    run = Run(accelerate, transformers)
    scaler = torch.amp.GradScaler("cpu")
    run.accelerator.scaler = scaler

    for batch in run.loader:

        def backward(batch: Any = batch) -> Tensor:
            loss = run.model(**batch).loss
            run.accelerator.backward(loss)
            return loss

        if style == "by_closures":
            run.opt.step(backward, scaler=scaler)
        else:
            backward()
            run.opt.perturb(scaler)
            with run.opt.hessian_pass():
                backward()
            scaler.step(run.opt)
        scaler.update()
        run.opt.zero_grad()
    model = gpt2.model_of(transformers)
    opt = Sassha(model.parameters(), lr=0.01, hessian_interval=2, backend="cpu")
    gpt2.plain_loop(model, opt, gpt2.batches_of(gpt2.sequences(16), 4))
    gpt2.assert_same_run(run.plain, run.opt, model, opt, 1e-8)  # rho g / (||g|| + 1e-12), S times as large

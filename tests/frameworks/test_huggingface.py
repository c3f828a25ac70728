"""The Trainer of transformers with two_pass(trainer) takes the steps of a plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sassha_fused import SAMSGD, MSassha, SAMAdamW, Sassha, SophiaH
from sassha_fused.optimizer import FusedOptimizer
from tests.support import gpt2
from tests.support.kinds import assert_clean
from tests.support.problems import assert_differ, assert_same, single_threaded, weights

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]
one_thread = pytest.fixture(autouse=True, scope="module")(single_threaded)

STEPS, CLIP = 4, 0.3
MEMBERS: dict[str, tuple[type[FusedOptimizer], dict[str, Any]]] = {
    "Sassha": (Sassha, {"lr": 0.01, "hessian_interval": 2}),
    "Sassha at rho 0": (Sassha, {"lr": 0.01, "hessian_interval": 2, "rho": 0.0}),
    "MSassha": (MSassha, {"lr": 0.01, "hessian_interval": 2}),
    "SAMSGD along momentum": (SAMSGD, {"lr": 0.05, "momentum": 0.9, "ascent": "momentum"}),
    "SAMAdamW": (SAMAdamW, {"lr": 0.01}),
    "SophiaH": (SophiaH, {"lr": 0.001, "hessian_interval": 2, "eps": 1e-3}),
}


@pytest.fixture(scope="module")
def transformers() -> Any:
    """Not imported before it is needed: that takes seconds."""
    pytest.importorskip("accelerate", reason="accelerate is not installed (requirements-dev.txt, frameworks)")
    return pytest.importorskip(
        "transformers", reason="transformers is not installed (requirements-dev.txt, frameworks)"
    )


class Run:
    """A Trainer with a member of the family, and what it trains: four sequences a step, in their order."""

    def __init__(
        self,
        transformers: Any,
        folder: Path,
        member: str = "Sassha",
        accumulation: int = 2,
        two_pass: bool = True,
        model: Any = None,
        options: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> None:
        from sassha_fused import huggingface

        self.model = model or gpt2.model_of(transformers)
        kind, defaults = MEMBERS[member]
        self.opt = kind(self.model.parameters(), **{**defaults, **(options or {})}, backend="cpu")
        self.samples = gpt2.sequences(4 * STEPS)
        settings = {
            "max_steps": STEPS,
            "per_device_train_batch_size": 4 // accumulation,
            "gradient_accumulation_steps": accumulation,
            "max_grad_norm": 0.0,
            "lr_scheduler_type": "constant",
            "train_sampling_strategy": "sequential",
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        self.trainer = transformers.Trainer(
            self.model,
            transformers.TrainingArguments(str(folder), **{**settings, **arguments}),
            train_dataset=self.samples,
            optimizers=(self.opt, None),
        )
        if two_pass:
            huggingface.two_pass(self.trainer)

    def train(self, **options: Any) -> Run:
        self.trainer.train(**options)
        return self

    @property
    def everything(self) -> list[Any]:
        return [weights(self.model.parameters()), self.opt.state_dict()["state"]]


def plain(transformers: Any, member: str, clip: float = torch.inf, **options: Any) -> tuple[Any, FusedOptimizer]:
    """The plain loop on the same batches, and that its clipping clips."""
    model = gpt2.model_of(transformers)
    kind, defaults = MEMBERS[member]
    opt = kind(model.parameters(), **{**defaults, **options}, backend="cpu")
    norms: list[Tensor] = []
    gpt2.plain_loop(model, opt, gpt2.batches_of(gpt2.sequences(4 * STEPS), 4), clip, norms.append)
    assert clip == torch.inf or min(norms) > 1.5 * clip
    return model, opt


@pytest.mark.parametrize("accumulation, clip", [(1, torch.inf), (2, torch.inf), (4, CLIP)])
@pytest.mark.parametrize("member", MEMBERS)
def test_its_steps_are_those_of_the_plain_loop(
    transformers: Any, member: str, accumulation: int, clip: float, tmp_path: Path
) -> None:
    run = Run(transformers, tmp_path, member, accumulation, max_grad_norm=clip if clip < torch.inf else 0.0).train()
    # rho g / (||g|| + 1e-12) tells by 1e-12 / ||g|| whether g was clipped, and eps is 1e-4 of a curvature of 1.
    rtol = 1e-12 if clip == torch.inf else 1e-8
    gpt2.assert_same_run(run.model, run.opt, *plain(transformers, member, clip), rtol)
    assert_clean(run.model.parameters())


def test_hessian_batches_are_those_of_a_step_by_closures(transformers: Any, tmp_path: Path) -> None:
    options = {"hessian_batches": 1}
    run = Run(transformers, tmp_path, options=options).train()
    model = gpt2.model_of(transformers)
    opt = Sassha(model.parameters(), lr=0.01, hessian_interval=2, backend="cpu", **options)
    halves = gpt2.batches_of(run.samples, 2)
    for i in range(0, len(halves), 2):
        items = sum(half["labels"][:, 1:].ne(-100).sum() for half in halves[i : i + 2])
        opt.step([lambda half=half: model(**half, num_items_in_batch=items).loss for half in halves[i : i + 2]])
    gpt2.assert_same_run(run.model, run.opt, model, opt, 1e-10)


@pytest.mark.parametrize("member", ["Sassha", "MSassha"])
def test_a_resumed_run_goes_on_bit_for_bit(transformers: Any, member: str, tmp_path: Path) -> None:
    def run(folder: str) -> Run:
        model = gpt2.model_of(transformers, dropout=0.1)
        saving = {"save_strategy": "steps", "save_steps": 1, "train_sampling_strategy": "random", "max_grad_norm": CLIP}
        return Run(transformers, tmp_path / folder, member, model=model, lr_scheduler_type="linear", **saving)

    whole = run("whole").train()
    resumed = run("resumed").train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert_same(resumed.everything, whole.everything)


def test_passes_in_bfloat16_are_those_of_autocast(transformers: Any, tmp_path: Path) -> None:
    run = Run(transformers, tmp_path, model=gpt2.model_of(transformers, dtype=torch.float32), bf16=True).train()
    other = gpt2.model_of(transformers, dtype=torch.float32)
    opt = Sassha(other.parameters(), lr=0.01, hessian_interval=2, backend="cpu")
    halves = gpt2.batches_of(run.samples, 2)
    for i in range(0, len(halves), 2):
        items = sum(half["labels"][:, 1:].ne(-100).sum() for half in halves[i : i + 2])

        def loss(half: Any, items: Any = items) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return other(**half, num_items_in_batch=items).loss

        opt.step([lambda half=half: loss(half) for half in halves[i : i + 2]])
    assert_same(run.everything, [weights(other.parameters()), opt.state_dict()["state"]])


def scaled(run: Run, scale: float, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives the Trainer a loss scale, which Accelerate has for float16 on GPUs alone, and nothing is in float16."""
    accelerator = run.trainer.accelerator
    accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu", init_scale=scale), True
    monkeypatch.setattr(type(accelerator), "mixed_precision", "fp16")
    return accelerator.scaler


@pytest.mark.parametrize("member", ["Sassha", "MSassha", "SophiaH"])
@pytest.mark.parametrize("clip", [0.0, CLIP], ids=["plain", "clipped"])
def test_a_loss_scale_changes_nothing_but_rounding(
    transformers: Any, member: str, clip: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Run(transformers, tmp_path, member, max_grad_norm=clip).train()
    run = Run(transformers, tmp_path, member, max_grad_norm=clip)
    scaler = scaled(run, 2.0**16, monkeypatch)
    run.train()
    gpt2.assert_same_run(
        run.model, run.opt, expected.model, expected.opt, 1e-8
    )  # rho g / (||g|| + 1e-12), S times as large
    assert scaler.get_scale() == 2.0**16


def test_steps_that_overflow_are_skipped_and_lower_the_scale(
    transformers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(transformers, tmp_path, model=gpt2.model_of(transformers, dtype=torch.float32), max_steps=3)
    before = weights(run.model.parameters())
    scaler = scaled(run, 2.0**127, monkeypatch)
    run.train()
    assert run.opt.skipped_steps > 0
    assert scaler.get_scale() == 2.0 ** (127 - run.opt.skipped_steps)
    assert not run.opt.perturbed
    assert_same(weights(run.model.parameters()), before)


@pytest.mark.parametrize("member", ["Sassha", "SophiaH"])
def test_without_two_pass_the_error_names_it(transformers: Any, member: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sassha_fused\.huggingface\.two_pass\(trainer\)"):
        Run(transformers, tmp_path, member, two_pass=False).train()


def test_steps_of_one_pass_without_a_hessian_need_no_two_pass(transformers: Any, tmp_path: Path) -> None:
    runs = [
        Run(transformers, tmp_path, "SAMAdamW", two_pass=with_it, options={"rho": 0.0}) for with_it in (True, False)
    ]
    assert_same(*[run.train().everything for run in runs])


def test_a_second_call_changes_nothing_more(transformers: Any, tmp_path: Path) -> None:
    from sassha_fused.huggingface import two_pass

    expected = Run(transformers, tmp_path).train().everything
    run = Run(transformers, tmp_path)
    two_pass(run.trainer)
    assert_same(run.train().everything, expected)


def test_an_optimizer_that_the_trainer_makes_serves_too(transformers: Any, tmp_path: Path) -> None:
    from sassha_fused.huggingface import two_pass

    run = Run(transformers, tmp_path, two_pass=False)
    kind, options = MEMBERS["SAMAdamW"]
    made = transformers.Trainer(
        run.model, run.trainer.args, train_dataset=run.samples, optimizer_cls_and_kwargs=(kind, options)
    )
    two_pass(made)
    made.train()
    expected = Run(transformers, tmp_path, "SAMAdamW", options={"weight_decay": 0.0}).train()
    # In another order, since the Trainer makes two groups.
    for mine, theirs in zip(run.model.parameters(), expected.model.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_other_optimizers_and_other_trainers_are_refused(transformers: Any, tmp_path: Path) -> None:
    from sassha_fused.huggingface import two_pass

    run = Run(transformers, tmp_path, two_pass=False)
    with pytest.raises(TypeError, match=r"trainer must be a transformers\.Trainer, got 3"):
        two_pass(3)
    run.trainer.optimizer = torch.optim.SGD(run.model.parameters())
    with pytest.raises(TypeError, match="needs an optimizer of sassha_fused, got SGD"):
        two_pass(run.trainer)
    run.trainer.optimizer = None
    two_pass(run.trainer)
    with pytest.raises(TypeError, match="needs an optimizer of sassha_fused, got AdamW"):
        run.train()


@pytest.mark.parametrize("member, forward", [*(("Sassha", i) for i in (1, 2, 3, 4)), ("MSassha", 1), ("MSassha", 2)])
def test_an_exception_leaves_the_weights_at_w_and_nothing_of_the_step(
    transformers: Any, member: str, forward: int, tmp_path: Path
) -> None:
    run = Run(transformers, tmp_path, member)
    run.train()
    before = run.everything
    passes = iter(range(1, 100))

    def fail(*_: Any) -> None:
        if next(passes) == forward:
            raise KeyboardInterrupt

    handle = run.model.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert not run.opt.perturbed
    assert_same(run.everything, before)
    assert all(param.grad is None for param in run.model.parameters())
    assert_clean(run.model.parameters())
    handle.remove()

    undisturbed = Run(transformers, tmp_path, member).train().train()
    assert_same(run.train().everything, undisturbed.everything)


@pytest.mark.parametrize("event", ["on_substep_end", "on_pre_optimizer_step"])
def test_training_begins_anew_after_an_exception_outside_of_the_passes(
    transformers: Any, event: str, tmp_path: Path
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    callback = type("Failing", (transformers.TrainerCallback,), {event: fail})()
    run = Run(transformers, tmp_path)
    run.trainer.add_callback(callback)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.trainer.remove_callback(callback)
    assert_same(run.train().everything, Run(transformers, tmp_path).train().everything)


def test_a_run_that_stops_between_micro_batches_ends_at_w(transformers: Any, tmp_path: Path) -> None:
    class Stop(transformers.TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 2

    run = Run(transformers, tmp_path, "MSassha")
    run.trainer.add_callback(Stop())
    shorter = Run(transformers, tmp_path, "MSassha", max_steps=2)
    assert_same(run.train().everything, shorter.train().everything)
    assert not run.opt.perturbed


def test_inputs_that_a_training_step_takes_apart_are_whole_in_the_second_pass(
    transformers: Any, tmp_path: Path
) -> None:
    from sassha_fused.huggingface import two_pass

    class Taking(transformers.Trainer):
        def training_step(self, model: Any, inputs: Any, items: Any = None) -> Tensor:
            return super().training_step(model, {name: inputs.pop(name) for name in list(inputs)}, items)

    run = Run(transformers, tmp_path, two_pass=False)
    taking = Taking(run.model, run.trainer.args, train_dataset=run.samples, optimizers=(run.opt, None))
    two_pass(taking)
    taking.train()
    assert_same(run.everything, Run(transformers, tmp_path).train().everything)


def test_checkpoints_of_activations_change_nothing_unless_they_are_reentrant(transformers: Any, tmp_path: Path) -> None:
    run = Run(transformers, tmp_path, gradient_checkpointing=True).train()
    expected = Run(transformers, tmp_path).train()
    gpt2.assert_same_run(run.model, run.opt, expected.model, expected.opt, 1e-10)
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match="use_reentrant=False"):
        Run(transformers, tmp_path, **reentrant).train()


def test_dropout_draws_masks_of_its_own_in_each_pass(transformers: Any, tmp_path: Path) -> None:
    masks: list[Tensor] = []
    run = Run(transformers, tmp_path, accumulation=1, model=gpt2.model_of(transformers, dropout=0.5), max_steps=1)
    run.model.transformer.drop.register_forward_hook(lambda module, inputs, output: masks.append(output == 0))
    run.train()
    first, second = masks
    assert_differ([first], [second])

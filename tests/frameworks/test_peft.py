"""LoRA of peft: adapters are trained, what is frozen stays, in a plain loop and in a Trainer with two_pass(trainer)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sassha_fused import Sassha
from tests.support import gpt2
from tests.support.kinds import assert_states_close, reference_of
from tests.support.problems import assert_differ, assert_same, single_threaded, weights

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
one_thread = pytest.fixture(autouse=True, scope="module")(single_threaded)


@pytest.fixture(scope="module")
def peft() -> Any:
    """Not imported before it is needed: that takes seconds."""
    return pytest.importorskip("peft", reason="peft is not installed (requirements-dev.txt, frameworks)")


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip(
        "transformers", reason="transformers is not installed (requirements-dev.txt, frameworks)"
    )


def adapted(peft: Any, transformers: Any, dropout: float = 0.0) -> Any:
    config = peft.LoraConfig(
        r=3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, lora_dropout=dropout, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(gpt2.model_of(transformers), config).double()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]


def frozen(model: nn.Module) -> list[Tensor]:
    return weights(param for param in model.parameters() if not param.requires_grad)


def sassha(model: nn.Module) -> Sassha:
    return Sassha(trained(model), lr=0.01, hessian_interval=2, backend="cpu")


def test_adapters_take_the_steps_of_the_reference_and_the_rest_stays(peft: Any, transformers: Any) -> None:
    model, other = adapted(peft, transformers), adapted(peft, transformers)
    before = [frozen(model), weights(trained(model))]
    opt = sassha(model)
    reference = reference_of(sassha(other))
    for batch in gpt2.batches_of(gpt2.sequences(20), 4):
        opt.step(lambda: model(**batch).loss)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            reference.step(lambda: other(**batch).loss)
    assert_states_close(trained(model), opt, trained(other), reference, 1e-10)
    assert_same(frozen(model), before[0])
    assert_differ(weights(trained(model)), before[1])


class Run:
    """A Trainer of adapters."""

    def __init__(self, peft: Any, transformers: Any, folder: Path, dropout: float = 0.0, **arguments: Any) -> None:
        from sassha_fused.huggingface import two_pass

        self.model = adapted(peft, transformers, dropout)
        self.opt = sassha(self.model)
        settings = {
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
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
            train_dataset=gpt2.sequences(16),
            optimizers=(self.opt, None),
        )
        two_pass(self.trainer)

    def train(self, **options: Any) -> Run:
        self.trainer.train(**options)
        return self


def test_a_trainer_takes_the_steps_of_the_plain_loop(peft: Any, transformers: Any, tmp_path: Path) -> None:
    run = Run(peft, transformers, tmp_path).train()
    model = adapted(peft, transformers)
    opt = sassha(model)
    gpt2.plain_loop(model, opt, gpt2.batches_of(gpt2.sequences(16), 4))
    gpt2.assert_same_run(run.model, run.opt, model, opt, 1e-11)


def test_a_resumed_trainer_goes_on_bit_for_bit(peft: Any, transformers: Any, tmp_path: Path) -> None:
    def run(folder: str) -> Run:
        saving = {"save_strategy": "steps", "save_steps": 1, "train_sampling_strategy": "random"}
        return Run(peft, transformers, tmp_path / folder, dropout=0.1, **saving)

    whole = run("whole").train()
    resumed = run("resumed").train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert_same(weights(resumed.model.parameters()), weights(whole.model.parameters()))
    assert_same(resumed.opt.state_dict()["state"], whole.opt.state_dict()["state"])

"""The examples with Hugging Face's packages take the steps of the plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import gpt2
from tests.support.problems import single_threaded

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
one_thread = pytest.fixture(autouse=True, scope="module")(single_threaded)

STEPS, CHARACTERS, LARGEST_NORM = 2, 40, 1.0
AS_PLAIN = {"lr_scheduler_type": "constant", "warmup_steps": 0, "train_sampling_strategy": "sequential"}
# rho g / (||g|| + 1e-12) tells by 1e-12 / ||g|| whether g was clipped, and eps is 1e-4 of a curvature of 1.
RTOL = 1e-8


@pytest.fixture(scope="module", autouse=True)
def packages() -> None:
    """Not imported before they are needed: that takes seconds."""
    for name in ("accelerate", "peft", "transformers", "tqdm"):
        pytest.importorskip(name, reason=f"{name} is not installed (requirements-dev.txt, frameworks)")


def windows_of() -> Any:
    from examples.huggingface.gpt2 import CONTEXT, Windows

    generator = torch.Generator().manual_seed(0)
    return Windows(torch.randint(0, CHARACTERS, (32 * STEPS * CONTEXT,), generator=generator))


def model_of() -> Any:
    from examples.huggingface.gpt2 import model_of

    torch.manual_seed(0)
    model = model_of(CHARACTERS).double()
    model.loss_function = gpt2.loss_of  # transformers' own is in float32, whatever the model's dtype
    return model


def assert_plain(model: Any, opt: Any, other: Any, its: Any) -> None:
    """The plain loop trains the other model with its optimizer, on the same batches."""
    gpt2.plain_loop(
        other, its, gpt2.batches_of(list(map(windows_of().__getitem__, range(32 * STEPS))), 32), LARGEST_NORM
    )
    gpt2.assert_same_run(model, opt, other, its, RTOL)


def test_the_trainer_s(tmp_path: Path) -> None:
    from examples.huggingface.gpt2 import optimizer_of
    from examples.huggingface.trainer import trainer_of

    models = [model_of() for _ in range(2)]
    opt, its = (optimizer_of(model.parameters()) for model in models)
    trainer_of(models[0], opt, windows_of(), STEPS, output_dir=str(tmp_path), use_cpu=True, **AS_PLAIN).train()
    assert_plain(models[0], opt, models[1], its)


@pytest.mark.parametrize("phases", [False, True], ids=["closure", "phases"])
def test_accelerate_s(phases: bool) -> None:
    from accelerate.state import AcceleratorState

    from examples.huggingface.accelerated import Loop
    from examples.huggingface.gpt2 import optimizer_of

    AcceleratorState._reset_state()  # in which precision all of a process compute
    models = [model_of() for _ in range(2)]
    opt, its = (optimizer_of(model.parameters()) for model in models)
    Loop(models[0], opt, torch.utils.data.DataLoader(windows_of(), batch_size=32), phases).train(STEPS)
    assert_plain(models[0], opt, models[1], its)


def test_lora_s(tmp_path: Path) -> None:
    from examples.huggingface.lora import adapted, optimizer_of_adapters
    from examples.huggingface.trainer import trainer_of

    models = []
    for _ in range(2):
        torch.manual_seed(1)
        models.append(adapted(model_of()).double())
    opt, its = map(optimizer_of_adapters, models)
    trainer_of(models[0], opt, windows_of(), STEPS, output_dir=str(tmp_path), use_cpu=True, **AS_PLAIN).train()
    assert_plain(models[0], opt, models[1], its)

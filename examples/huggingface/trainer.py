"""Trains a tiny GPT-2 on the King James text with the Trainer of transformers and `two_pass(trainer)`.

Run it from the root of the repository: `python -m examples.huggingface.trainer`.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments

from examples.chargpt.text import load
from examples.huggingface.gpt2 import Windows, model_of, optimizer_of
from sassha_fused.huggingface import two_pass

RESULTS = Path(__file__).parent / "results"


def trainer_of(model: PreTrainedModel, optimizer: Optimizer, windows: Dataset, steps: int, **arguments: Any) -> Trainer:
    """Two micro-batches a step, clipped gradients, a warm-up and a cosine; arguments go to TrainingArguments."""
    settings = {
        "output_dir": str(RESULTS),
        "max_steps": steps,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "cosine",
        "warmup_steps": steps // 10,
        "logging_steps": 20,
        "save_strategy": "no",
        "report_to": "none",
    }
    trainer = Trainer(
        model,
        TrainingArguments(**{**settings, **arguments}),
        train_dataset=windows,
        optimizers=(optimizer, None),  # the schedule is the Trainer's
    )
    two_pass(trainer)
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint, one in 100 steps")
    arguments = parser.parse_args()

    text = load()
    torch.manual_seed(0)
    model = model_of(text.characters)
    optimizer = optimizer_of(model.parameters())
    saving = {"save_strategy": "steps", "save_steps": 100}
    trainer = trainer_of(model, optimizer, Windows(text.train), arguments.steps, **saving)
    trainer.train(resume_from_checkpoint=arguments.resume)
    loss = trainer.evaluate(Windows(text.validation))["eval_loss"]
    print(f"validation loss after {arguments.steps} steps: {loss:.3f}")


if __name__ == "__main__":
    main()

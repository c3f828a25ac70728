"""Trains a tiny GPT-2 on one part of the King James text, and then adapters of peft's LoRA on another.

Run it from the root of the repository: `python -m examples.huggingface.lora`.
"""

import argparse

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from examples.chargpt.text import load
from examples.huggingface.gpt2 import Windows, model_of
from examples.huggingface.trainer import trainer_of


def adapted(model: PreTrainedModel) -> PeftModel:
    """Adapters on attention and on the first layer of each MLP; everything else is frozen."""
    return get_peft_model(
        model, LoraConfig(r=8, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="of each of the two trainings")
    arguments = parser.parse_args()

    text = load()
    torch.manual_seed(0)
    model = model_of(text.characters)
    trainer_of(model, Windows(text.train), arguments.steps).train()

    adapters, rest = map(Windows, text.validation.tensor_split(2))
    trainer = trainer_of(adapted(model), adapters, arguments.steps)
    before = trainer.evaluate(rest)["eval_loss"]
    trainer.train()
    after = trainer.evaluate(rest)["eval_loss"]
    print(f"loss on a text that neither has seen: {before:.3f} without adapters, {after:.3f} with them")


if __name__ == "__main__":
    main()

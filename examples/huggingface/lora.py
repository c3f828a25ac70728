"""Trains a tiny GPT-2 on one part of the King James text, and then adapters of peft's LoRA on another.

Run it from the root of the repository: `python -m examples.huggingface.lora`.
"""

import argparse

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from examples.chargpt.text import load
from examples.huggingface.gpt2 import Windows, model_of, optimizer_of
from examples.huggingface.trainer import trainer_of
from sassha_fused import SAMAdamW


def adapted(model: PreTrainedModel) -> PeftModel:
    """Adapters on attention and on the first layer of each MLP; everything else is frozen."""
    return get_peft_model(
        model, LoraConfig(r=8, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    )


def optimizer_of_adapters(model: PeftModel) -> SAMAdamW:
    """One factor of each adapter starts at 0, and with it the curvature of the other: no Hessian here."""
    return SAMAdamW((param for param in model.parameters() if param.requires_grad), lr=0.02, rho=0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="of each of the two trainings")
    arguments = parser.parse_args()

    text = load()
    torch.manual_seed(0)
    model = model_of(text.characters)
    trainer_of(model, optimizer_of(model.parameters()), Windows(text.train), arguments.steps).train()

    other, rest = map(Windows, text.validation.tensor_split(2))
    model = adapted(model)
    trainer = trainer_of(model, optimizer_of_adapters(model), other, arguments.steps)
    before = trainer.evaluate(rest)["eval_loss"]
    trainer.train()
    after = trainer.evaluate(rest)["eval_loss"]
    print(f"loss on a text that neither has seen: {before:.3f} without adapters, {after:.3f} with them")


if __name__ == "__main__":
    main()

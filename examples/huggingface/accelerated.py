"""Trains a tiny GPT-2 on the King James text in a loop with Accelerate.

Run it from the root of the repository: `python -m examples.huggingface.accelerated`. With `--phases` both passes are in
sight: perturb() and hessian_pass() are then those of the optimizer itself, which Accelerate's wrapper does not hand on.
"""

import argparse
from itertools import islice

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedModel

from examples.chargpt.text import BATCH, load
from examples.huggingface.gpt2 import Windows, model_of, optimizer_of

LARGEST_NORM = 1.0


class Loop:
    """One step for each batch, in either style."""

    def __init__(self, model: PreTrainedModel, optimizer: Optimizer, loader: DataLoader, phases: bool) -> None:
        self.accelerator = Accelerator()
        self.optimizer = optimizer
        self.model, self.prepared, self.loader = self.accelerator.prepare(model, optimizer, loader)
        self.step = self.by_phases if phases else self.by_closure

    def backward(self, batch: dict[str, Tensor]) -> Tensor:
        self.prepared.zero_grad()
        loss = self.model(**batch).loss
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), LARGEST_NORM)
        return loss

    def by_closure(self, batch: dict[str, Tensor]) -> Tensor:
        return self.optimizer.step(
            lambda: self.backward(batch)
        )  # prepared.step(closure) works too, and returns nothing

    def by_phases(self, batch: dict[str, Tensor]) -> Tensor:
        loss = self.backward(batch)
        self.optimizer.perturb()
        with self.optimizer.hessian_pass():
            self.backward(batch)
        self.prepared.step()
        return loss.detach()

    def train(self, steps: int) -> None:
        self.model.train()
        with tqdm(islice(self.loader, steps), total=steps, unit="step") as bar:
            for batch in bar:
                bar.set_postfix(loss=f"{self.step(batch).item():.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--phases", action="store_true", help="a loop without a closure")
    arguments = parser.parse_args()

    text = load()
    torch.manual_seed(0)
    model = model_of(text.characters)
    loader = DataLoader(Windows(text.train), batch_size=BATCH, shuffle=True)
    Loop(model, optimizer_of(model.parameters(), lr=0.15), loader, arguments.phases).train(arguments.steps)


if __name__ == "__main__":
    main()

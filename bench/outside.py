"""The optimizer's part of a training step: all that is neither a forward, nor a backward, nor a Hessian product."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

FORWARD, GRADIENTS, PRODUCTS = "forward", "gradients", "products"


class Outside:
    """A clock that stands still in passes of the network, so that every library is timed as its users run it.

    Attributes:
        seconds: that the passes took.
        passes: how many there were of each kind.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.passes: Counter[str] = Counter()

    @contextmanager
    def a_pass(self, kind: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start
        self.passes[kind] += 1

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within it gradients and products are known for what they are, whoever asks for them."""
        grad, backward = torch.autograd.grad, torch.autograd.backward

        def timed_grad(outputs: Any, inputs: Any, grad_outputs: Any = None, **options: Any) -> Any:
            with self.a_pass(GRADIENTS if grad_outputs is None else PRODUCTS):
                return grad(outputs, inputs, grad_outputs, **options)

        def timed_backward(*args: Any, **options: Any) -> None:
            with self.a_pass(GRADIENTS):
                backward(*args, **options)

        with patch.multiple(torch.autograd, grad=timed_grad, backward=timed_backward):
            yield

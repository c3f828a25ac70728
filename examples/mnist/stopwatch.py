"""What a step costs outside forward and backward: the whole step less the time in closures and in autograd."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch


class Stopwatch:
    """Times every optimizer alike: `step` around its step, `passes` around the loss and all of torch.autograd."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._steps = 0
        self._whole = 0.0  # seconds in steps
        self._passes = 0.0  # of these, seconds in forward and backward passes and Hessian products
        self._depth = 0

    @property
    def whole(self) -> float:
        """Milliseconds of a step, on average over lazy and Hessian steps."""
        return 1e3 * self._whole / self._steps

    @property
    def own(self) -> float:
        """Milliseconds of a step outside forward and backward, on average over lazy and Hessian steps."""
        return 1e3 * (self._whole - self._passes) / self._steps

    @contextmanager
    def step(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._whole += time.perf_counter() - start
        self._steps += 1

    @contextmanager
    def passes(self) -> Iterator[None]:
        """Nested, as where a closure runs backward itself, it counts once."""
        self._depth += 1
        start = time.perf_counter()
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._passes += time.perf_counter() - start

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While open, what an optimizer does by itself through torch.autograd counts as passes."""

        def watched(function: Callable) -> Callable:
            def call(*args: Any, **kwargs: Any) -> Any:
                with self.passes():
                    return function(*args, **kwargs)

            return call

        with ExitStack() as patches:
            for name in ("backward", "grad"):
                function = watched(getattr(torch.autograd, name))
                patches.enter_context(mock.patch.object(torch.autograd, name, function))
            yield

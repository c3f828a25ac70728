"""Whole steps as CUDA graphs: one graph of a lazy step, one of a Hessian step, replayed as they fall due."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .optimizer import Sassha, StepTaken
from .state import Bucket

# Steps of each kind that run as usual first, as torch advises: libraries set themselves up in them.
_WARMUP = 3


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    loss: Tensor
    taken: StepTaken


class GraphedStep:
    """Takes the steps of an optimizer by replaying CUDA graphs, after a few usual ones of each kind.

    A step is a lazy one or a Hessian one, and each kind is a graph of its own, with both passes of the model and all
    that the optimizer does in it. The batch is read from tensors that stay where they are, the learning rate from a
    tensor on the device::

        inputs, targets = torch.empty(..., device="cuda"), torch.empty(..., device="cuda")
        opt = Sassha(model.parameters(), lr=torch.tensor(0.15, device="cuda"))
        step = GraphedStep(opt, lambda: criterion(model(inputs), targets))
        for batch in data:
            inputs.copy_(batch[0])
            targets.copy_(batch[1])
            loss = step()                # the loss of the first pass, overwritten by the next call
            opt.param_groups[0]["lr"].fill_(schedule(...))

    A step that is not finite is skipped, and the schedule of Hessian steps goes on, as without graphs: before it
    chooses a graph the host waits for the step before.

    Args:
        optimizer: all of its parameters on CUDA devices.
        closure: computes and returns the loss, without a choice that depends on values.

    Raises:
        ValueError: a parameter, or a learning rate that is a tensor, is not on a CUDA device; and, in later calls,
            where a hyperparameter has changed that the graphs have recorded as a number.
    """

    def __init__(self, optimizer: Sassha, closure: Callable[[], Tensor]) -> None:
        self._optimizer, self._closure = optimizer, closure
        self._check_devices()
        self._forget()

    def _check_devices(self) -> None:
        for group in self._optimizer.param_groups:
            for param in group["params"]:
                if param.device.type != "cuda":
                    raise ValueError(f"params must be on a CUDA device for CUDA graphs, got one on {param.device}")
            lr = group["lr"]
            if isinstance(lr, Tensor) and lr.device.type != "cuda":
                raise ValueError(f"lr must be a float or on a CUDA device for CUDA graphs, got a tensor on {lr.device}")

    def _forget(self) -> None:
        self._captured: dict[Hashable, _Captured] = {}
        self._runs: dict[Hashable, int] = {}
        self._numbers: list[dict[str, Any]] = []
        self._of: list[Bucket] = []

    def __call__(self) -> Tensor:
        """Takes a step; returns the loss of its first pass."""
        optimizer = self._optimizer
        optimizer.restore()
        # Where the state has moved, as in load_state_dict, the graphs point at memory that is no longer the state's.
        if [id(bucket) for bucket in self._of] != [id(bucket) for bucket in optimizer.buckets()]:
            self._forget()
            self._of = optimizer.buckets()
        kind = tuple(map(tuple, optimizer.due_rows()))
        if self._runs.get(kind, 0) < _WARMUP:
            self._runs[kind] = self._runs.get(kind, 0) + 1
            return self._run()
        self._check_numbers()
        if kind not in self._captured:
            self._captured[kind] = self._capture()
        captured = self._captured[kind]
        if captured.taken.evaluated:
            optimizer.number_evaluation()
        captured.graph.replay()
        optimizer.await_verdict(captured.taken)
        for selection in captured.taken.selections:
            selection.wrote_params()
        return captured.loss

    def _run(self) -> Tensor:
        """A usual step, on a stream of its own, as capturing asks of the steps before."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loss = self._optimizer.step(self._closure)
        torch.cuda.current_stream().wait_stream(stream)
        assert loss is not None
        return loss

    def _capture(self) -> _Captured:
        optimizer = self._optimizer
        graph = torch.cuda.CUDAGraph()
        optimizer.captured, optimizer.capturing = None, True
        try:
            with torch.cuda.graph(graph):
                loss = optimizer.step(self._closure)
        finally:
            optimizer.capturing = False
        if loss is None or optimizer.captured is None:
            raise ValueError("closure must return a loss that depends on the parameters")
        self._numbers = self._recorded()
        return _Captured(graph, loss, optimizer.captured)

    def _recorded(self) -> list[dict[str, Any]]:
        """What a graph records as numbers."""
        names = self._optimizer.defaults
        return [
            {name: group[name] for name in names if name in group and not isinstance(group[name], Tensor)}
            for group in self._optimizer.param_groups
        ]

    def _check_numbers(self) -> None:
        for recorded, now in zip(self._numbers, self._recorded()):
            for name, value in recorded.items():
                if name not in now or now[name] != value:
                    raise ValueError(
                        f"{name} was {value!r} when the step was captured in a CUDA graph and has changed: make a new "
                        "GraphedStep, or, for lr, give the optimizer a tensor on the device and write into it"
                    )

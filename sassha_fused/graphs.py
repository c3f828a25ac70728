"""Whole steps as CUDA graphs: one graph of a lazy step, one of a Hessian step, replayed as they fall due."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .bucket import Bucket
from .closures import walk
from .counts import StepTaken
from .curvature.of_step import Curvature
from .flat import Groups
from .gradients import of_groups
from .optimizer import FusedOptimizer
from .run import Run
from .selection import Selection
from .step import Step, accept_edited

# Steps of each kind that run as usual first, as torch advises: libraries set themselves up in them.
_WARMUP = 3


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    loss: Tensor
    taken: StepTaken


class _RecordedCurvature(Curvature):
    def number_evaluation(self) -> None:
        pass  # each replay has its own number, given before it


class _RecordedStep(Step):
    """A step that a CUDA graph records: nothing runs, the weights do not move, and nothing is counted.

    Attributes:
        taken: what each replay does to the counts.
    """

    def __init__(self, run: Run, groups: Groups) -> None:
        super().__init__(run, groups)
        self.taken: StepTaken | None = None

    def make_curvature(self, kind: type[Curvature] = _RecordedCurvature) -> None:
        super().make_curvature(kind)

    def count(self, taken: StepTaken) -> None:
        self.taken = taken

    @staticmethod
    def put_back(selections: Sequence[Selection]) -> None:
        """Leaves the weights alone: the backup is that of a step before."""


class GraphedStep:
    """Takes the steps of an optimizer by replaying CUDA graphs, after a few usual ones of each kind.

    A step is a lazy one or a Hessian one, and each kind is a graph of its own, with the passes of the model and all
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
    chooses a graph the host waits for the step before. Hooks on the optimizer's step do not run in replays.

    Args:
        optimizer: all of its parameters on one CUDA device.
        closure: computes and returns the loss, without a choice that depends on values.

    Raises:
        ValueError: the parameters, or a learning rate that is a tensor, are not on one CUDA device; and, in later
            calls, where a hyperparameter has changed that the graphs have recorded.
    """

    def __init__(self, optimizer: FusedOptimizer, closure: Callable[[], Tensor]) -> None:
        self._optimizer, self._closure = optimizer, closure
        self._device = self._find_device()
        self._stream = torch.cuda.Stream(self._device)
        # Graphs that never run at the same time may share their memory.
        self._pool = torch.cuda.graph_pool_handle()
        self._forget()

    def _find_device(self) -> torch.device:
        groups = self._optimizer.param_groups
        devices = {param.device for group in groups for param in group["params"]}
        if len(devices) != 1 or next(iter(devices)).type != "cuda":
            found = ", ".join(sorted(map(str, devices)))
            raise ValueError(f"params must be on one CUDA device for CUDA graphs, got some on {found}")
        (device,) = devices
        for lr in (group["lr"] for group in groups):
            if isinstance(lr, Tensor) and lr.device != device:
                raise ValueError(f"lr must be a float or a tensor on {device} for CUDA graphs, got one on {lr.device}")
        return device

    def _forget(self) -> None:
        self._captured: dict[tuple[bool, ...], _Captured] = {}
        self._runs: dict[tuple[bool, ...], int] = {}
        self._recorded: list[dict[str, Any]] = []
        self._of: list[Bucket] = []

    def __call__(self) -> Tensor:
        """Takes a step; returns the loss of its first pass."""
        optimizer, run = self._optimizer, self._optimizer._run
        optimizer.restore()
        # Where state or parameters have changed, as in load_state_dict or add_param_group, the graphs point at memory
        # that is no longer theirs.
        outdated = run.flat.is_outdated(optimizer.param_groups, run.states) or not run.flat.is_current()
        buckets = [] if outdated else run.flat.buckets
        run.flat.hand_out(run.states)  # to the graphs
        if [*map(id, self._of)] != [*map(id, buckets)]:
            self._forget()
            self._of = list(buckets)
        # What is frozen or thawed is another step.
        kind = (optimizer.hessian_due, *(param.requires_grad for param in of_groups(optimizer.param_groups)))
        with torch.cuda.device(self._device):
            if self._runs.get(kind, 0) < _WARMUP:
                self._runs[kind] = self._runs.get(kind, 0) + 1
                return self._run()
            self._check_recorded()
            if kind not in self._captured:
                self._captured[kind] = self._capture()
            captured = self._captured[kind]
            accept_edited(run, optimizer.param_groups, movable=True)  # steps of other kinds may have been in between
            for bucket in run.flat.buckets if captured.taken.evaluated else ():
                bucket.evaluation.fill_(run.counts.evaluations)
            captured.graph.replay()
            run.counts.count(captured.taken)
        for selection in captured.taken.selections:
            increment_version(selection.params)
        return captured.loss

    def _run(self) -> Tensor:
        """A usual step, on a stream of its own, as capturing asks of the steps before."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            loss = self._optimizer.step(self._closure)
        torch.cuda.current_stream().wait_stream(self._stream)
        assert loss is not None
        return loss

    def _capture(self) -> _Captured:
        optimizer = self._optimizer
        self._find_device()
        graph = torch.cuda.CUDAGraph()
        # Outside of the graph, whose replays would copy what the groups say from memory that is no longer theirs.
        accept_edited(optimizer._run, optimizer.param_groups, movable=True)
        step = _RecordedStep(optimizer._run, optimizer.param_groups)
        try:
            # The outer context sees to it that a capture that fails does not leave its stream the current one.
            with (
                torch.no_grad(),
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream),
            ):
                loss = walk(step, [self._closure], of_groups(optimizer.param_groups))
        except BaseException:
            step.give_up()
            optimizer.zero_grad()
            raise
        if step.taken is None:
            raise ValueError("closure must return a loss that depends on the parameters")
        self._recorded = self._hyperparameters()
        return _Captured(graph, loss, step.taken)

    def _hyperparameters(self) -> list[dict[str, Any]]:
        """What a graph records: numbers, and where tensors are."""
        names = self._optimizer.defaults
        return [{name: group[name] for name in names if name in group} for group in self._optimizer.param_groups]

    def _check_recorded(self) -> None:
        for recorded, now in zip(self._recorded, self._hyperparameters()):
            for name, value in recorded.items():
                same = now[name] is value if isinstance(value, Tensor) else now[name] == value
                if not same:
                    raise ValueError(
                        f"{name} was {value!r} when the step was captured in a CUDA graph and is {now[name]!r} now: "
                        "make a new GraphedStep, or, for lr, give the optimizer a tensor on the device before that, "
                        "and write into it"
                    )

"""State in flat buffers: one of each kind per parameter group, device and dtype, with per-parameter views."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor

from .layout import state_dtype, view_of
from .ops import Operators, operators
from .validation import check_gradients

# Parts start at multiples of this many elements: 256 bytes in the narrowest dtype.
PART_ALIGNMENT = 128

TENSOR_STATES = ("step", "hessian_step", "exp_avg", "exp_hessian")


@dataclass(frozen=True)
class Member:
    """A parameter that has state, and the index of its first element among all elements of the optimizer."""

    param: Tensor
    index: int


class Steps:
    """How many steps each row has taken; one more for all rows costs no more than one for a single row."""

    def __init__(self, steps: Sequence[int]) -> None:
        self._rows = list(steps)
        self._common = 0
        self._distinct = set(steps)

    def __getitem__(self, row: int) -> int:
        return self._rows[row] + self._common

    def distinct(self) -> set[int]:
        """The different counts there are."""
        return {steps + self._common for steps in self._distinct}

    def count(self, rows: Sequence[int] | None) -> None:
        """One more step for these rows, or for all."""
        if rows is None:
            self._common += 1
            return
        for row in rows:
            self._rows[row] += 1
        self._distinct = set(self._rows)


class Bucket:
    """The parameters of one group, device and dtype that have state, and the flat buffers that hold it.

    Attributes:
        exp_avg, exp_hessian: m and D, in float64 for float64 parameters, else float32.
        backup: w while the parameters are at w', in their dtype.
        counts: int64 ``[len(params), 2]``, the rows (step, hessian_step), on the device.
        skipped: int64 ``[1]``, 1 where the last update skipped a non-finite step.
        evaluation: int64, the index of the Hessian evaluation under way.
        steps: the counts "step" once more, on the host, for the schedule.
    """

    def __init__(
        self, members: Sequence[Member], states: Sequence[dict[str, Any]], steps: Sequence[int], backend: str
    ) -> None:
        first = members[0].param
        self.params = [member.param for member in members]
        self.indices = [member.index for member in members]
        self.rows = list(range(len(members)))
        self.offsets, total = _offsets(self.params)
        self.device, self.dtype = first.device, first.dtype
        self.layouts = [(param.shape, param.stride()) for param in self.params]
        # The one whose strides tell most of a change of memory format.
        self.witness = max(range(len(members)), key=lambda row: (self.params[row].dim(), self.params[row].numel()))
        self.operators: Operators = operators(backend, first.device)
        self.exp_avg = torch.zeros(total, dtype=state_dtype(first), device=first.device)
        self.exp_hessian = torch.zeros_like(self.exp_avg)
        self.backup = torch.zeros(total, dtype=first.dtype, device=first.device)
        self.counts = torch.zeros((len(members), 2), dtype=torch.int64, device=first.device)
        self.skipped = torch.zeros(1, dtype=torch.int64, device=first.device)
        self.evaluation = torch.zeros((), dtype=torch.int64, device=first.device)
        self.steps = Steps(steps)
        for row, state in enumerate(states):
            if state:
                for name, view in self.state_of(row).items():
                    view.copy_(torch.as_tensor(state[name]))

    def state_of(self, row: int) -> dict[str, Tensor]:
        """One parameter's state, as views of the buffers."""
        param, offset = self.params[row], self.offsets[row]
        return {
            "step": self.counts[row, 0],
            "hessian_step": self.counts[row, 1],
            "exp_avg": view_of(self.exp_avg, offset, param),
            "exp_hessian": view_of(self.exp_hessian, offset, param),
        }

    def is_current(self, row: int) -> bool:
        """Whether a parameter still is as its state was made: model.to(...) moves parameters in place."""
        param = self.params[row]
        layout = (param.shape, param.stride())
        return param.dtype == self.dtype and param.device == self.device and layout == self.layouts[row]


def _offsets(params: Sequence[Tensor]) -> tuple[list[int], int]:
    offsets, total = [], 0
    for param in params:
        offsets.append(total)
        total += -(-param.numel() // PART_ALIGNMENT) * PART_ALIGNMENT
    return offsets, total


def _check_fit(param: Tensor, shape: torch.Size) -> None:
    if param.shape != shape:
        raise ValueError(f"a parameter now has shape {tuple(param.shape)}, but its state has {tuple(shape)}")


@dataclass
class Selection:
    """Some parameters of a bucket, by their rows, and their gradients of one pass."""

    bucket: Bucket
    group: dict[str, Any]
    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    offsets: Sequence[int]
    rows: Sequence[int]
    indices: Sequence[int]

    @classmethod
    def all_of(cls, bucket: Bucket, group: dict[str, Any]) -> Selection:
        """Every parameter of a bucket, without gradients."""
        return cls(bucket, group, bucket.params, (), bucket.offsets, bucket.rows, bucket.indices)

    def at(self, positions: Sequence[int]) -> Selection:
        """The parameters at these positions of this selection."""
        if len(positions) == len(self.params):
            return self
        return Selection(
            self.bucket,
            self.group,
            [self.params[i] for i in positions],
            [self.grads[i] for i in positions] if self.grads else (),
            [self.offsets[i] for i in positions],
            [self.rows[i] for i in positions],
            [self.indices[i] for i in positions],
        )

    def but(self, positions: Sequence[int]) -> Selection:
        """The parameters at all other positions."""
        left_out = set(positions)
        return self.at([i for i in range(len(self.params)) if i not in left_out]) if left_out else self

    def holding(self, grads: Sequence[Tensor]) -> Selection:
        """The same parameters with these gradients."""
        return Selection(self.bucket, self.group, self.params, grads, self.offsets, self.rows, self.indices)

    def with_gradients(self) -> Selection:
        """The parameters that have a gradient now, with it."""
        present = [grad for param in self.params if (grad := param.grad) is not None]
        if len(present) == len(self.params):
            return self.holding(present)
        return self.at([i for i, param in enumerate(self.params) if param.grad is not None]).holding(present)

    def due(self) -> list[int]:
        """The positions whose next step is a Hessian step: (t - 1) mod k == 0 or t <= hessian_warmup."""
        interval, warmup = self.group["hessian_interval"], self.group["hessian_warmup"]
        steps = self.bucket.steps
        due = {done for done in steps.distinct() if done % interval == 0 or done < warmup}
        return [i for i, row in enumerate(self.rows) if steps[row] in due] if due else []

    def check_fit(self) -> None:
        """ValueError where a parameter has changed its shape since its state was made."""
        for row, param in zip(self.rows, self.params, strict=True):
            _check_fit(param, self.bucket.layouts[row][0])

    def count_step(self) -> None:
        """Counts one more step of these parameters on the host."""
        self.bucket.steps.count(None if self.rows is self.bucket.rows else self.rows)

    def backups(self) -> list[Tensor]:
        """The parts of the bucket's backup that belong to these parameters."""
        return [view_of(self.bucket.backup, o, p) for o, p in zip(self.offsets, self.params, strict=True)]

    def wrote_params(self) -> None:
        """Tells autograd that an operator changed the parameters in place."""
        torch.autograd.graph.increment_version(self.params)


def _same(params: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(params) == len(others) and all(map(is_, params, others))


class Buckets(list[tuple[Bucket, dict[str, Any]]]):
    """All buckets of an optimizer, each with its parameter group.

    Attributes:
        stale: whether parameters have joined since the buckets were made.
    """

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.stale = True
        self._stateless: list[Tensor] = []
        self._packed: list[list[Tensor]] = []

    def select(
        self, groups: Sequence[dict[str, Any]], states: dict[Tensor, dict[str, Any]], settle: Callable[[], None]
    ) -> list[Selection]:
        """The parameters that have a gradient, by bucket; the first gradient gives a parameter its state.

        settle brings the host's counts up to date, which may wait for the device: done only where they are needed.
        """
        selections = None if self.outdated(groups, states) else self._with_gradients()
        if selections is None or not all(s.bucket.is_current(s.rows[0]) for s in selections):
            settle()
            self.pack(groups, states)
            selections = self._with_gradients()
        return selections

    def outdated(self, groups: Sequence[dict[str, Any]], states: dict[Tensor, dict[str, Any]]) -> bool:
        """Whether a parameter waits for its state, or someone has edited the groups, their parameters or the states."""
        return (
            self.stale
            or any(param.grad is not None for param in self._stateless)
            or len(states) < sum(len(bucket.params) for bucket, _ in self)
            or len(groups) != len(self._packed)
            or not all(_same(group["params"], packed) for group, packed in zip(groups, self._packed, strict=True))
            or not all(bucket.is_current(bucket.witness) for bucket, _ in self)
        )

    def _with_gradients(self) -> list[Selection]:
        selections = (Selection.all_of(bucket, group).with_gradients() for bucket, group in self)
        return [selection for selection in selections if selection.params]

    def are_current(self) -> bool:
        """Whether every parameter still is as its state was made."""
        return all(bucket.is_current(row) for bucket, _ in self for row in bucket.rows)

    def pack(self, groups: Sequence[dict[str, Any]], states: dict[Tensor, dict[str, Any]]) -> None:
        """Makes the buckets anew: what is in states moves into flat buffers, and what has a gradient gets its state.

        Raises:
            ValueError: the first gradient of a parameter is sparse or of another shape, dtype or device.
        """
        counted = {param: bucket.steps[row] for bucket, _ in self for row, param in enumerate(bucket.params)}

        def taken(param: Tensor) -> int:
            state = states.get(param)
            if not state:
                return 0
            # Read from the state only where no bucket knows: a device's counts would have to be waited for.
            return counted[param] if param in counted else int(state["step"])

        made: list[tuple[Bucket, dict[str, Any]]] = []
        stateless: list[Tensor] = []
        index = 0
        for group in groups:
            members: dict[tuple[torch.device, torch.dtype], list[Member]] = defaultdict(list)
            for param in dict.fromkeys(group["params"]):
                if states.get(param):
                    _check_fit(param, torch.as_tensor(states[param]["exp_avg"]).shape)
                    members[param.device, param.dtype].append(Member(param, index))
                elif param.grad is not None:
                    check_gradients([param], [param.grad])
                    members[param.device, param.dtype].append(Member(param, index))
                else:
                    stateless.append(param)
                index += param.numel()
            for chosen in members.values():
                params = [member.param for member in chosen]
                made.append(
                    (
                        Bucket(chosen, [states.get(p, {}) for p in params], [taken(p) for p in params], self.backend),
                        group,
                    )
                )
        for bucket, _ in made:
            for row, param in enumerate(bucket.params):
                states[param] = {**states.get(param, {}), **bucket.state_of(row)}
        self[:] = made
        self._stateless = stateless
        self._packed = [list(group["params"]) for group in groups]
        self.stale = False

"""What the optimizer counts: steps, Hessian evaluations, skipped steps. The host learns of a step one step late."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .selection import Selection


class Flag:
    """Reads a one-element tensor once the device gets there, waiting for no more than what led up to it.

    Fake and meta tensors (torch.export, memory estimates) have no value to read: they count as 0.

    Raises:
        RuntimeError: the current stream is being captured.
    """

    def __init__(self, flag: Tensor) -> None:
        self._value: Tensor | None = None
        self._written: torch.cuda.Event | None = None
        if type(flag) is not Tensor or flag.is_meta:
            return
        if not flag.is_cuda:
            self._value = flag
            return
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "this step was captured in a CUDA graph, in whose replays nobody would count steps: "
                "sassha_fused.graphs.GraphedStep captures and replays steps"
            )
        # Pinned memory, so that the copy waits for its turn on the device, and nothing waits for the copy.
        self._value = torch.empty(flag.shape, dtype=flag.dtype, pin_memory=True)
        self._value.copy_(flag, non_blocking=True)
        self._written = torch.cuda.current_stream(flag.device).record_event()

    def read(self) -> bool:
        """Whether it is not 0."""
        if self._written is not None:
            self._written.synchronize()
        return self._value is not None and bool(self._value)


@dataclass
class StepTaken:
    """What a step does to the counts, unless the device has skipped it."""

    skipped: Tensor
    selections: Sequence[Selection]
    evaluated: bool  # a Hessian step


class Counts:
    """The optimizer's own counts; those of a parameter (t and n) lie with its state."""

    def __init__(self) -> None:
        self.set(0, 0, 0)

    def set(self, steps: int, evaluations: int, skipped: int) -> None:
        """Starts from these, and forgets the step that it has not yet counted."""
        # One attribute, since an interrupt may come between any two.
        self._counts: tuple[int, int, int, tuple[Flag, StepTaken] | None] = (steps, evaluations, skipped, None)

    @property
    def steps(self) -> int:
        """T, the steps taken; skipped ones are none."""
        return self._counts[0]

    @property
    def evaluations(self) -> int:
        """Hessian evaluations so far: the index of the next, on which the random signs depend."""
        return self._counts[1]

    @property
    def skipped(self) -> int:
        """Steps that were skipped because something in them was not finite."""
        return self._counts[2]

    def count(self, taken: StepTaken) -> None:
        """Counts a step as soon as the counts are needed, when it is known whether the device skipped it."""
        self._counts = (*self._counts[:3], (Flag(taken.skipped), taken))

    def next_is_scheduled(self, group: dict[str, Any]) -> bool:
        """Whether the coming step is a Hessian step by the schedule, which all groups share, if they have one."""
        steps = self.catch_up()
        if "hessian_interval" not in group:
            return False
        return steps % int(group["hessian_interval"]) == 0 or steps < group["hessian_warmup"]

    def catch_up(self) -> int:
        """Counts the last step, for which it waits until the device is through with it; returns T."""
        steps, evaluations, skipped, uncounted = self._counts
        if uncounted is not None:
            flag, taken = uncounted
            if flag.read():
                skipped += 1
            else:
                steps += 1
                evaluations += taken.evaluated
                for selection in taken.selections if taken.evaluated else ():
                    selection.bucket.without_hessian.difference_update(selection.rows)
            self.set(steps, evaluations, skipped)
        return steps

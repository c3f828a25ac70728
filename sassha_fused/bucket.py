"""The parameters that one call of an operator takes together, and the flat buffers that hold their state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .layout import layouts_of, part_of, state_dtype, view_of, wide_dtype
from .ops import Operators, operators
from .parameter_state import check_shape
from .row_table import RowTable
from .settings import Settings, shared_of

# The state of a parameter starts at a multiple of this many elements: 256 bytes in the narrowest dtype.
ALIGNMENT = 128

# How many parameters of a list tell for all of them whether somebody has written to them.
_TELLING = 16


@dataclass(frozen=True)
class Member:
    """A parameter that has state, its group, and the index of its first element among all elements of the optimizer."""

    param: Tensor
    group: dict[str, Any]
    index: int


class Bucket:
    """Parameters of one device and dtype, of any groups with the same Settings, and the flat buffers of their state.

    Attributes:
        settings: what its groups share.
        table: what each of its parameters has of its own.
        exp_avg, exp_hessian: m and D, in float64 for float64 parameters, else float32.
        norm: 0-d, in float64, where perturb_ puts the norm of the first gradients.
        counts: int64 ``[len(params), 2]``, the rows (step, hessian_step), on the device.
        rows, indices: of each parameter its row of the counts and the table, and the index of its first element.
        skipped: int64 ``[1]``, 1 where the last update skipped a non-finite step.
        evaluation: int64, the index of the Hessian evaluation under way.
        without_hessian: the rows of the parameters that have never had a Hessian.
    """

    def __init__(self, members: Sequence[Member], states: Sequence[dict[str, Any]], backend: str) -> None:
        first = members[0].param
        self.params = [member.param for member in members]
        self.offsets, total = _offsets(self.params)
        self.device, self.dtype = first.device, first.dtype
        self.layouts = layouts_of(self.params)
        self.operators: Operators = operators(backend, first.device)
        self.table = RowTable([member.group for member in members], first.device)
        self.settings = Settings.of(members[0].group)
        self.exp_avg = torch.zeros(total, dtype=state_dtype(first), device=first.device)
        self.exp_hessian = torch.zeros_like(self.exp_avg)
        self.norm = torch.zeros((), dtype=wide_dtype(first.device), device=first.device)
        self.counts = torch.zeros((len(members), 2), dtype=torch.int64, device=first.device)
        self.skipped = torch.zeros(1, dtype=torch.int64, device=first.device)
        self.evaluation = torch.zeros((), dtype=torch.int64, device=first.device)
        for row, state in enumerate(states):
            if state:
                for name, view in self.state_of(row).items():
                    view.copy_(torch.as_tensor(state[name]))
        self.rows = list(range(len(members)))
        self.without_hessian = set(self.rows)
        self.telling = telling_of(len(members))
        self.indices = [member.index for member in members]
        self._own_layouts = [(param.shape, param.stride()) for param in self.params]

    @cached_property
    def backup(self) -> Tensor:
        """w while the parameters are at w', in their dtype; made when it is first needed."""
        return torch.zeros(len(self.exp_avg), dtype=self.dtype, device=self.device)

    def take_in_groups(self) -> bool:
        """Learns what its groups say now; whether they still share their Settings, and count as they did."""
        shared, settings = list(map(shared_of, self.table.groups)), Settings.of(self.table.groups[0])
        if shared.count(shared[0]) < len(shared) or settings.bias_correction != self.settings.bias_correction:
            return False
        self.settings = settings
        self.table.write()
        return True

    def state_of(self, row: int) -> dict[str, Tensor]:
        """One parameter's state, as views of the buffers."""
        param, offset = self.params[row], self.offsets[row]
        return {
            "step": self.counts[row, 0],
            "hessian_step": self.counts[row, 1],
            "exp_avg": view_of(self.exp_avg, offset, param),
            "exp_hessian": view_of(self.exp_hessian, offset, param),
        }

    def backup_of(self, row: int) -> Tensor:
        """One parameter's part of the backup, as it lies there whatever has become of the parameter since."""
        return part_of(self.backup, self.offsets[row], *self._own_layouts[row])

    def is_current(self, row: int) -> bool:
        """Whether a parameter still is as its state was made: model.to(...) moves parameters in place."""
        param = self.params[row]
        layout = (param.shape, param.stride())
        return param.dtype == self.dtype and param.device == self.device and layout == self._own_layouts[row]

    def check_current(self, row: int) -> None:
        """ValueError where a parameter has changed its shape or memory format since its state was made."""
        param, (shape, stride) = self.params[row], self._own_layouts[row]
        check_shape(param, shape)
        if param.stride() != stride:
            raise ValueError(
                f"a parameter of shape {tuple(shape)} now has the strides {param.stride()}, but its state was made for "
                f"{stride}: change the memory format of a model before perturb() or after step()"
            )


def telling_of(count: int) -> list[int]:
    """Some of so many positions. To ask or mark all would take a tenth of a lazy step; who loads weights writes all."""
    return sorted({i * (count - 1) // (_TELLING - 1) for i in range(_TELLING)})


def _offsets(params: Sequence[Tensor]) -> tuple[list[int], int]:
    offsets, total = [], 0
    for param in params:
        offsets.append(total)
        total += -(-param.numel() // ALIGNMENT) * ALIGNMENT
    return offsets, total

"""The parameters that one call of an operator takes together, and the flat buffers that hold their state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .layout import block_index, empty_dense, flat_of, layouts_of, part_of, state_dtype, view_of, wide_dtype
from .method import Method
from .ops import Operators, operators
from .parameter_state import check_shape
from .row_table import RowTable

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
        exp_avg, exp_hessian: m and D, in float64 for float64 parameters, else float32; no D where the method has none.
        block: how many elements share one of D, those of parameters of two or more dimensions.
        blocked: where in the flat state the parts of these end, which come first.
        norm: 0-d, in float64, where perturb_ puts the norm of what it goes along, and update_ that of exp_avg.
        norm_is_of: where norm is that of exp_avg, the rows that were in it, and how often torch saw that written to.
        handed_out: whether others may write to exp_avg unseen: who has had opt.state, or a graph that is replayed.
        counts: int64 ``[len(params), 2]``, the rows (step, hessian_step), on the device.
        rows, indices: of each parameter its row of the counts and the table, and the index of its first element.
        skipped: int64 ``[1]``, 1 where the last update skipped a non-finite step.
        evaluation: int64, the index of the Hessian evaluation under way.
        without_hessian: the rows of the parameters that have never had a Hessian.
    """

    def __init__(
        self, members: Sequence[Member], states: Sequence[dict[str, Any]], backend: str, method: Method
    ) -> None:
        first = members[0].param
        self.method, self.settings = method, method.settings_of(members[0].group)
        self.params = [member.param for member in members]
        self.offsets, total = _offsets(self.params)
        self.device, self.dtype = first.device, first.dtype
        self.layouts = layouts_of(self.params)
        self.operators: Operators = operators(backend, first.device)
        self.table = RowTable([member.group for member in members], first.device)
        self.exp_avg = torch.zeros(total, dtype=state_dtype(first), device=first.device)
        self.block = int(self.settings.hessian_block)
        blocked = [end for param, end in zip(self.params, [*self.offsets[1:], total]) if self.block_of(param) > 1]
        self.blocked = max(blocked, default=0)
        self.exp_hessian: Tensor | None = None
        if method.second_average is not None:
            self.exp_hessian = self.exp_avg.new_zeros(block_index(total, self.block, self.blocked))
        self.norm = torch.zeros((), dtype=wide_dtype(first.device), device=first.device)
        self.handed_out = False
        self.norm_is_of: tuple[Sequence[int], int] | None = None
        self.counts = torch.zeros((len(members), 2), dtype=torch.int64, device=first.device)
        self.skipped = torch.zeros(1, dtype=torch.int64, device=first.device)
        self.evaluation = torch.zeros((), dtype=torch.int64, device=first.device)
        for row, state in enumerate(states):
            if state:
                for name, view in self.state_of(row).items():
                    view.copy_(self._compact(row, torch.as_tensor(state[name]), view))
        self.rows = list(range(len(members)))
        self.without_hessian = set(self.rows if method.takes_hessian else ())
        self.telling = telling_of(len(members))
        self.indices = [member.index for member in members]
        self._own_layouts = [(param.shape, param.stride()) for param in self.params]

    @cached_property
    def backup(self) -> Tensor:
        """w while the parameters are at w', in their dtype; made when it is first needed."""
        return torch.zeros(len(self.exp_avg), dtype=self.dtype, device=self.device)

    def take_in_groups(self) -> bool:
        """Learns what its groups say now; whether they still share their Settings, and count as they did."""
        shared = list(map(self.method.shared_of, self.table.groups))
        settings = self.method.settings_of(self.table.groups[0])
        fixed = (settings.bias_correction, settings.hessian_block)
        if shared.count(shared[0]) < len(shared) or fixed != (
            self.settings.bias_correction,
            self.settings.hessian_block,
        ):
            return False
        for group in self.table.groups:
            self.method.check_dtype(self.dtype, group)
        self.settings = settings
        self.table.write()
        return True

    def note_norm_of(self, rows: Sequence[int]) -> None:
        """Notes that norm is that of these rows of exp_avg as they are now."""
        if not self.exp_avg.is_inference():  # whose writes torch does not count
            self.norm_is_of = (rows, self.exp_avg._version)

    def knows_norm_of(self, rows: Sequence[int]) -> bool:
        """Whether norm is what a step along these rows of exp_avg needs, to which nobody can have written since."""
        if self.norm_is_of is None or self.handed_out or self.settings.adaptive:
            return False
        return self.norm_is_of == (rows, self.exp_avg._version)

    def state_of(self, row: int) -> dict[str, Tensor]:
        """One parameter's state, as views of the buffers."""
        state = {"step": self.counts[row, 0]}
        if self.method.takes_hessian:
            state["hessian_step"] = self.counts[row, 1]
        flats = (self.exp_avg, self.exp_hessian)
        for name, flat in zip(self.method.averages, flats):
            state[name] = self._part_of(flat, row)  # type: ignore[arg-type]
        return state

    def block_of(self, param: Tensor) -> int:
        """How many elements of a parameter share one of D."""
        return self.block if param.dim() > 1 else 1

    def _part_of(self, flat: Tensor, row: int) -> Tensor:
        """One parameter's part of an average: of its shape, or of D by blocks, a number for each block."""
        param, offset = self.params[row], self.offsets[row]
        if flat is not self.exp_hessian:
            return view_of(flat, offset, param)
        start, block = block_index(offset, self.block, self.blocked), self.block_of(param)
        return view_of(flat, start, param) if block == 1 else flat[start : start + -(-param.numel() // block)]

    def _compact(self, row: int, value: Tensor, view: Tensor) -> Tensor:
        """A value as it goes into a state: of each block the first element."""
        param = self.params[row]
        if view.shape == param.shape or value.dim() == 0:
            return value
        return flat_of(empty_dense(param).to(value.dtype).copy_(value))[:: self.block]

    def with_every_element(self, row: int, state: dict[str, Any]) -> dict[str, Any]:
        """One parameter's state with averages of the parameter's shape: what is known by blocks is repeated."""
        name, (shape, stride) = self.method.averages[-1], self._own_layouts[row]
        if self.block == 1 or len(shape) < 2 or torch.as_tensor(state[name]).dim() != 1:
            return state
        every = state[name].repeat_interleave(self.block)[: shape.numel()]
        return {**state, name: part_of(every, 0, shape, stride)}

    @cached_property
    def averages(self) -> list[Tensor]:
        """Of each row the first average, of its parameter's shape and strides."""
        return [self._part_of(self.exp_avg, row) for row in range(len(self.params))]

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

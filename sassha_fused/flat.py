"""State in flat buffers: one of each kind per parameter group, device and dtype, with per-parameter views."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from .checks import check_gradients, check_parameter
from .layout import state_dtype, view_of
from .ops import Operators, operators
from .parameter_state import States, check_shape, complete_state

# The state of a parameter starts at a multiple of this many elements: 256 bytes in the narrowest dtype.
ALIGNMENT = 128

Groups = Sequence[dict[str, Any]]

_grad = attrgetter("grad")


@dataclass(frozen=True)
class Member:
    """A parameter that has state, and the index of its first element among all elements of the optimizer."""

    param: Tensor
    index: int


class Bucket:
    """The parameters of one group, device and dtype that have state, and the flat buffers that hold it.

    Attributes:
        exp_avg, exp_hessian: m and D, in float64 for float64 parameters, else float32.
        norm: 0-d, in float64, where perturb_ puts the norm of the first gradients.
        backup: w while the parameters are at w', in their dtype.
        counts: int64 ``[len(params), 2]``, the rows (step, hessian_step), on the device.
        skipped: int64 ``[1]``, 1 where the last update skipped a non-finite step.
        evaluation: int64, the index of the Hessian evaluation under way.
        without_hessian: the rows of the parameters that have never had a Hessian.
    """

    def __init__(
        self, group: dict[str, Any], members: Sequence[Member], states: Sequence[dict[str, Any]], backend: str
    ) -> None:
        first = members[0].param
        self.params = [member.param for member in members]
        self.offsets, total = _offsets(self.params)
        self.device, self.dtype = first.device, first.dtype
        self.layouts = [(param.shape, param.stride()) for param in self.params]
        # The row whose strides tell most of a change of memory format.
        self.telling = max(range(len(members)), key=lambda row: (self.params[row].dim(), self.params[row].numel()))
        self.operators: Operators = operators(backend, first.device)
        self.exp_avg = torch.zeros(total, dtype=state_dtype(first), device=first.device)
        self.exp_hessian = torch.zeros_like(self.exp_avg)
        self.backup = torch.zeros(total, dtype=first.dtype, device=first.device)
        self.norm = torch.zeros((), dtype=torch.float64, device=first.device)
        self.counts = torch.zeros((len(members), 2), dtype=torch.int64, device=first.device)
        self.skipped = torch.zeros(1, dtype=torch.int64, device=first.device)
        self.evaluation = torch.zeros((), dtype=torch.int64, device=first.device)
        for row, state in enumerate(states):
            if state:
                for name, view in self.state_of(row).items():
                    view.copy_(torch.as_tensor(state[name]))
        rows = list(range(len(members)))
        self.without_hessian = set(rows)
        self._group, self._rows, self._indices = group, rows, [member.index for member in members]

    # Not kept: a cycle would have the buffers wait for the garbage collector.
    @property
    def everything(self) -> Selection:
        """All parameters, as a selection without gradients."""
        return Selection(self, self._group, self.params, (), self.offsets, self._rows, self._indices)

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
        total += -(-param.numel() // ALIGNMENT) * ALIGNMENT
    return offsets, total


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

    def at(self, positions: Sequence[int]) -> Selection:
        """The parameters at these positions of this selection, without gradients."""
        return Selection(
            self.bucket,
            self.group,
            [self.params[i] for i in positions],
            (),
            [self.offsets[i] for i in positions],
            [self.rows[i] for i in positions],
            [self.indices[i] for i in positions],
        )

    def with_grads(self, grads: Sequence[Tensor]) -> Selection:
        """The same parameters with these gradients."""
        return Selection(self.bucket, self.group, self.params, grads, self.offsets, self.rows, self.indices)

    def backups(self) -> list[Tensor]:
        """The stretches of the bucket's backup that belong to these parameters."""
        return [view_of(self.bucket.backup, o, p) for o, p in zip(self.offsets, self.params, strict=True)]

    def lacks_hessian(self) -> bool:
        """Whether one of these parameters has never had a Hessian."""
        without = self.bucket.without_hessian
        return bool(without) and not without.isdisjoint(self.rows)

    def check_shapes(self) -> None:
        """ValueError where a parameter has changed its shape since its state was made."""
        for row, param in zip(self.rows, self.params, strict=True):
            check_shape(param, self.bucket.layouts[row][0])


def with_gradients(selections: Sequence[Selection]) -> list[Selection]:
    """What of these selections has a gradient now, with it."""
    found = []
    for selection in selections:
        grads = [grad for grad in map(_grad, selection.params) if grad is not None]
        if len(grads) < len(selection.params):
            selection = selection.at([i for i, param in enumerate(selection.params) if param.grad is not None])
        if grads:
            found.append(selection.with_grads(grads))
    return found


def _same(ones: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(ones) == len(others) and all(map(is_, ones, others))


def _is_view(value: Any, view: Tensor) -> bool:
    return isinstance(value, Tensor) and value.dtype == view.dtype and value.is_set_to(view)


class FlatState:
    """The flat state of an optimizer, its buckets laid out anew where what it was made for has changed.

    Attributes:
        buckets: where the state lies.
        laid_out: whether it lies as groups and states asked for when it was last looked at.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.buckets: list[Bucket] = []
        self.forget()

    def forget(self) -> None:
        """Lays the state out anew when it is next needed, from what opt.state then holds."""
        self.laid_out = False
        self._stateless: list[Tensor] = []
        self._groups: list[dict[str, Any]] = []
        self._params: list[list[Tensor]] = []

    def select(self, groups: Groups, states: States, catch_up: Callable[[], int]) -> list[Selection]:
        """The parameters that have a gradient, by bucket; the first gradient gives a parameter its state.

        catch_up brings the host's counts up to date, which may wait for the device: done only where they are needed.
        """
        outdated = self.is_outdated(groups, states)
        selections = [] if outdated else with_gradients([bucket.everything for bucket in self.buckets])
        # The operators find what does not go with the first of their parameters, but not that this one has changed.
        if outdated or not all(s.rows[0] == 0 or s.bucket.is_current(s.rows[0]) for s in selections):
            catch_up()
            self.lay_out(groups, states)
            selections = with_gradients([bucket.everything for bucket in self.buckets])
        return selections

    def is_outdated(self, groups: Groups, states: States) -> bool:
        """Whether a parameter waits for its state, or someone has edited the groups, their parameters or the states."""
        return (
            not self.laid_out
            or states.edits.made
            or any(param.grad is not None for param in self._stateless)
            or not _same(groups, self._groups)
            or not all(_same(group["params"], params) for group, params in zip(groups, self._params, strict=True))
            or not all(bucket.is_current(row) for bucket in self.buckets for row in {0, bucket.telling})
        )

    def is_current(self) -> bool:
        """Whether every parameter still is as its state was made."""
        return all(bucket.is_current(row) for bucket in self.buckets for row in range(len(bucket.params)))

    def is_replaced(self, states: States) -> bool:
        """Whether somebody has put other state in the place of what lies here, beside entries of his own."""
        return any(
            not _is_view(states.get(param, {}).get(name), view)
            for bucket in self.buckets
            for row, param in enumerate(bucket.params)
            for name, view in bucket.state_of(row).items()
        )

    def lacks_hessian(self, params: Iterable[Tensor]) -> bool:
        """Whether one of these has never had a Hessian."""
        known = {p: row in b.without_hessian for b in self.buckets for row, p in enumerate(b.params)}
        return any(known.get(param, True) for param in params)

    def lay_out(self, groups: Groups, states: States) -> None:
        """Makes the buckets: what is in states moves into flat buffers, and what has a gradient gets its state.

        Raises:
            ValueError: the first gradient of a parameter is sparse or of another shape, dtype or device; or an entry of
                states that someone has edited is incomplete or of another shape than its parameter.
        """
        known = {p: row not in b.without_hessian for b in self.buckets for row, p in enumerate(b.params)}
        edited = states.edits.made
        made: list[Bucket] = []
        stateless: list[Tensor] = []
        for group, members in _members(groups, states, stateless):
            made.append(Bucket(group, members, [complete_state(states, m.param) for m in members], self.backend))
        for bucket in made:
            for row, param in enumerate(bucket.params):
                old = complete_state(states, param)
                # Read from the state only where no bucket knows: a device's counts would have to be waited for.
                had = known.get(param) if not edited else None
                if old and (int(old["hessian_step"]) > 0 if had is None else had):
                    bucket.without_hessian.discard(row)
        # In this order an interrupt, wherever it comes, has the next step do all of it again, edits included.
        self.laid_out = False
        self.buckets = made
        self._stateless = stateless
        self._groups = list(groups)
        self._params = [list(group["params"]) for group in groups]
        states.lay_out({p: bucket.state_of(row) for bucket in made for row, p in enumerate(bucket.params)})
        self.laid_out = True


def _members(
    groups: Groups, states: States, stateless: list[Tensor]
) -> Iterator[tuple[dict[str, Any], Sequence[Member]]]:
    """The parameters with state, or with a gradient that asks for one, by group, device and dtype."""
    index = 0
    for group in groups:
        members: dict[tuple[torch.device, torch.dtype], list[Member]] = defaultdict(list)
        for param in dict.fromkeys(group["params"]):
            if complete_state(states, param):
                members[param.device, param.dtype].append(Member(param, index))
            elif param.grad is not None:
                check_parameter(param)
                check_gradients([param], [param.grad])
                members[param.device, param.dtype].append(Member(param, index))
            else:
                stateless.append(param)
            index += param.numel()
        for chosen in members.values():
            yield group, chosen

"""The flat state of an optimizer, laid out anew where what it was made for has changed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from .bucket import Bucket, Member
from .checks import BIAS_CORRECTIONS, check_gradients, check_parameter
from .method import Method
from .parameter_state import States, check_shape, complete_state
from .selection import Selection, chosen
from .settings import Settings

Groups = Sequence[dict[str, Any]]

_params = itemgetter("params")


def _same(ones: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(ones) == len(others) and all(map(is_, ones, others))


def _is_view(value: Any, view: Tensor) -> bool:
    return isinstance(value, Tensor) and value.dtype == view.dtype and value.is_set_to(view)


class FlatState:
    """The flat state of an optimizer, its buckets laid out anew where what it was made for has changed.

    Attributes:
        method: the optimizer's.
        buckets: where the state lies.
        of_trained: whether steps go along exp_avg, and what is trained has state before it has a gradient.
        laid_out: whether it lies as groups and states asked for when it was last looked at.
    """

    def __init__(self, backend: str, method: Method) -> None:
        self.backend, self.method, self.of_trained = backend, method, False
        self.buckets: list[Bucket] = []
        self.forget()

    def forget(self) -> None:
        """Lays the state out anew when it is next needed, from what opt.state then holds."""
        self.laid_out = False
        self._stateless: list[Tensor] = []
        self._groups: list[dict[str, Any]] = []
        self._lengths: list[int] = []
        self._params: list[Tensor] = []
        self._last: dict[Bucket, Selection] = {}

    def select(
        self, groups: Groups, states: States, catch_up: Callable[[], int], with_averages: bool = False
    ) -> list[Selection]:
        """The parameters that have a gradient, by bucket; the first gradient gives a parameter its state.

        with_averages: those that are trained instead, with exp_avg for gradients.

        The operators find a parameter that has another shape, strides, dtype or device than the others or than its
        state, but not that the first has another dtype or device than the state. catch_up brings the host's counts up
        to date, which may wait for the device: done only where they are needed.
        """
        outdated = self.is_outdated(groups, states)
        selections = [] if outdated else chosen(self.buckets, self._last, with_averages)
        firsts = [(s.params[0], s.bucket) for s in selections]
        if outdated or any(p.dtype != b.dtype or p.device != b.device for p, b in firsts):
            catch_up()
            self.lay_out(groups, states)
            selections = chosen(self.buckets, self._last, with_averages)
        return selections

    def take_in_groups(self, groups: Groups, movable: bool) -> None:
        """Learns what the groups say, once they are accepted; movable: whether the state may be laid out anew.

        Raises:
            ValueError: it would have to be, and may not.
        """
        if not movable and not _same(groups[: len(self._groups)], self._groups):
            raise ValueError(
                "opt.param_groups was replaced between perturb() and step(): do it before or after these two"
            )
        self.of_trained = self.method.along_momentum(groups[0])
        agree = [bucket.take_in_groups() for bucket in self.buckets]
        if all(agree):
            kinds = {(bucket.device, bucket.dtype, bucket.settings) for bucket in self.buckets}
            if len(kinds) < len(self.buckets):
                self.forget()  # those that agree again come together before the next step
            return
        if not movable:
            raise ValueError(
                "bias_correction or hessian_block, or anything but lr, weight_decay and rho of some groups but not of "
                "others, was edited between perturb() and step(): edit groups before perturb() or after step()"
            )
        self.forget()

    def is_outdated(self, groups: Groups, states: States) -> bool:
        """Whether a parameter waits for its state, or someone has edited the groups, their parameters or the states."""
        return (
            not self.laid_out
            or states.edits.made
            or any(map(self._wants_state, self._stateless))
            or not _same(groups, self._groups)
            or list(map(len, map(_params, groups))) != self._lengths
            or not all(map(is_, chain.from_iterable(map(_params, groups)), self._params))
        )

    def _wants_state(self, param: Tensor) -> bool:
        """Its first gradient gives a parameter its state, or where steps go along exp_avg that it is trained."""
        return param.requires_grad if self.of_trained else param.grad is not None

    def is_current(self) -> bool:
        """Whether every parameter still is as its state was made."""
        return all(bucket.is_current(row) for bucket in self.buckets for row in range(len(bucket.params)))

    def refuse_replaced(self, states: States) -> None:
        """ValueError where somebody has put other state in the place of what lies here, beside entries of his own."""
        for bucket in self.buckets:
            for row, param in enumerate(bucket.params):
                for name, view in bucket.state_of(row).items():
                    if not _is_view(states.get(param, {}).get(name), view):
                        raise ValueError(
                            "opt.state was replaced between perturb() and step(): edit it before or after these two"
                        )

    def hand_out(self, states: States, handed_out: bool = True) -> None:
        """Somebody else has the states in hand, and may write to them in ways that torch does not count."""
        states.handed_out = handed_out
        for bucket in self.buckets:
            bucket.handed_out = handed_out

    @contextmanager
    def lent(self, states: States) -> Iterator[None]:
        """For a copy of the states, which goes on from here by the same bits: from what both of them can measure."""
        handed_out = states.handed_out
        try:
            yield
        finally:
            self.hand_out(states, handed_out)
            for bucket in self.buckets:
                bucket.norm_is_of = None

    def lacks_hessian(self, params: Iterable[Tensor]) -> bool:
        """Whether one of these has never had a Hessian."""
        known = {p: row in b.without_hessian for b in self.buckets for row, p in enumerate(b.params)}
        return any(known.get(param, True) for param in params)

    def lay_out(self, groups: Groups, states: States) -> None:
        """Makes the buckets: what is in states moves into flat buffers, and what has a gradient gets its state.

        Raises:
            ValueError: the first gradient of a parameter is sparse or of another shape, dtype or device; or an entry of
                states that someone has edited is incomplete or of another shape than its parameter; or the group of a
                parameter that has state has another bias correction or hessian_block than before.
        """
        known = {p: row not in b.without_hessian for b in self.buckets for row, p in enumerate(b.params)}
        self.of_trained = bool(groups) and self.method.along_momentum(groups[0])
        before = {p: b.settings for b in self.buckets for p in b.params}
        edited = states.edits.made
        made: list[Bucket] = []
        stateless: list[Tensor] = []
        saved = self._complete(states)
        for members in self._members(groups, saved, stateless):
            made.append(Bucket(members, [saved.get(m.param, {}) for m in members], self.backend, self.method))
        for bucket in made:
            bucket.handed_out = states.handed_out
            for row, param in enumerate(bucket.params):
                old = saved.get(param, {})
                if old:
                    _check_fixed(before.get(param), bucket.settings)
                # Read from the state only where no bucket knows: a device's counts would have to be waited for.
                had = known.get(param) if not edited else None
                if old and self.method.takes_hessian and (int(old["hessian_step"]) > 0 if had is None else had):
                    bucket.without_hessian.discard(row)
        # In this order an interrupt, wherever it comes, has the next step do all of it again, edits included.
        self.laid_out = False
        self.buckets = made
        self._stateless = stateless
        self._groups = list(groups)
        self._lengths = [len(group["params"]) for group in groups]
        self._params = [param for group in groups for param in group["params"]]
        self._last = {}
        states.lay_out({p: bucket.state_of(row) for bucket in made for row, p in enumerate(bucket.params)})
        self.laid_out = True

    def written_out(self, entries: dict[Any, dict[str, Any]], param_of: Callable[[Any], Any]) -> dict[Any, Any]:
        """Entries of a state, by whatever key, as plain dicts; averages with a number for each element.

        What others keep under keys of their own may be no dict, and stays as it is.
        """
        at = {param: (bucket, row) for bucket in self.buckets for row, param in enumerate(bucket.params)}
        written: dict[Any, Any] = {}
        for key, state in entries.items():
            if not isinstance(state, dict):
                written[key] = state
                continue
            bucket, row = at.get(param_of(key), (None, 0))
            known = bucket is not None and all(name in state for name in self.method.averages)
            written[key] = dict(bucket.with_every_element(row, state) if bucket and known else state)
        return written

    def _complete(self, states: States) -> dict[Tensor, dict[str, Any]]:
        """The states of all parameters that have one, written out.

        Raises:
            ValueError: one is incomplete, or an average has another shape than its parameter.
        """
        of_params = {param: state for param, state in states.items() if isinstance(param, Tensor)}
        written = self.written_out(of_params, lambda param: param)
        complete = {p: state for p in written if (state := complete_state(written, p, self.method.states))}
        for param, state in complete.items():
            for name in self.method.averages:
                check_shape(param, torch.as_tensor(state[name]).shape)
        return complete

    def _members(
        self, groups: Groups, saved: dict[Tensor, dict[str, Any]], stateless: list[Tensor]
    ) -> Iterable[Sequence[Member]]:
        """The parameters with state, or that ask for one, by device, dtype and settings.

        Where elements share D by blocks, those that have more dimensions come first.
        """
        index = 0
        members: dict[tuple[torch.device, torch.dtype, Settings], list[Member]] = defaultdict(list)
        for group in groups:
            settings = self.method.settings_of(group)
            for param in dict.fromkeys(group["params"]):
                if param not in saved and not self._wants_state(param):
                    stateless.append(param)
                else:
                    self.method.check_dtype(param.dtype, group)
                    if param not in saved:
                        check_parameter(param)
                        if param.grad is not None:
                            check_gradients([param], [param.grad])
                    members[param.device, param.dtype, settings].append(Member(param, group, index))
                index += param.numel()
        for key, of_key in members.items():
            yield sorted(of_key, key=lambda member: member.param.dim() < 2) if key[2].hessian_block > 1 else of_key


def _check_fixed(old: Settings | None, new: Settings) -> None:
    if old is None:
        return
    if old.bias_correction != new.bias_correction:
        before, now = (BIAS_CORRECTIONS[int(settings.bias_correction)] for settings in (old, new))
        raise ValueError(
            f"bias_correction cannot change from {before!r} to {now!r} for a parameter that has state, whose "
            "hessian_step counts what it says: make a new optimizer with it"
        )
    if old.hessian_block != new.hessian_block:
        raise ValueError(
            f"hessian_block cannot change from {int(old.hessian_block)} to {int(new.hessian_block)} for a parameter "
            "that has state: make a new optimizer with it, and load the state_dict of this one"
        )

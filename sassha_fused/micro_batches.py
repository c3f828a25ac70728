"""The several micro-batches of a step: those whose first pass is over, and the gradients that they have left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .bindings import Bindings
from .gradients import refuse_clearing


class Arrivals:
    """The gradients that micro-batches have left in .grad for the next to add to."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._grads = [(grad, 0 if grad is None else grad._version) for grad in (param.grad for param in params)]

    def are_all(self, params: Sequence[Tensor]) -> bool:
        """Whether nothing has been added to them."""
        return len(params) == len(self._grads) and all(
            param.grad is grad and (grad is None or grad._version == version)
            for param, (grad, version) in zip(params, self._grads)
        )

    def refuse_others(self, params: Sequence[Tensor]) -> None:
        """ValueError where they are others before the next micro-batch."""
        if not self.are_all(params):
            raise ValueError(
                "the gradients or parameters of a step's micro-batches were changed between them: call zero_grad() "
                "after step() only, and restore() to give the step up"
            )

    def refuse_cleared(self, params: Sequence[Tensor], in_place: bool) -> None:
        """ValueError where the closure of the next micro-batch has cleared them.

        in_place: whether its backward adds to them in place, as it does where it builds no graph.
        """
        for param, (grad, version) in zip(params, self._grads, strict=True):
            replaced = in_place and grad is not None and param.grad is not grad and grad._version == version
            if grad is not None and (param.grad is None or replaced):
                refuse_clearing()


@dataclass
class MicroBatches:
    """The micro-batches of a step.

    Attributes:
        count: how many closures a pass evaluates.
        closures, losses: what accumulate() has evaluated.
        in_one_of_several: whether the closure of one is under way, whose gradients add to those before.
        arrivals: what those of a pass have left so far.
        back_at_w: whether the weights have left w' for w until the next comes.
    """

    count: int = 1
    closures: list[Callable[[], Any]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    in_one_of_several: bool = False
    arrivals: Arrivals | None = None
    back_at_w: bool = False
    _bindings: list[Bindings] = field(default_factory=list)

    def keep(self, closures: Sequence[Callable[[], Any]], losses: Sequence[Tensor]) -> None:
        """Closures whose first pass is over, and their losses."""
        self.closures += closures
        self.losses += losses
        self._bindings += map(Bindings, closures)

    def refuse_rebound(self) -> None:
        """ValueError where a closure that is kept would see another micro-batch now."""
        for bindings in self._bindings:
            bindings.refuse_changed()

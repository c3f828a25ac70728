"""Batch-norm running statistics that see each batch once, though the network sees it twice."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol

from torch import nn
from torch.nn.modules import module as modules
from torch.nn.modules.batchnorm import _BatchNorm


class Perturbable(Protocol):
    """What running_stats_once needs of an optimizer.

    Where there may be steps whose only pass is at w', it has ``second_pass`` as well: whether this step's batch has
    been through the network before.
    """

    @property
    def perturbed(self) -> bool:
        """Whether the weights are at w'."""
        ...


class _StatsFreeze:
    """Hooks that keep a batch norm's running statistics as they are, while ``asked()`` is true.

    They belong to a model and to a process: a copy or a pickle of the model gets hooks that do nothing.
    """

    def __init__(self, asked: Callable[[], bool]) -> None:
        self._asked = asked
        self._frozen: set[int] = set()

    def before(self, module: nn.Module, _: object) -> None:
        # Without track_running_stats a training forward neither reads nor writes the statistics.
        if isinstance(module, _BatchNorm) and module.training and module.track_running_stats and self._asked():
            module.track_running_stats = False
            self._frozen.add(id(module))

    def after(self, module: nn.Module, *_: object) -> None:
        if isinstance(module, _BatchNorm) and id(module) in self._frozen:
            module.track_running_stats = True
            self._frozen.discard(id(module))

    def __reduce__(self) -> tuple[Any, ...]:
        return _StatsFreeze, (_never,)


def _never() -> bool:
    return False


class RunningStatsHandle:
    """Undoes running_stats_once by remove(), or at the end of a with block."""

    def __init__(self, model: nn.Module, optimizer: Perturbable) -> None:
        # Weakly, so that neither the model nor a copy of it keeps the optimizer and its state alive; and not by the
        # wrapper that a trainer may have put around it, which nobody else may hold.
        to_optimizer = weakref.ref(getattr(optimizer, "_run", optimizer))

        def in_second_pass() -> bool:
            found = to_optimizer()
            return found is not None and getattr(found, "second_pass", found.perturbed)

        freeze = _StatsFreeze(in_second_pass)
        self._hooks = []
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                self._hooks.append(module.register_forward_pre_hook(freeze.before))
                self._hooks.append(module.register_forward_hook(freeze.after, always_call=True))

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def __enter__(self) -> RunningStatsHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def running_stats_once(model: nn.Module, optimizer: Perturbable) -> RunningStatsHandle:
    """Lets the first pass of each step update the batch-norm running statistics of model, and the second pass not.

    Call it once after both are made; a second call for the same pair changes nothing more. Works in closure and in
    phase style, for BatchNorm1d, 2d, 3d and SyncBatchNorm. A step whose only pass is at w' counts that one. The model
    does not own the optimizer: copies of it (deepcopy, AveragedModel, torch.save) contain nothing of it.

    Args:
        model: the network, or any part of it.
        optimizer: anything with a bool attribute ``perturbed``, such as :class:`sassha_fused.Sassha`; held weakly.

    Returns:
        A handle with ``remove()``, also a context manager.
    """
    return RunningStatsHandle(model, optimizer)


@contextmanager
def running_stats_frozen() -> Iterator[None]:
    """No batch norm of any model updates its running statistics within the block."""
    freeze = _StatsFreeze(lambda: True)
    hooks = [
        modules.register_module_forward_pre_hook(freeze.before),
        modules.register_module_forward_hook(freeze.after, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

"""Batch-norm running statistics that see each batch once, though the network sees it twice."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class Perturbable(Protocol):
    """What running_stats_once needs of an optimizer: whether the weights are at w' right now."""

    @property
    def perturbed(self) -> bool: ...


class RunningStatsHandle:
    """Undoes running_stats_once by remove(), or at the end of a with block."""

    def __init__(self, model: nn.Module, optimizer: Perturbable) -> None:
        self._optimizer = optimizer
        self._held: set[_BatchNorm] = set()
        self._hooks = []
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                self._hooks.append(module.register_forward_pre_hook(self._before))
                self._hooks.append(module.register_forward_hook(self._after, always_call=True))

    def _before(self, module: _BatchNorm, _: object) -> None:
        # Without track_running_stats a training forward neither reads nor writes the statistics.
        if self._optimizer.perturbed and module.training and module.track_running_stats:
            module.track_running_stats = False
            self._held.add(module)

    def _after(self, module: _BatchNorm, *_: object) -> None:
        if module in self._held:
            module.track_running_stats = True
            self._held.discard(module)

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
    phase style, for BatchNorm1d, 2d, 3d and SyncBatchNorm. Returns a handle with ``remove()``, also a context manager.

    Args:
        model: the network, or any part of it.
        optimizer: anything with a bool attribute ``perturbed``, such as :class:`sassha_fused.Sassha`.
    """
    return RunningStatsHandle(model, optimizer)

"""The memory that an action takes and leaves taken, and the tensors that are alive."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def allocated(action: Callable[[], Any]) -> tuple[int, int]:
    """Bytes of tensors that an action leaves behind, and the most there were meanwhile.

    What was there before counts in neither, also where the action frees it.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    changes = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for change in changes:
        now += change
        peak = max(peak, now)
    return now, peak


def live_tensors() -> tuple[int, int]:
    """How many tensors Python knows of, and the bytes behind them."""
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return len(tensors), sum(storages.values())

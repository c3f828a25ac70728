"""A yes or no that the device works out, on its way to the host."""

from __future__ import annotations

import torch
from torch import Tensor


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

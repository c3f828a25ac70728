"""Ctrl-C between two passes, not inside one."""

from __future__ import annotations

import threading

# The functions behind those of the signal module, which spend 10 us a time on making enums of handlers.
from _signal import SIGINT, getsignal, signal  # type: ignore[import-not-found]
from types import FrameType


# A class, since a generator under contextmanager costs twice as much in every step.
class uninterrupted:
    """Runs the block to its end before a SIGINT that arrives meanwhile is handled, by whoever handles it otherwise."""

    def __enter__(self) -> None:
        self._handler = getsignal(SIGINT)
        self._arrived: list[tuple[int, FrameType | None]] = []
        self._holding = callable(self._handler) and threading.current_thread() is threading.main_thread()
        if self._holding:
            signal(SIGINT, self._hold)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        self._arrived.append((number, frame))

    def __exit__(self, *_: object) -> None:
        if self._holding:
            signal(SIGINT, self._handler)
            if self._arrived:
                self._handler(*self._arrived[0])

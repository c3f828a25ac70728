"""Ctrl-C between two passes, not inside one."""

from __future__ import annotations

import threading

# The functions behind those of the signal module, which spend 10 us a time on making enums of handlers.
from _signal import SIGINT, getsignal, signal  # type: ignore[import-not-found]
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Runs the block to its end before a SIGINT that arrives meanwhile is handled, by whoever handles it otherwise."""
    handler = getsignal(SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    arrived: list[tuple[int, FrameType | None]] = []
    signal(SIGINT, lambda number, frame: arrived.append((number, frame)))
    try:
        yield
    finally:
        signal(SIGINT, handler)
        if arrived:
            handler(*arrived[0])

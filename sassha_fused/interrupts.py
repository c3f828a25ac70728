"""Signals: their handlers run between two passes over the parameters, not inside one, and see w, never w'."""

from __future__ import annotations

import signal
import threading
import weakref

# The functions behind those of the signal module, which spend 10 us a time on making enums of handlers.
from _signal import getsignal  # type: ignore[import-not-found]
from _signal import signal as set_handler
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from types import FrameType
from typing import Any, Protocol

# Those by which people and job schedulers ask a training run to stop or to save: where the platform has them.
_SIGNALS = [
    int(getattr(signal, name))
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
]

Handler = Callable[[int, FrameType | None], Any]


def _handlers() -> dict[int, Handler]:
    """The handlers in Python, by signal; none outside the main thread, where Python runs none."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: handler for number in _SIGNALS if callable(handler := getsignal(number))}


# A class, since a generator under contextmanager costs twice as much in every step.
class uninterrupted:
    """Runs the block to its end before a signal that arrives meanwhile is handled, by whoever handles it otherwise."""

    def __enter__(self) -> None:
        self._arrived: list[tuple[int, FrameType | None]] = []
        self._handlers = _handlers()
        for number in self._handlers:
            set_handler(number, self._hold)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        self._arrived.append((number, frame))

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            set_handler(number, handler)
        for number, frame in dict(self._arrived).items():
            self._handlers[number](number, frame)


class Away(Protocol):
    """Something that has taken weights away from w."""

    def back_at_w(self) -> AbstractContextManager[None]:
        """For the time of a block the weights are w."""
        ...


# Steps whose weights are at w', and the handlers that are put off until these are back.
_away: weakref.WeakSet[Any] = weakref.WeakSet()
_put_off: dict[int, Handler] = {}


def leave_w(step: Away) -> None:
    """From now on handlers of signals, which may save a checkpoint, find w in the weights of this step."""
    for number, handler in _handlers().items():
        # Ctrl-C as Python handles it, by KeyboardInterrupt, looks at no weights.
        if handler not in (signal.default_int_handler, _handle_at_w):
            _put_off[number] = handler
            set_handler(number, _handle_at_w)
    if _put_off:
        _away.add(step)


def arrive_at_w(step: Away) -> None:
    """The weights are back: handlers are what they were, once no step is away any more."""
    if not _put_off:
        return
    _away.discard(step)
    if not _away:
        for number, handler in _put_off.items():
            if getsignal(number) == _handle_at_w:
                set_handler(number, handler)
        _put_off.clear()


def _handle_at_w(number: int, frame: FrameType | None) -> None:
    with ExitStack() as back:
        for step in list(_away):
            back.enter_context(step.back_at_w())
        _put_off[number](number, frame)

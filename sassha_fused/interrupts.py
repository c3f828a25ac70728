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

# Those by which people and job schedulers ask a training run to stop or to save, where the platform has them.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
_SIGNALS = [int(getattr(signal, name)) for name in _NAMES if hasattr(signal, name)]

Handler = Callable[[int, FrameType | None], Any]


class Weights(Protocol):
    """What knows where the weights are."""

    @property
    def perturbed(self) -> bool:
        """Whether they are at w'."""
        ...

    def back_at_w(self) -> AbstractContextManager[None]:
        """For the time of a block they are at w."""
        ...


# Whose weights are at w'; and the users' handlers, which are set again once all weights are back at w.
_away: weakref.WeakSet[Any] = weakref.WeakSet()
_waiting: dict[int, Handler] = {}


# Classes, since a generator under contextmanager costs twice as much in every step.
class held_back:
    """Runs the block to its end before a signal that arrives meanwhile is handled."""

    def __enter__(self) -> None:
        self._arrived: dict[int, FrameType | None] = {}
        self._handlers: dict[int, Handler] = {}
        # Elsewhere Python runs no handlers, and lets none be set.
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if callable(handler := getsignal(number)):
                    self._handlers[number] = handler
            _set_all(dict.fromkeys(self._handlers, self._hold), self._handlers)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        self._arrived[number] = frame

    def __exit__(self, *_: object) -> None:
        self._let_go(self._handlers)

    def _let_go(self, handlers: dict[int, Handler]) -> None:
        _set_all(handlers, handlers)
        if self._arrived:
            with ExitStack() as arrived:  # which runs them all, also where one raises
                for number, frame in reversed(self._arrived.items()):
                    arrived.callback(handlers[number], number, frame)


class uninterrupted(held_back):
    """The same of a pass of a step, and so not within another.

    Where the block has left the weights at w', handlers, which may save a checkpoint, find them at w until a later
    block brings them back. Ctrl-C as Python handles it, by KeyboardInterrupt, looks at no weights.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weakref.ref(weights)  # which owns this

    def __exit__(self, *_: object) -> None:
        handlers, own = self._handlers, {}
        if len(handlers) > 1 or signal.default_int_handler not in handlers.values():
            handlers = {number: _waiting.get(number, h) if h is _handle_at_w else h for number, h in handlers.items()}
            own = {number: h for number, h in handlers.items() if h is not signal.default_int_handler}
        if own or (_away and self._handlers):  # other threads leave the handlers alone
            weights: Any = self._weights()
            (_away.add if weights.perturbed else _away.discard)(weights)
            if _away:
                _waiting.update(own)
                handlers.update(dict.fromkeys(own, _handle_at_w))
        self._let_go(handlers)


def _set_all(handlers: dict[int, Handler], otherwise: dict[int, Handler]) -> None:
    """Sets these, or, where a handler interrupts and raises meanwhile, the others."""
    try:
        for number, handler in handlers.items():
            set_handler(number, handler)
    except BaseException:
        for number, handler in otherwise.items():
            set_handler(number, handler)
        raise


def _handle_at_w(number: int, frame: FrameType | None) -> None:
    handler = _waiting[number]
    with ExitStack() as back:
        for weights in list(_away):
            back.enter_context(weights.back_at_w())
        handler(number, frame)

"""Something happens before a given line of the package is run."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import sassha_fused

PACKAGE = os.path.dirname(sassha_fused.__file__)
Line = tuple[str, int]


@contextmanager
def tracing(visit: Callable[[Line], None], folder: str = PACKAGE) -> Iterator[None]:
    """Calls visit before every line of the package, or of another folder, that is run."""

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.startswith(folder):
            return None
        if event == "line":
            visit((os.path.relpath(frame.f_code.co_filename, folder), frame.f_lineno))
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(previous)


def signal_at(line: Line, reached: list[Line], number: int = signal.SIGINT) -> Callable[[Line], None]:
    """The signal when this line is reached for the first time."""

    def visit(now: Line) -> None:
        if now == line and not reached:
            reached.append(now)
            signal.raise_signal(number)

    return visit

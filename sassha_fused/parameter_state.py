"""What opt.state holds for a parameter, and how the flat state learns that somebody has edited it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Edits:
    """Whether somebody has edited the state of a parameter since it was laid out."""

    def __init__(self) -> None:
        self.made = False


class ParameterState(dict[str, Any]):
    """``opt.state[p]``: a dict that notes when its owner edits it. Copies and pickles are plain dicts."""

    def __init__(self, entries: dict[str, Any], edits: Edits) -> None:
        super().__init__(entries)
        self._edits = edits

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def _noting(name: str) -> Callable[..., Any]:
    edit = getattr(dict, name)

    def noted(self: ParameterState, *arguments: Any, **named: Any) -> Any:
        self._edits.made = True
        return edit(self, *arguments, **named)

    return noted


for _name in ("__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update"):
    setattr(ParameterState, _name, _noting(_name))

"""opt.state and what it holds for a parameter, and how the flat state learns that somebody has edited them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class Edits:
    """Whether somebody has edited the state since it was laid out."""

    def __init__(self) -> None:
        self.made = False


class ParameterState(dict[str, Any]):
    """``opt.state[p]``: a dict that notes when its owner edits it. Copies and pickles are plain dicts."""

    def __init__(self, entries: Mapping[str, Any], edits: Edits) -> None:
        super().__init__(entries)
        self.edits = edits

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


class States(defaultdict[Tensor, dict[str, Any]]):
    """``opt.state``: a defaultdict that notes when its owner edits it. Copies and pickles are plain ones.

    Attributes:
        handed_out: whether anybody else has had it, and may write to its tensors, or to those that come later.
    """

    def __init__(self, entries: Mapping[Tensor, dict[str, Any]]) -> None:
        super().__init__(dict, entries)
        self.edits = Edits()
        self.edits.made = True
        self.handed_out = False

    def __reduce__(self) -> tuple[Any, ...]:
        return defaultdict, (dict, dict(self))

    def copy(self) -> defaultdict[Tensor, dict[str, Any]]:  # type: ignore[override]
        """As that of any other defaultdict, and one that notes nothing."""
        return defaultdict(dict, self)

    __copy__ = copy  # type: ignore[assignment]

    def __or__(self, other: Any) -> Any:
        return self.copy() | other

    def __ror__(self, other: Any) -> Any:
        return other | self.copy()

    def lay_out(self, laid_out: Mapping[Tensor, dict[str, Any]]) -> None:
        """Takes in the views of these parameters, beside what somebody else has put there; notes edits from now on."""
        self.edits = Edits()
        for param, views in laid_out.items():
            super().__setitem__(param, ParameterState({**self.get(param, {}), **views}, self.edits))


def _noting(of: type, name: str) -> Callable[..., Any]:
    edit = getattr(of, name)

    def noted(self: Any, *arguments: Any, **named: Any) -> Any:
        self.edits.made = True
        return edit(self, *arguments, **named)

    return noted


for _name in ("__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update"):
    setattr(ParameterState, _name, _noting(dict, _name))
    setattr(States, _name, _noting(defaultdict, _name))


def check_shape(param: Tensor, shape: torch.Size) -> None:
    """ValueError where a parameter has another shape than its state."""
    if param.shape != shape:
        raise ValueError(f"a parameter now has shape {tuple(param.shape)}, but its state has {tuple(shape)}")


def complete_state(states: dict[Tensor, dict[str, Any]], param: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """What states holds of a parameter, beside what other people may have put there; nothing where it was emptied."""
    state = states.get(param, {})
    missing = [name for name in names if name not in state]
    if len(missing) == len(names):
        return {}
    if missing:
        raise ValueError(
            f"opt.state of a parameter of shape {tuple(param.shape)} has no {', '.join(missing)} any more: put it "
            "back, or empty the whole entry to have it start anew"
        )
    return state

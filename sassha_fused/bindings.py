"""Closures that are kept for a second pass: what they read of the variables around them must not change meanwhile."""

from __future__ import annotations

import dis
import functools
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any


class Bindings:
    """The variables that a function reads and does not write, of the scopes around it, as they are now.

    Python looks them up when the function runs: a lambda made in a loop sees the loop's last batch.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._values = _variables(function)

    def refuse_changed(self) -> None:
        """ValueError naming one that has changed."""
        for name, value in _variables(self._function).items():
            was = self._values.get(name, value)
            if value is not was and not (
                type(value) is type(was) and type(value) in (int, float, str) and value == was
            ):
                raise ValueError(
                    f"the closure given to accumulate() reads {name!r}, which has changed since, so that its second "
                    f"pass would see another micro-batch than its first: bind it, as in lambda {name}={name}: ..., or "
                    "by functools.partial"
                )


def _variables(function: Callable[..., Any]) -> dict[str, Any]:
    if not isinstance(function, FunctionType):
        return {}
    reads, writes = _names(function.__code__)
    around = {name: function.__globals__[name] for name in reads if name in function.__globals__}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            around[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            around.pop(name, None)
    return {name: around[name] for name in reads - writes if name in around}


@functools.cache
def _names(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """Names of variables around a function that it reads, and that it writes, functions within it included."""
    reads, writes = set(code.co_freevars), set[str]()
    for instruction in dis.get_instructions(code):
        if instruction.opname == "LOAD_GLOBAL":
            reads.add(instruction.argval)
        elif instruction.opname == "STORE_GLOBAL" or (
            instruction.opname == "STORE_DEREF" and instruction.argval in code.co_freevars
        ):
            writes.add(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner_reads, inner_writes = _names(constant)
            own = set(code.co_cellvars)
            reads |= inner_reads - own
            writes |= inner_writes - own
    return frozenset(reads), frozenset(writes)

"""Triton's interpreter, several times as fast as it comes (for tests only)."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def speed_up_interpreter() -> None:
    """Leaves out what the interpreter does again and again to no avail."""
    # Overflows are looked for, but told only in debug mode.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    _patch_once()


def _patch_once() -> None:
    # triton.language is changed for the interpreter at the start of every kernel and at each call of a function.
    original = interpreter._patch_lang
    patched: set[Any] = set()
    nothing = SimpleNamespace(restore=lambda: None)

    @functools.cache
    def modules(fn: Any) -> frozenset[Any]:
        return frozenset(m for m in fn.__globals__.values() if inspect.ismodule(m) and m in (tl, tl.core))

    def patch(fn: Any) -> Any:
        if not modules(fn) <= patched:
            patched.update(modules(fn))
            original(fn)
        return nothing

    interpreter._patch_lang = patch

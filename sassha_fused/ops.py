"""The operator contract in Python: which backend serves which device, and fake kernels.

Every backend has the five functions of :class:`Operators`, with the arguments of the schemas in csrc/schema.cpp.
``sassha_fused.eager`` documents them one by one.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from . import eager
from .validation import check_choice

NAMES = ("grad_norm", "perturb_", "rademacher_", "hutchinson_", "update_")


class Operators(Protocol):
    """What a backend provides: each function is one pass over all the tensors it is given."""

    grad_norm: Callable[..., Tensor]
    perturb_: Callable[..., None]
    rademacher_: Callable[..., None]
    hutchinson_: Callable[..., None]
    update_: Callable[..., None]


def _load_extension() -> str | None:
    """Loads sassha_fused._C, which registers the schemas and the CPU kernels; returns the reason why it could not."""
    libraries = sorted(Path(__file__).parent.glob("_C*.so"))
    if not libraries:
        return "the extension sassha_fused._C was not built: reinstall sassha_fused where a C++ compiler is found"
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:
        return f"the extension {libraries[0].name} does not load: {error}"
    _register_fakes()
    return None


def _register_fakes() -> None:
    def grad_norm(grads: list[Tensor], params: list[Tensor], adaptive: bool) -> Tensor:
        return grads[0].new_empty((), dtype=torch.float64)

    def writes_in_place(*_: Any) -> None:
        return None

    for name in NAMES:
        torch.library.register_fake(f"sassha_fused::{name}", grad_norm if name == "grad_norm" else writes_in_place)


_EXTENSION_MISSING = _load_extension()


def _compiled() -> Operators:
    namespace = torch.ops.sassha_fused
    return cast(Operators, SimpleNamespace(**{name: getattr(namespace, name).default for name in NAMES}))


# The backends of each device type, best first; eager serves every device.
_PREFERRED = {"cpu": ("cpu", "eager")}
_LOADERS: dict[str, Callable[[], Operators]] = {"cpu": _compiled, "eager": lambda: cast(Operators, eager)}
_DEVICES = {"cpu": ("cpu",)}
_warned: set[str] = set()


def available_backends() -> dict[str, str | None]:
    """The backends by name: None where one can be used, else the reason why it cannot."""
    return {"cpu": _EXTENSION_MISSING, "eager": None}


def check_backend(name: str, argument: str = "backend") -> None:
    """ValueError unless name is "auto" or a backend, with the reason if it is one that cannot be used here."""
    backends = available_backends()
    check_choice(argument, name, ("auto", *backends))
    reason = backends.get(name)
    if reason is not None:
        raise ValueError(f"{argument} {name!r} cannot be used: {reason}")


def operators(name: str, device: torch.device) -> Operators:
    """The operators that serve tensors on a device: those of the named backend, or with "auto" of the best one there.

    The environment variable SASSHA_FUSED_BACKEND takes the place of "auto".

    Raises:
        ValueError: the backend is unknown, cannot be used here, or does not serve this device.
    """
    argument = "backend"
    if name == "auto" and os.environ.get("SASSHA_FUSED_BACKEND"):
        argument, name = "SASSHA_FUSED_BACKEND", os.environ["SASSHA_FUSED_BACKEND"]
    check_backend(name, argument)
    if name != "auto":
        if device.type not in _DEVICES.get(name, (device.type,)):
            raise ValueError(f"{argument} {name!r} cannot be used: it does not serve tensors on {device}")
        return _LOADERS[name]()
    for candidate in _PREFERRED.get(device.type, ("eager",)):
        reason = available_backends()[candidate]
        if reason is None:
            return _LOADERS[candidate]()
        if candidate not in _warned:
            _warned.add(candidate)
            warnings.warn(f"sassha_fused runs without its {candidate} kernels, much slower: {reason}", stacklevel=2)
    raise AssertionError("eager serves every device")

"""The operator contract in Python: which backend serves which device, and fake kernels.

Every backend has the functions of :class:`Operators`, with the arguments of the schemas in csrc/schema.cpp.
``sassha_fused.eager`` documents them one by one.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from . import eager
from .checks import check_choice

NAMES = ("grad_norm", "perturb_", "rademacher_", "hutchinson_", "block_average_", "update_")


class Operators(Protocol):
    """What a backend provides: each function is one pass over all the tensors it is given."""

    grad_norm: Callable[..., Tensor]
    perturb_: Callable[..., None]
    rademacher_: Callable[..., None]
    hutchinson_: Callable[..., None]
    block_average_: Callable[..., None]
    update_: Callable[..., None]


def _load_extension(name: str) -> str | None:
    """Loads sassha_fused.<name>; returns the reason why it could not."""
    libraries = sorted(Path(__file__).parent.glob(f"{name}*.so"))
    if not libraries:
        return f"the extension sassha_fused.{name} was not built: reinstall sassha_fused where {_NEEDS[name]} is found"
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:
        return f"the extension {libraries[0].name} does not load: {error}"
    return None


_NEEDS = {"_C": "a C++ compiler", "_cuda": "nvcc"}


def _register_fakes() -> None:
    def grad_norm(grads: list[Tensor], params: list[Tensor], layouts: Tensor | None, adaptive: bool) -> Tensor:
        return grads[0].new_empty((), dtype=torch.float64)

    def writes_in_place(*_: Any) -> None:
        return None

    for name in NAMES:
        torch.library.register_fake(f"sassha_fused::{name}", grad_norm if name == "grad_norm" else writes_in_place)


# The schemas and the CPU kernels.
_EXTENSION_MISSING = _load_extension("_C")
if _EXTENSION_MISSING is None:
    _register_fakes()


@functools.cache
def _load_cuda() -> str | None:
    return _load_extension("_cuda")


@functools.cache
def _refusal(backend: str, device: int) -> str | None:
    """Why a GPU runs no kernel: another architecture than was built for, a driver that is too old, no C compiler."""
    try:
        BACKENDS[backend].load().grad_norm([torch.ones(1, device=torch.device("cuda", device))], [], None, False)
    except Exception as error:  # Triton's are of many types
        return f"the kernels do not run on cuda:{device}: {' '.join((str(error) or repr(error)).split())}"
    return None


def _refusal_of_current_device(backend: str) -> str | None:
    # Not before somebody uses the device: whoever only asks should not have to pay for its initialisation.
    return _refusal(backend, torch.cuda.current_device()) if torch.cuda.is_initialized() else None


def _cuda_missing() -> str | None:
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    reason = _EXTENSION_MISSING or _load_cuda()
    if reason is not None:
        return reason
    if not torch.cuda.is_available():
        return "no CUDA device is available"
    return _refusal_of_current_device("cuda")


def _compiled() -> Operators:
    namespace = torch.ops.sassha_fused
    return cast(Operators, SimpleNamespace(**{name: getattr(namespace, name).default for name in NAMES}))


# Triton's own switch: its kernels then run as Python, on tensors of the CPU.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def _load_triton() -> Operators:
    from . import triton_kernels

    if triton_kernels.INTERPRETED != _INTERPRETED:
        raise ImportError("TRITON_INTERPRET has changed since sassha_fused was imported")
    return cast(Operators, triton_kernels)


def _triton_missing() -> str | None:
    try:
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed: pip install triton"
        if not _INTERPRETED and not torch.cuda.is_available():
            return "no GPU is available; TRITON_INTERPRET=1 in the environment runs the kernels on the CPU, very slowly"
        _load_triton()
    except Exception as error:  # an import may fail in any way, and must not take the other backends along
        return f"the kernels do not load: {error!r}"
    return None if _INTERPRETED else _refusal_of_current_device("triton")


@dataclass(frozen=True)
class Backend:
    """Where a set of operators comes from.

    Attributes:
        devices: the types of the devices that it serves; None for any.
        missing: the reason why it cannot be used here, or None.
        load: its operators.
        automatic: whether "auto" may choose it.
    """

    devices: tuple[str, ...] | None
    missing: Callable[[], str | None]
    load: Callable[[], Operators]
    automatic: bool = True

    def serves(self, device: torch.device) -> bool:
        """Whether it works on tensors of this device."""
        return self.devices is None or device.type in self.devices


# Best first.
BACKENDS = {
    "cuda": Backend(("cuda",), _cuda_missing, _compiled),
    "triton": Backend(("cpu",) if _INTERPRETED else ("cuda",), _triton_missing, _load_triton, not _INTERPRETED),
    "cpu": Backend(("cpu",), lambda: _EXTENSION_MISSING, _compiled),
    "eager": Backend(None, lambda: None, lambda: cast(Operators, eager)),
}
_warned: set[str] = set()


def available_backends() -> dict[str, str | None]:
    """The backends by name: None where one can be used, else the reason why it cannot."""
    return {name: backend.missing() for name, backend in BACKENDS.items()}


def check_backend(name: str, argument: str = "backend") -> None:
    """ValueError unless name is "auto" or a backend, with the reason if it is one that cannot be used here."""
    check_choice(argument, name, ("auto", *BACKENDS))
    reason = BACKENDS[name].missing() if name in BACKENDS else None
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
        if not BACKENDS[name].serves(device):
            raise ValueError(f"{argument} {name!r} cannot be used: it does not serve tensors on {device}")
        return BACKENDS[name].load()
    reasons: list[str] = []
    for candidate, backend in BACKENDS.items():
        if not (backend.automatic and backend.serves(device)):
            continue
        reason = backend.missing()
        if reason is None:
            if candidate == "eager" and reasons:
                _warn_once(f"sassha_fused runs in plain torch, much slower than its kernels: {'; '.join(reasons)}")
            return backend.load()
        reasons.append(f"{candidate}: {reason}")
    raise AssertionError("eager serves every device")


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=3)

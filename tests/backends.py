"""The backends under test: a new one joins every conformance test by adding its name here."""

import pytest
import torch

from sassha_fused import ops
from sassha_fused.ops import Operators, operators
from tests import emulation

ops.BACKENDS[emulation.BACKEND] = ops.Backend(("cpu",), lambda: None, emulation.emulated)

# Each backend's name, and the device whose tensors it is tested on.
BACKENDS = {"eager": "cpu", "cpu": "cpu", emulation.BACKEND: "cpu"}
if torch.cuda.is_available():
    BACKENDS["cuda"] = "cuda"

# What the others must equal bit for bit, where the arithmetic fixes every bit.
BASELINE = "eager"


def marks_of(backend: str) -> list[pytest.MarkDecorator]:
    """The marks of a test of this backend."""
    return [pytest.mark.gpu] if BACKENDS[backend] == "cuda" else []


_PARAMETERS = [pytest.param(name, marks=marks_of(name)) for name in BACKENDS]
each_backend = pytest.mark.parametrize("backend", _PARAMETERS)
each_other_backend = pytest.mark.parametrize("backend", [p for p in _PARAMETERS if p.values != (BASELINE,)])


def operators_of(backend: str) -> Operators:
    """The operators of a backend; ValueError with the reason where it cannot be used."""
    return operators(backend, torch.device(BACKENDS[backend]))


def evaluation_on(backend: str, evaluation: int) -> torch.Tensor:
    """The index of a Hessian evaluation as the operators of a backend take it."""
    return torch.tensor(evaluation, device=BACKENDS[backend])

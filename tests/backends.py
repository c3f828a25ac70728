"""The backends under test: a new one joins every conformance test by adding its name here."""

import pytest
import torch

from sassha_fused.ops import Operators, operators

# Each backend's name, and the device whose tensors it is tested on.
BACKENDS = {"eager": "cpu", "cpu": "cpu"}

# What the others must equal bit for bit, where the arithmetic fixes every bit.
BASELINE = "eager"

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_other_backend = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != BASELINE])


def operators_of(backend: str) -> Operators:
    """The operators of a backend; ValueError with the reason where it cannot be used."""
    return operators(backend, torch.device(BACKENDS[backend]))

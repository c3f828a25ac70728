"""List arguments of an operator as dense memory: what the kernels see of torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..layout import is_dense


def dense(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors; in place of those whose elements do not fill their memory, row-major copies."""
    return [t if is_dense(t) else t.detach().contiguous() for t in tensors]


def laid_out_like(models: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors; in place of those with other strides than their dense model, copies with its strides."""
    return [
        t if t.stride() == model.stride() else torch.empty_like(model, dtype=t.dtype).copy_(t)
        for model, t in zip(models, tensors, strict=True)
    ]


def write_back(tensors: Sequence[Tensor], worked_on: Sequence[Tensor]) -> None:
    """Copies what was written to dense copies of the tensors to these."""
    for tensor, copy in zip(tensors, worked_on, strict=True):
        if copy is not tensor:
            tensor.copy_(copy)

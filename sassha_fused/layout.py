"""Where a parameter's elements lie: memory order where it is dense, row-major where it is not; and how its state is."""

from __future__ import annotations

import torch
from torch import Tensor


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlap, in whatever order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def empty_dense(param: Tensor) -> Tensor:
    """An uninitialised tensor of the parameter's shape whose memory has the order of the parameter's elements."""
    memory_format = torch.preserve_format if is_dense(param) else torch.contiguous_format
    return torch.empty_like(param, memory_format=memory_format, requires_grad=False)


def view_of(flat: Tensor, offset: int, param: Tensor) -> Tensor:
    """The part of a flat buffer that belongs to a parameter, with its shape, element for element in its order."""
    part = flat[offset : offset + param.numel()]
    if not is_dense(param):
        return part.view(param.shape)
    return part.as_strided(param.shape, param.stride(), part.storage_offset())


def state_dtype(param: Tensor) -> torch.dtype:
    """The dtype of a parameter's state, and of the arithmetic on it."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32

"""The fused multiply-add of float32 tensors, which torch does not have: of them every backend is made."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .layout import lacks_float64


def nearest_float32(x: float) -> float:
    """x rounded to float32."""
    return ctypes.c_float(x).value


def fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """a b + c, rounded to float32 once; on a device without float64 twice.

    a is a float32 tensor; b and c are too, broadcast with it, or numbers that float32 holds exactly.
    """
    if lacks_float64(a.device):
        return a * b + c
    # The product of two floats is exact in float64. The sum's error (Knuth) makes it odd: the sum cut off, its last bit
    # set where anything was lost. Rounded to float32 that is the exact sum, rounded once (Boldo and Melquiond).
    product = a.double() * _double(b)
    addend = _double(c)
    total = product + addend
    added = total - product
    error = (product - (total - added)) + (addend - added)
    bits = total.view(torch.int64)
    beyond = (bits ^ error.view(torch.int64)) >> 63  # -1 where the error has the other sign, and total is too long
    # The error of a total that is not finite is NaN, and does not change it.
    return torch.where(error.abs() > 0, ((bits + beyond) | 1).view(torch.float64), total).float()


def _double(x: Tensor | float) -> Tensor | float:
    return x.double() if isinstance(x, Tensor) else x

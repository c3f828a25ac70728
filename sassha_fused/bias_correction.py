r""":math:`1 - \beta^t` by tensors of counts, step by step as csrc/math/sassha.h: in float64 the same bits.

Libraries' powers differ in the last bit, which shows in one of 250 corrections.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from .layout import lacks_float64

# Times this, a float64 loses its lower half to rounding.
_SPLITTER = 2.0**27 + 1.0

# Powers below are lost beside 1.
_NEGLIGIBLE = 2.0**-60


def bias_correction(beta: float, count: Tensor) -> Tensor:
    """1 - beta^count of int64 counts of 0 or more, in the widest dtype of their device."""
    if lacks_float64(count.device):
        # In float32 the difference would be off by the rounding of 1, which is much of it at first.
        return -torch.expm1(count.float() * math.log(beta)) if beta > 0 else torch.ones_like(count, dtype=torch.float32)
    squares = _squares(beta)
    high = torch.ones_like(count, dtype=torch.float64)
    low = torch.zeros_like(high)
    for bit, (square, square_low) in enumerate(squares):
        has_bit = count.bitwise_and(1 << bit) != 0
        times_square = _product(high, low, square, square_low)
        high, low = torch.where(has_bit, times_square[0], high), torch.where(has_bit, times_square[1], low)
    return 1 - torch.where(count < 1 << len(squares), high, 0.0)


@functools.lru_cache(maxsize=64)
def _squares(beta: float) -> list[tuple[float, float]]:
    """beta, its square, the square of that, ... in two parts each, as long as they count."""
    squares, square, low = [], beta, 0.0
    while square > _NEGLIGIBLE:
        squares.append((square, low))
        square, low = _product(square, low, square, low)
    return squares


def _product(a: Any, a_low: Any, b: Any, b_low: Any) -> tuple[Any, Any]:
    """(a + a_low) (b + b_low), in two parts too; of numbers and of tensors."""
    product = a * b
    a_head, b_head = _head(a), _head(b)
    a_tail, b_tail = a - a_head, b - b_head
    error = a_head * b_head - product + a_head * b_tail + a_tail * b_head + a_tail * b_tail  # of product: exact
    rest = error + (a * b_low + a_low * b)
    total = product + rest
    return total, rest - (total - product)


def _head(x: Any) -> Any:
    """The upper half of the digits (Dekker)."""
    scaled = x * _SPLITTER
    return scaled - (scaled - x)

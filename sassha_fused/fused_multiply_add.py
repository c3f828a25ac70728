"""draft"""

import torch

from .layout import lacks_float64


def fma(a, b, c):
    if lacks_float64(a.device):
        return a * b + c
    p = a.double() * (b.double() if isinstance(b, torch.Tensor) else b)
    c = c.double()
    s = p + c
    bb = s - p
    e = (p - (s - bb)) + (c - bb)
    bits = s.view(torch.int64) if s.dim() else s.reshape(1).view(torch.int64).reshape(())
    fix = ((e > 0) | (e < 0)) & ((bits & 1) == 0)
    step = torch.where((e > 0) == (s > 0), 1, -1)
    return torch.where(fix, bits + step, bits).view(torch.float64).float()

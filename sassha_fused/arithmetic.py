"""The arithmetic of one parameter in plain torch: operation for operation that of csrc/math/sassha.h."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .bias_correction import bias_correction
from .checks import ASCENTS, BIAS_CORRECTIONS
from .fused_multiply_add import fma, nearest_float32
from .layout import wide_dtype
from .power import raised
from .settings import DIRECTIONS, SECOND_AVERAGES, RowSettings, Settings


def _raise(x: Tensor, power: float) -> Tensor:
    if power == 1.0:
        return x
    if power == 0.5:
        # Through float64 also float32: torch's float32 square root on CPU is not always the nearest float.
        return x.to(wide_dtype(x.device)).sqrt().to(x.dtype)
    return raised(x, power) if x.dtype == torch.float32 else (x.log2() * power).exp2()


class _Parts(NamedTuple):
    """A number as the sum of two of the dtype that is computed in; of float64 the first is the number."""

    high: Tensor | float
    low: Tensor | float


def _parts(x: Tensor | float, dtype: torch.dtype) -> _Parts:
    if isinstance(x, Tensor):
        high = x.to(dtype)
        return _Parts(high, (x - high.to(x.dtype)).to(dtype))
    nearest = x if dtype == torch.float64 else nearest_float32(x)
    return _Parts(nearest, nearest_float32(x - nearest))


def _parts_of_each(x: Tensor, dtype: torch.dtype) -> list[_Parts]:
    return [_parts(element, dtype) for element in x.unbind()]


def _average(mean: Tensor, beta: _Parts, x: Tensor, weight: _Parts) -> Tensor:
    """beta mean + weight x"""
    if mean.dtype == torch.float64:
        return beta.high * mean + weight.high * x
    return fma(mean, beta.high, fma(x, weight.high, fma(mean, beta.low, x * weight.low)))


def _times(x: Tensor, factor: _Parts) -> Tensor:
    return x * factor.high if x.dtype == torch.float64 else fma(x, factor.high, x * factor.low)


def _times_plus(x: Tensor, factor: _Parts, y: Tensor | float) -> Tensor:
    """factor x + y"""
    return x * factor.high + y if x.dtype == torch.float64 else fma(x, factor.high, fma(x, factor.low, y))


def _moved(w: Tensor, direction: Tensor, decay: _Parts, step_size: _Parts) -> Tensor:
    """decay w - step_size direction"""
    if w.dtype == torch.float64:
        return w * decay.high - step_size.high * direction
    rest = fma(w, decay.low, -(direction * step_size.low))
    return fma(w, decay.high, fma(direction, -step_size.high, rest))


def second_average(hessian: Tensor, x: Tensor, settings: Settings) -> Tensor:
    r""":math:`D \leftarrow \beta_2 D + (1 - \beta_2) |x|`, or of :math:`x^2`, or of x."""
    kind = SECOND_AVERAGES[int(settings.second_average)]
    x = x.to(hessian.dtype)
    # Of a square that is infinite the average would be NaN.
    square = (x * x).clamp(max=torch.finfo(x.dtype).max)
    value = x if kind == "signed" else x.abs() if kind == "absolute" else square
    weight = -(1 - settings.beta2) if kind == "signed" and settings.maximize else 1 - settings.beta2
    return _average(hessian, _parts(settings.beta2, x.dtype), value, _parts(weight, x.dtype))


class Row(NamedTuple):
    """What the elements of a parameter share in a step: UpdateScalars in csrc/math/sassha.h."""

    decay: _Parts
    step_size: _Parts
    factor: _Parts
    perturbation: Tensor


def rows_of(
    step: Tensor, hessian_step: Tensor, own: Tensor, norm: Tensor | None, settings: Settings, dtype: torch.dtype
) -> list[Row]:
    """Of each row, with its counts behind the step; norm: that of the perturbation which w is worked out from."""
    lr, weight_decay, _ = own.unbind(1)
    none = torch.zeros_like(lr)
    perturbations = (none if norm is None else perturbation_factors(own, norm, settings)).to(dtype)
    if DIRECTIONS[int(settings.direction)] == "plain":
        columns = (weight_decay, lr, torch.where(step == 1, 1.0, torch.full_like(lr, 1.0 - settings.dampening)))
    else:
        c1 = c2 = torch.ones_like(lr)
        if BIAS_CORRECTIONS[int(settings.bias_correction)] != "none":
            c1, c2 = bias_correction(settings.beta1, step), bias_correction(settings.beta2, hessian_step)
        columns = (1 - lr * weight_decay, lr / c1, 1 / c2)
    return [Row(*row) for row in zip(*(_parts_of_each(column, dtype) for column in columns), perturbations.unbind())]


def updated(
    w: Tensor, g: Tensor, average: Tensor, hessian: Tensor | None, row: Row, settings: Settings
) -> tuple[Tensor, Tensor]:
    """The new weights and the new first average; hessian: the second as it is behind this step."""
    beta1 = _parts(settings.beta1, average.dtype)
    if hessian is None:
        gradient = _times_plus(w, row.decay, -g if settings.maximize else g)
        average = _average(average, beta1, gradient, row.factor)
        direction = _times_plus(average, beta1, gradient) if settings.nesterov else average
        return _moved(w, direction, _Parts(1.0, 0.0), row.step_size), average
    weight = -(1 - settings.beta1) if settings.maximize else 1 - settings.beta1
    average = _average(average, beta1, g, _parts(weight, average.dtype))
    eps = _parts(settings.eps, average.dtype).high
    if DIRECTIONS[int(settings.direction)] == "clipped":
        factor = _Parts(_parts(settings.clip_threshold, average.dtype).high, 0.0)
        direction = (average / _times_plus(torch.where(hessian > 0, hessian, 0.0), factor, eps)).clamp(-1, 1)
    else:
        direction = average / (_raise(_times(hessian, row.factor), settings.hessian_power) + eps)
    return _moved(w, direction, row.decay, row.step_size), average


def perturbation_factors(per_row: Tensor, norm: Tensor, settings: Settings) -> Tensor:
    r""":math:`\rho / (N + 10^{-12})` of each row, with the sign of what the perturbation points along."""
    factors = per_row.select(1, RowSettings._fields.index("rho")) * (1 / (norm + 1e-12))
    return -factors if settings.maximize or ASCENTS[int(settings.ascent)] == "momentum" else factors

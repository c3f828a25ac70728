"""The table of what each parameter has of its own, on the device: csrc/math/settings.h names its columns."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from .layout import has_memory, wide_dtype
from .settings import RowSettings

_LR = RowSettings._fields.index("lr")


def sent(device: torch.device, scalar: Tensor) -> Tensor:
    """A scalar on another device; waits for it only where it goes to the host, which may read it at once."""
    return scalar.to(device, non_blocking=device.type != "cpu")


class RowTable:
    """A row of RowSettings for each parameter of a bucket, from the groups that the parameters belong to.

    Attributes:
        values: float64 ``[rows, 3]``; float32 where a device has no float64.
        groups: the groups, each once, in the order of the rows.
        rates: the learning rates that are tensors.
    """

    def __init__(self, group_of_row: Sequence[dict[str, Any]], device: torch.device) -> None:
        runs = [list(run) for _, run in groupby(group_of_row, key=id)]
        self.groups = [run[0] for run in runs]
        self._lengths = [len(run) for run in runs]
        self.values = torch.zeros(
            (len(group_of_row), len(RowSettings._fields)), dtype=wide_dtype(device), device=device
        )
        self._written: list[RowSettings] = []
        self.rates: list[Tensor] = []
        self.write()

    def write(self) -> None:
        """Takes in what the groups say now, by one copy where it has changed."""
        # A learning rate that is a tensor comes later, as its value may change without anybody's notice. Where there
        # was one, the table has its value, which nobody knows here.
        rows = [RowSettings.of(group) for group in self.groups]
        if rows != self._written or self.rates:
            values = torch.tensor(
                [row for row, length in zip(rows, self._lengths) for _ in range(length)], dtype=self.values.dtype
            )
            if self.values.is_cuda and has_memory(values):
                values = values.pin_memory()  # else the copy would wait for the device
            self.values.copy_(values, non_blocking=True)
            self._written = rows
        rates = [group["lr"] for group in self.groups]
        self.rates = [lr for lr in rates if isinstance(lr, Tensor)]
        if self.rates:
            rated = [isinstance(lr, Tensor) for lr, length in zip(rates, self._lengths) for _ in range(length)]
            lengths = [length for lr, length in zip(rates, self._lengths) if isinstance(lr, Tensor)]
            which = [i for i, length in enumerate(lengths) for _ in range(length)]
            device = self.values.device
            self._rated_rows = torch.tensor([row for row, is_rated in enumerate(rated) if is_rated], device=device)
            self._rate_of_row = torch.tensor(which, device=device)

    def take_in_rates(self) -> Tensor:
        """Copies the learning rates that are tensors into the table, on the device.

        Returns:
            A 0-d tensor that is not finite where one of them is not.
        """
        device = self.values.device
        rates = torch.cat([sent(device, lr.detach().reshape(1)) for lr in self.rates]).to(self.values.dtype)
        self.values.select(1, _LR).index_copy_(0, self._rated_rows, rates.index_select(0, self._rate_of_row))
        return rates.sum()

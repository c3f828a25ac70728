"""The table of what each parameter has of its own, on the device: csrc/math/settings.h names its columns."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, groupby
from typing import Any

import torch
from torch import Tensor

from .layout import has_memory, sent, wide_dtype
from .settings import RowSettings

_LR = RowSettings._fields.index("lr")


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
        self._group_of_row = [i for i, run in enumerate(runs) for _ in run]
        self._by_row = torch.tensor(self._group_of_row, dtype=torch.int64, device="cpu")
        self.values = torch.zeros(
            (len(group_of_row), len(RowSettings._fields)), dtype=wide_dtype(device), device=device
        )
        self.rates: list[Tensor] = []
        self._written: list[RowSettings] = []
        self._rated: list[bool] = []
        self.write()

    def write(self) -> None:
        """Takes in what the groups say now, by one copy where it has changed."""
        # A learning rate that is a tensor comes later, as its value may change without anybody's notice. Where there
        # was one, the table has its value, which nobody knows here.
        rows = [RowSettings.of(group) for group in self.groups]
        if rows != self._written or self.rates:
            self._written = []  # until all is done: somebody may interrupt
            of_groups = torch.tensor(rows, dtype=self.values.dtype, device="cpu")
            values = of_groups.index_select(0, self._by_row)
            if self.values.is_cuda and has_memory(values):
                values = values.pin_memory()  # else the copy would wait for the device
            self.values.copy_(values, non_blocking=True)
            self._written = rows
        rated = [isinstance(group["lr"], Tensor) for group in self.groups]
        self.rates = [group["lr"] for group, is_rated in zip(self.groups, rated) if is_rated]
        self._find_rated(rated)

    def _find_rated(self, rated: list[bool]) -> None:
        # Only where others are rated now: CUDA graphs go on reading these two.
        if rated == self._rated:
            return
        self._rated = []
        place = count()
        rate_of_group = [next(place) if is_rated else -1 for is_rated in rated]
        rows = [row for row, group in enumerate(self._group_of_row) if rated[group]]
        rates = [rate_of_group[self._group_of_row[row]] for row in rows]
        self._rows = torch.tensor(rows, dtype=torch.int64, device=self.values.device)
        self._rate_of_row = torch.tensor(rates, dtype=torch.int64, device=self.values.device)
        self._rated = rated

    def take_in_rates(self) -> Tensor:
        """Copies the learning rates that are tensors into the table, on the device.

        Returns:
            A 0-d tensor that is not finite where one of them is negative or not finite.
        """
        device, column = self.values.device, self.values.select(1, _LR)
        if all(self._rated) and all(lr is self.rates[0] for lr in self.rates):
            rate = sent(device, self.rates[0].detach().reshape(())).to(self.values.dtype)
            column.copy_(rate)
            return rate.sqrt()
        rates = torch.cat([sent(device, lr.detach().reshape(1)) for lr in self.rates]).to(self.values.dtype)
        column.index_copy_(0, self._rows, rates.index_select(0, self._rate_of_row))
        return rates.sqrt().sum()

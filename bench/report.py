"""The tables printed after the benchmarks."""

import datetime
import platform
from collections.abc import Sequence

import torch

from bench.budgets import BUDGETS


class Report:
    def __init__(self) -> None:
        self.tables: list[tuple[str, list[Sequence[str]]]] = []
        self.measured: dict[str, float] = {}

    def table(self, title: str, rows: list[Sequence[str]]) -> None:
        """`rows[0]` is the header."""
        self.tables.append((title, rows))

    def judge(self, budget: str, value: float) -> None:
        assert budget in BUDGETS, budget
        self.measured[budget] = value

    def lines(self) -> list[str]:
        text = [machine()]
        for title, rows in self.tables:
            text += ["", title, *aligned(rows)]
        rows: list[Sequence[str]] = [("what", "measured", "budget", "")]
        for name, budget in BUDGETS.items():
            if name in self.measured:
                value = self.measured[name]
                verdict = "met" if budget.met(value) else "NOT MET"
                rows.append((budget.what, f"{value:.2f}{budget.unit}", str(budget), verdict))
            else:
                rows.append((budget.what, "-", str(budget), "not measured"))
        return [*text, "", "budgets", *aligned(rows)]


def machine() -> str:
    return (
        f"{datetime.date.today()}, {processor()}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, Python {platform.python_version()}"
    )


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def aligned(rows: list[Sequence[str]]) -> list[str]:
    """First column to the left, the others to the right, as GitHub's Markdown reads it."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(row: Sequence[str]) -> str:
        first, *others = [
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        ]
        return "| " + " | ".join([first, *others]) + " |"

    return [line(rows[0]), line(rule), *(line(row) for row in rows[1:])]

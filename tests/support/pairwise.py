"""Few combinations in place of all: every value of each argument meets every value of every other one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any


def pairwise(**values: Sequence[Any]) -> list[dict[str, Any]]:
    """Combinations of one value per name, among which every pair of values of two names is found.

    About as many as the two longest lists have pairs. The same in every run, so that tests keep their names.
    """
    names = list(values)
    if len(names) < 2:
        return [{name: value} for name in names for value in values[name]] or [{}]
    # Places in the lists stand for values, which may be anything.
    lengths = [range(len(values[name])) for name in names]
    missing = {
        (i, a, j, b): None
        for i, j in itertools.combinations(range(len(names)), 2)
        for a, b in itertools.product(lengths[i], lengths[j])
    }

    def gain(row: dict[int, int], i: int, a: int) -> int:
        """How many missing pairs a value makes with those that are chosen."""
        return sum(((i, a, j, b) if i < j else (j, b, i, a)) in missing for j, b in row.items())

    rows = []
    while missing:
        i, a, j, b = next(iter(missing))
        row = {i: a, j: b}
        for k in range(len(names)):
            if k not in row:
                # Where several values gain as much, they take turns.
                turn = len(rows) % len(lengths[k])
                order = [*lengths[k][turn:], *lengths[k][:turn]]
                row[k] = max(order, key=lambda value, k=k, row=row: gain(row, k, value))
        for one, other in itertools.combinations(sorted(row), 2):
            missing.pop((one, row[one], other, row[other]), None)
        rows.append(row)
    return [{name: values[name][row[i]] for i, name in enumerate(names)} for row in rows]

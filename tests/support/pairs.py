"""Few combinations of many values, such that every two values of different names meet in one of them."""

import itertools
from collections.abc import Sequence
from typing import Any

Pair = tuple[tuple[str, int], tuple[str, int]]


def pairs_of(positions: dict[str, int]) -> set[Pair]:
    return set(itertools.combinations(positions.items(), 2))


def every_combination(**values: Sequence[Any]) -> list[dict[str, Any]]:
    return [dict(zip(values, combination)) for combination in itertools.product(*values.values())]


def every_pair(**values: Sequence[Any]) -> list[dict[str, Any]]:
    """A covering array of strength two: each time the combination that holds most of the pairs still missing."""
    if len(values) < 2:
        return every_combination(**values)
    combinations = every_combination(**{name: range(len(v)) for name, v in values.items()})
    missing = set().union(*map(pairs_of, combinations))
    chosen = []
    while missing:
        best = max(combinations, key=lambda positions: len(pairs_of(positions) & missing))
        missing -= pairs_of(best)
        chosen.append({name: values[name][i] for name, i in best.items()})
    return chosen

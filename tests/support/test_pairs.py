"""The combinations that stand for all: no pair of values is missing, and they are few."""

import itertools
from collections.abc import Sequence

import pytest

from tests.support.pairs import every_pair


@pytest.mark.parametrize(
    "lengths, most",
    [((3,), 3), ((1, 1), 1), ((4, 5), 20), ((2, 2, 2), 5), ((2, 3, 2, 2, 4), 16), ((4, 6, 2, 2), 26), ((5, 5, 4), 32)],
    ids=str,
)
def test_every_value_meets_every_value_of_another_argument(lengths: Sequence[int], most: int) -> None:
    values = {f"argument {i}": [f"{i}.{value}" for value in range(length)] for i, length in enumerate(lengths)}
    found = every_pair(**values)
    assert all(list(row) == list(values) for row in found)
    for names in itertools.combinations(values, min(2, len(values))):
        pairs = {tuple(row[name] for name in names) for row in found}
        assert pairs == set(itertools.product(*(values[name] for name in names)))
    assert len(found) <= most


def test_the_combinations_are_the_same_in_every_run() -> None:
    assert every_pair(a=[1, 2], b=["x", "y"]) == every_pair(a=[1, 2], b=["x", "y"])


def test_values_may_be_anything() -> None:
    assert len(every_pair(a=[{}, {}], b=[[], None, float("nan")])) == 6
    assert every_pair() == [{}]

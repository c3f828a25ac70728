"""Random signs are random enough for Hutchinson's estimate.

Asked of backends whose bits are quick to have: test_signs.py holds every other one to the same bits.
"""

import math

import pytest
import torch
from torch import Tensor

from tests.support.backends import each_of
from tests.support.calls import signs_of

each_generator = each_of(("eager", "cpu"))

N = 1 << 17


def is_balanced(values: Tensor) -> bool:
    """Whether a sum of independent +-1 lies within 5 standard deviations of 0."""
    return abs(float(values.sum())) <= 5 * math.sqrt(values.numel())


@each_generator
def test_signs_are_only_ones_and_minus_ones_in_balance(backend: str) -> None:
    z = signs_of(backend, 0, N, 0, 0, 0)
    assert z.unique().tolist() == [-1.0, 1.0]
    assert is_balanced(z)


@each_generator
@pytest.mark.parametrize("lag", [1, 2, 7, 8, 31, 32, 33, 64, 96, 127, 128, 129, 256, 4096])
def test_signs_at_a_distance_are_uncorrelated(backend: str, lag: int) -> None:
    z = signs_of(backend, 0, N, 0, 0, 0)
    assert is_balanced(z[lag:] * z[:-lag])


@each_generator
def test_every_place_of_a_philox_block_is_balanced_and_no_two_places_go_together(backend: str) -> None:
    places = signs_of(backend, 0, N, 0, 0, 0).view(-1, 128).double()
    correlations = places.T @ places / math.sqrt(len(places))
    correlations.fill_diagonal_(0)
    # 128 and 8128 normal variables; the largest of them stays below these quantiles but once in 10^5 streams.
    assert (places.sum(0).abs() / math.sqrt(len(places))).max() < 5.5
    assert correlations.abs().max() < 6.2


@each_generator
def test_seeds_evaluations_and_samples_give_independent_streams(backend: str) -> None:
    keys = [(0, 0, 0), (1, 0, 0), (1 << 32, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 1, 0)]
    streams = [signs_of(backend, 0, N, *key) for key in keys]
    for i, a in enumerate(streams):
        assert is_balanced(a)
        assert all(is_balanced(a * b) for b in streams[:i])


@each_generator
def test_the_sign_of_one_element_varies_from_evaluation_to_evaluation(backend: str) -> None:
    first = torch.stack([signs_of(backend, 12345, 3, 0, evaluation, 0) for evaluation in range(400)])
    assert all(is_balanced(column) for column in first.T)

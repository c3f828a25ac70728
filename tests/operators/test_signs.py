"""Random signs: the same known bits on every backend, and random enough for Hutchinson's estimate."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support.backends import BACKENDS, INTERPRETED, each_backend, evaluation_on, operators_of
from tests.support.cases import (
    DTYPES,
    LAYOUTS,
    SIZES,
    Spec,
    assert_same_bits,
    assert_untouched,
    compute_dtype,
    each_dtype,
    make_case,
    many,
)
from tests.support.problems import single_threaded
from tests.support.reference import memory_order, signs

# Philox4x32-10 with key 0 and counter 0 (Salmon et al., SC 2011).
KNOWN_WORDS = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
# Elements whose Philox block does not fit 32 bits.
BEYOND_32_BITS = 128 << 32
SEEDS = (0, 1, 0xFFFFFFFF, 1 << 32, (1 << 63) - 1, 0x1234_5678_9ABC_DEF0)


def signs_of(
    backend: str, index: int, count: int, seed: int, evaluation: int, sample: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    z = torch.full((count,), math.nan, dtype=dtype, device=BACKENDS[backend])
    operators_of(backend).rademacher_([z], [index], seed, evaluation_on(backend, evaluation), sample)
    return z.cpu()


# What more threads do is a test of its own.
one_thread = pytest.fixture(autouse=True, scope="module")(single_threaded)


# ---------------------------------------------------------------------------------------------------------------------
# Which signs


@each_backend
@each_dtype
def test_the_first_signs_are_the_bits_of_the_known_answer(backend: str, dtype: torch.dtype) -> None:
    bits = [word >> bit & 1 for word in KNOWN_WORDS for bit in range(32)]
    assert signs_of(backend, 0, 128, 0, 0, 0, dtype).tolist() == [1 if bit else -1 for bit in bits]


@each_backend
@pytest.mark.parametrize("index", [0, 1, 31, 32, 33, 64, 95, 96, 127, 128, 129, 12345, 2**31 - 77, 2**40 + 9])
def test_signs_from_any_index_on_are_those_of_the_reference(backend: str, index: int) -> None:
    for count in (0, 1, 2, 31, 32, 33, 127, 128, 129, 1500):
        assert_same_bits(signs_of(backend, index, count, 5, 6, 7), signs(index, count, 5, 6, 7).float(), "signs")


@each_backend
@pytest.mark.parametrize("blocks", [1, 3, 1 << 20])
def test_signs_do_not_repeat_past_the_32_bits_of_a_counter_word(backend: str, blocks: int) -> None:
    start = blocks * BEYOND_32_BITS - 300
    found = signs_of(backend, start, 1000, 5, 6, 7)
    assert_same_bits(found, signs(start, 1000, 5, 6, 7).float(), "signs")
    assert not torch.equal(found[300:], signs_of(backend, 0, 700, 5, 6, 7))


@each_backend
@pytest.mark.parametrize("seed", SEEDS)
def test_signs_depend_on_every_bit_of_seed_evaluation_and_sample(backend: str, seed: int) -> None:
    for evaluation, sample in [(0, 0), (1, 0), (0, 1), (0x7FFFFFFF, 0x80000000), (0xFFFFFFFF, 0xFFFFFFFF)]:
        found = signs_of(backend, 77, 300, seed, evaluation, sample)
        assert_same_bits(found, signs(77, 300, seed, evaluation, sample).float(), "signs")


@each_backend
@given(
    index=st.integers(0, 2**62),
    count=st.integers(0, 700),
    seed=st.integers(0, 2**63 - 1),
    evaluation=st.integers(0, 2**32 - 1),
    sample=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
)
def test_any_signs_are_those_of_the_reference(
    backend: str, index: int, count: int, seed: int, evaluation: int, sample: int, dtype: torch.dtype
) -> None:
    found = signs_of(backend, index, count, seed, evaluation, sample, dtype)
    assert_same_bits(found, signs(index, count, seed, evaluation, sample).to(dtype), "signs")


@each_backend
@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_signs_follow_the_memory_of_dense_tensors_and_the_rows_of_others(
    backend: str, dtype: torch.dtype, layout: str
) -> None:
    shapes = [(), (1,), (0, 3), (9, 1), (6, 11), (4, 3, 5, 5), (2, 3, 4, 5, 3), (33, 140)]
    before = make_case(dtype, [*(Spec(shape, layout, 1) for shape in shapes), *(Spec((n,), layout, 3) for n in SIZES)])
    case = before.to(BACKENDS[backend])
    operators_of(backend).rademacher_(case.params, case.indices, 5, evaluation_on(backend, 6), 7)
    case = case.to("cpu")
    for z, index in zip(case.params, case.indices, strict=True):
        assert_same_bits(memory_order(z), signs(index, z.numel(), 5, 6, 7).to(dtype), "signs")
    assert_untouched(case, before, but=("params",))


@each_backend
def test_many_tensors_have_the_signs_of_one(backend: str) -> None:
    count = 100 if backend in INTERPRETED else 1000
    tensors = [torch.empty(spec.shape, device=BACKENDS[backend]) for spec in many(count)]
    starts = torch.tensor([0, *(t.numel() for t in tensors)]).cumsum(0).tolist()
    operators_of(backend).rademacher_(tensors, starts[:-1], 5, evaluation_on(backend, 6), 7)
    assert_same_bits(torch.cat(tensors).cpu(), signs(0, starts[-1], 5, 6, 7).float(), "signs")


@each_backend
@each_dtype
@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("index", [0, 13, BEYOND_32_BITS - 200])
def test_the_estimate_recomputes_the_signs_of_each_sample(
    backend: str, dtype: torch.dtype, samples: int, index: int
) -> None:
    # With products of 1 the estimate is the mean of the signs; NaN before the first sample must not matter.
    counts, device = (300, 1, 1025), BACKENDS[backend]
    ones = [torch.ones(count, dtype=dtype, device=device) for count in counts]
    starts, offsets = [index, index + 300, index + 301], [0, 384, 512]
    estimate = torch.full((1700,), math.nan, dtype=compute_dtype(dtype), device=device)
    for sample in range(samples):
        operators_of(backend).hutchinson_(
            ones, estimate, offsets, starts, 5, evaluation_on(backend, 6), sample, samples
        )
    for start, offset, count in zip(starts, offsets, counts, strict=True):
        mean = sum(signs(start, count, 5, 6, sample) for sample in range(samples)) / samples
        assert_same_bits(estimate[offset : offset + count].cpu(), mean.to(estimate.dtype), "estimate")


# ---------------------------------------------------------------------------------------------------------------------
# How random

N = 1 << 17


def is_balanced(values: Tensor) -> bool:
    """Whether a sum of independent +-1 lies within 5 standard deviations of 0."""
    return abs(float(values.sum())) <= 5 * math.sqrt(values.numel())


@each_backend
def test_signs_are_only_ones_and_minus_ones_in_balance(backend: str) -> None:
    z = signs_of(backend, 0, N, 0, 0, 0)
    assert z.unique().tolist() == [-1.0, 1.0]
    assert is_balanced(z)


@each_backend
@pytest.mark.parametrize("lag", [1, 2, 7, 8, 31, 32, 33, 64, 96, 127, 128, 129, 256, 4096])
def test_signs_at_a_distance_are_uncorrelated(backend: str, lag: int) -> None:
    z = signs_of(backend, 0, N, 0, 0, 0)
    assert is_balanced(z[lag:] * z[:-lag])


@each_backend
def test_every_place_of_a_philox_block_is_balanced_and_no_two_places_go_together(backend: str) -> None:
    places = signs_of(backend, 0, N, 0, 0, 0).view(-1, 128).double()
    correlations = places.T @ places / math.sqrt(len(places))
    correlations.fill_diagonal_(0)
    # 128 and 8128 normal variables; the largest of them stays below these quantiles but once in 10^5 streams.
    assert (places.sum(0).abs() / math.sqrt(len(places))).max() < 5.5
    assert correlations.abs().max() < 6.2


@each_backend
def test_seeds_evaluations_and_samples_give_independent_streams(backend: str) -> None:
    keys = [(0, 0, 0), (1, 0, 0), (1 << 32, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 1, 0)]
    streams = [signs_of(backend, 0, N, *key) for key in keys]
    for i, a in enumerate(streams):
        assert is_balanced(a)
        assert all(is_balanced(a * b) for b in streams[:i])


@each_backend
def test_the_sign_of_one_element_varies_from_evaluation_to_evaluation(backend: str) -> None:
    first = torch.stack([signs_of(backend, 12345, 3, 0, evaluation, 0) for evaluation in range(400)])
    assert all(is_balanced(column) for column in first.T)

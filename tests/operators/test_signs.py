"""Random signs: the same known bits on every backend, whatever the index, the seed and the strides."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.backends import (
    device_of,
    each_backend_with,
    each_quick_backend,
    each_slow_backend,
    evaluation_on,
    operators_of,
)
from tests.support.calls import run_rademacher, signs_of
from tests.support.cases import (
    DTYPES,
    LAYOUTS,
    SIZES,
    Spec,
    assert_same_bits,
    assert_untouched,
    compute_dtype,
    make_case,
    many,
)
from tests.support.lists import shorter
from tests.support.reference import memory_order, signs
from tests.support.strategies import few_examples

# Philox4x32-10 with key 0 and counter 0 (Salmon et al., SC 2011).
KNOWN_WORDS = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
# Elements whose Philox block does not fit 32 bits.
BEYOND_32_BITS = 128 << 32
SEEDS = (0, 1, 0xFFFFFFFF, 1 << 32, (1 << 63) - 1, 0x1234_5678_9ABC_DEF0)


@each_backend_with(dtype=DTYPES)
def test_the_first_signs_are_the_bits_of_the_known_answer(backend: str, dtype: torch.dtype) -> None:
    bits = [word >> bit & 1 for word in KNOWN_WORDS for bit in range(32)]
    assert signs_of(backend, 0, 128, 0, 0, 0, dtype).tolist() == [1 if bit else -1 for bit in bits]


@each_backend_with(index=(0, 1, 31, 32, 33, 64, 95, 96, 127, 128, 129, 12345, 2**31 - 77, 2**40 + 9))
def test_signs_from_any_index_on_are_those_of_the_reference(backend: str, index: int) -> None:
    for count in shorter(backend, (0, 1, 2, 31, 32, 33, 127, 128, 129, 1500), (1, 33, 129, 1500)):
        assert_same_bits(signs_of(backend, index, count, 5, 6, 7), signs(index, count, 5, 6, 7).float(), "signs")


@each_backend_with(blocks=(1, 3, 1 << 20))
def test_signs_do_not_repeat_past_the_32_bits_of_a_counter_word(backend: str, blocks: int) -> None:
    start = blocks * BEYOND_32_BITS - 300
    found = signs_of(backend, start, 1000, 5, 6, 7)
    assert_same_bits(found, signs(start, 1000, 5, 6, 7).float(), "signs")
    assert not torch.equal(found[300:], signs_of(backend, 0, 700, 5, 6, 7))


@each_backend_with(seed=SEEDS)
def test_signs_depend_on_every_bit_of_seed_evaluation_and_sample(backend: str, seed: int) -> None:
    for evaluation, sample in [(0, 0), (1, 0), (0, 1), (0x7FFFFFFF, 0x80000000), (0xFFFFFFFF, 0xFFFFFFFF)]:
        found = signs_of(backend, 77, 300, seed, evaluation, sample)
        assert_same_bits(found, signs(77, 300, seed, evaluation, sample).float(), "signs")


ANY = {
    "index": st.integers(0, 2**62),
    "count": st.integers(0, 700),
    "seed": st.integers(0, 2**63 - 1),
    "evaluation": st.integers(0, 2**32 - 1),
    "sample": st.integers(0, 2**32 - 1),
    "dtype": st.sampled_from(DTYPES),
}


def check_signs(
    backend: str, index: int, count: int, seed: int, evaluation: int, sample: int, dtype: torch.dtype
) -> None:
    found = signs_of(backend, index, count, seed, evaluation, sample, dtype)
    assert_same_bits(found, signs(index, count, seed, evaluation, sample).to(dtype), "signs")


@each_quick_backend
@given(**ANY)
def test_any_signs_are_those_of_the_reference(backend: str, **drawn: int) -> None:
    check_signs(backend, **drawn)


@each_slow_backend
@few_examples
@given(**ANY)
def test_some_signs_are_those_of_the_reference(backend: str, **drawn: int) -> None:
    check_signs(backend, **drawn)


@each_backend_with(layout=LAYOUTS, dtype=DTYPES)
def test_signs_follow_the_memory_of_dense_tensors_and_the_rows_of_others(
    backend: str, dtype: torch.dtype, layout: str
) -> None:
    shapes = [(), (1,), (0, 3), (9, 1), (6, 11), (4, 3, 5, 5), (2, 3, 4, 5, 3), (33, 140)]
    sizes = shorter(backend, SIZES, [7, 129, 515, 4097])
    before = make_case(dtype, [*(Spec(shape, layout, 1) for shape in shapes), *(Spec((n,), layout, 3) for n in sizes)])
    case = before.to(device_of(backend))
    run_rademacher(backend, case, 5, 6, 7)
    case = case.to("cpu")
    for z, index in zip(case.params, case.indices, strict=True):
        assert_same_bits(memory_order(z), signs(index, z.numel(), 5, 6, 7).to(dtype), "signs")
    assert_untouched(case, before, except_for=("params",))


@each_backend_with()
def test_many_tensors_have_the_signs_of_one(backend: str) -> None:
    specs = shorter(backend, many(1000), many(100))
    if backend == "cuda_ptx":  # more than one table holds
        specs = [Spec((1 + i % 3,)) for i in range(2000)]
    tensors = [torch.empty(spec.shape, device=device_of(backend)) for spec in specs]
    starts = torch.tensor([0, *(t.numel() for t in tensors)]).cumsum(0).tolist()
    operators_of(backend).rademacher_(tensors, starts[:-1], 5, evaluation_on(backend, 6), 7)
    assert_same_bits(torch.cat(tensors).cpu(), signs(0, starts[-1], 5, 6, 7).float(), "signs")


@each_backend_with(samples=(1, 2, 3), index=(0, 13, BEYOND_32_BITS - 200), dtype=DTYPES)
def test_the_estimate_recomputes_the_signs_of_each_sample(
    backend: str, dtype: torch.dtype, samples: int, index: int
) -> None:
    # With products of 1 the estimate is the mean of the signs; NaN before the first sample must not matter.
    counts, device = (300, 1, 1025), device_of(backend)
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

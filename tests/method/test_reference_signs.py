"""The reference's random signs, and the order that numbers elements, held to known answers and definitions."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support.quadratic import assert_bitwise, sign_by_definition
from tests.support.reference import from_memory_order, memory_order, philox4x32, signs

# ---------------------------------------------------------------------------------------------------------------------
# Random signs


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(counter: str, key: str, expected: str) -> None:
    words = philox4x32(tuple(int(c, 16) for c in counter.split()), tuple(int(k, 16) for k in key.split()))
    assert " ".join(f"{word:08x}" for word in words) == expected


def test_first_signs_are_the_bits_of_the_known_answer_from_the_lowest_up() -> None:
    s = signs(0, 128, seed=0, evaluation=0, sample=0).tolist()
    assert s[:8] == [1, -1, 1, -1, 1, -1, 1, 1]  # 0xd5 = 0b11010101, the low byte of word 0
    assert s[24:32] == [-1, 1, 1, -1, -1, 1, 1, -1]  # 0x66 = 0b01100110, its high byte
    assert s[32:40] == [1, -1, 1, 1, -1, -1, -1, 1]  # 0x8d = 0b10001101, the low byte of word 1
    assert s[64:72] == [-1, -1, 1, 1, -1, -1, 1, -1]  # 0x4c = 0b01001100, the low byte of word 2
    assert s[120:128] == [1, 1, -1, 1, 1, -1, -1, 1]  # 0x9b = 0b10011011, the high byte of word 3


@pytest.mark.parametrize(
    "start, count",
    [(0, 0), (0, 1), (0, 400), (31, 2), (127, 2), (128, 128), (100, 300), (2**39 - 200, 400), (2**60, 99)],
)
@pytest.mark.parametrize(
    "seed, evaluation, sample", [(0, 0, 0), (1, 2, 3), (2**32, 0, 0), (2**64 - 1, 2**32 - 1, 2**32 - 1)]
)
def test_signs_agree_with_their_definition_one_by_one(
    start: int, count: int, seed: int, evaluation: int, sample: int
) -> None:
    expected = [sign_by_definition(i, seed, evaluation, sample) for i in range(start, start + count)]
    actual = signs(start, count, seed, evaluation, sample)
    assert actual.dtype == torch.float64
    assert actual.tolist() == expected


def test_signs_are_balanced_and_independent_across_seed_evaluation_and_sample() -> None:
    n = 1_000_000
    runs = [signs(0, n, *which) for which in [(0, 0, 0), (1, 0, 0), (2**32, 0, 0), (0, 1, 0), (0, 0, 1)]]
    runs.append(torch.roll(runs[0], 1))
    correlations = torch.stack(runs) @ torch.stack(runs).T / n
    assert (correlations - torch.eye(len(runs))).abs().max() < 5 / math.sqrt(n)
    assert all(abs(run.mean()) < 5 / math.sqrt(n) for run in runs)


# ---------------------------------------------------------------------------------------------------------------------
# The order of elements

LAYOUTS: dict[str, tuple[Callable[[], Tensor], list[float]]] = {
    "contiguous": (lambda: torch.arange(6.0).view(2, 3), [0, 1, 2, 3, 4, 5]),
    "transposed": (lambda: torch.arange(6.0).view(2, 3).t(), [0, 1, 2, 3, 4, 5]),
    "permuted": (lambda: torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1), list(range(24))),
    "unit dimensions": (lambda: torch.arange(6.0).view(2, 1, 3, 1).transpose(0, 2), [0, 1, 2, 3, 4, 5]),
    "sliced": (lambda: torch.arange(12.0).view(3, 4)[:, 1:3], [1, 2, 5, 6, 9, 10]),
    "sliced and transposed": (lambda: torch.arange(12.0).view(3, 4)[:, 1:3].t(), [1, 5, 9, 2, 6, 10]),
    "offset": (lambda: torch.arange(7.0)[1:].view(2, 3).t(), [1, 2, 3, 4, 5, 6]),
    "expanded": (lambda: torch.arange(2.0).view(2, 1).expand(2, 3), [0, 0, 0, 1, 1, 1]),
    "scalar": (lambda: torch.tensor(7.0), [7]),
    "empty": (lambda: torch.empty(3, 0), []),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_order_follows_dense_memory_and_else_rows(layout: str) -> None:
    make, expected = LAYOUTS[layout]
    t = make()
    flat = memory_order(t)
    assert flat.tolist() == expected
    assert_bitwise(from_memory_order(flat, t), t)


def test_memory_order_of_channels_last_is_that_of_its_storage() -> None:
    t = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert_bitwise(memory_order(t), t.permute(0, 2, 3, 1).reshape(-1))
    assert memory_order(t).data_ptr() == t.data_ptr()
    assert from_memory_order(torch.arange(120), t).stride() == t.stride()


@given(st.lists(st.integers(1, 4), max_size=5), st.randoms(use_true_random=False))
def test_memory_order_of_any_permutation_is_that_of_its_storage(shape: list[int], random: Any) -> None:
    order = random.sample(range(len(shape)), len(shape))
    t = torch.arange(math.prod(shape)).view(shape).permute(order)
    assert memory_order(t).tolist() == list(range(t.numel()))
    assert_bitwise(from_memory_order(torch.arange(t.numel()), t), t)

"""The order in which the CPU kernels sum squares: the same on every processor, however wide its vectors are."""

import math

import pytest
import torch
from torch import Tensor

from tests.support.calls import norm_of
from tests.support.cases import each_dtype, place
from tests.support.checks import exact_norm

LANES, PLACES, BLOCK, TURN = 32, 4, 16384, 256
# Around lanes, the four places that are read in turns, the stretches that are widened at once, blocks.
EDGES = (LANES, PLACES * LANES, PLACES * TURN, BLOCK, BLOCK + PLACES * TURN, 2 * BLOCK)
LENGTHS = sorted({0, 1, 2, 57, 50_001} | {edge + step for edge in EDGES for step in (-1, 0, 1, LANES)})


def sum_of_block(x: Tensor, stretch: int) -> float:
    """The squares of a block, by the order that csrc/cpu states; stretch: how far each place is read at a time."""
    lanes = torch.zeros(LANES, dtype=torch.float64)
    quarter = len(x) // (PLACES * LANES) * LANES
    places = x[: PLACES * quarter].view(PLACES, quarter).square()
    rest = torch.zeros(PLACES, LANES, dtype=torch.float64)
    rest.view(-1)[: len(x) - PLACES * quarter] = x[PLACES * quarter :].square()
    for part in (*places.split(stretch, 1), rest):
        sums = torch.zeros_like(lanes)
        for turn in part.split(LANES, 1):
            for squares in turn:
                if len(squares):
                    sums += squares
        lanes += sums
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    return float(lanes)


@each_dtype
@pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])
def test_the_norm_is_summed_in_the_order_that_is_promised(dtype: torch.dtype, adaptive: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for i, length in enumerate(LENGTHS):
        g, w = (
            place(torch.randn(length, dtype=torch.float64, generator=generator), dtype, shift=i % 3) for _ in range(2)
        )
        x = g.double() * w.double() if adaptive else g.double()
        whole = dtype in (torch.float32, torch.float64) and not adaptive
        sums = [sum_of_block(block, BLOCK if whole else TURN) for block in x.split(BLOCK)]
        expected = 0.0
        for partial in sums:
            expected += partial
        norm = norm_of("cpu", [g], [w], adaptive)
        assert norm == math.sqrt(expected), length
        assert norm == pytest.approx(exact_norm([g], [w] if adaptive else None), rel=8 * 2**-53, abs=0), length

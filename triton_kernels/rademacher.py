"""rademacher_: the probe z of an exact Hessian product."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import has_memory
from .checks import check_list, check_numbers, check_scalar
from .launch import DTYPES, launch_over, registers_for, units_on
from .lists import dense, write_back
from .signs import END_OF_INDICES, key_of, signs_of, word_of
from .table import Contents, lengths_of, stream_of, table_on
from .tiles import NUMBER, UNIT, entry_of, field, in_vectors, place_of, store, stream, units_of


@triton.jit(do_not_specialize=["table", "count", "tiles", "seed_low", "seed_high", "evaluation", "sample"])
def rademacher_kernel(
    table: tl.pointer_type(tl.int64),
    count: tl.int64,
    tiles: tl.int64,
    seed_low: tl.int32,
    seed_high: tl.int32,
    evaluation: tl.pointer_type(tl.int64),
    sample: tl.int32,
    DTYPE: tl.constexpr,
    UNITS: tl.constexpr,
):
    """z <- the independent +-1 of a sample in a Hessian evaluation.

    Streams: z, of DTYPE and any length. Writes 4 bytes per float32 element.
    """
    VECTOR: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    number = tl.load(evaluation)
    for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
        entry = entry_of(table, count, tile)
        before, begin, end = place_of(table, count, entry, tile, UNITS)
        block = field(table, count, entry, NUMBER) + before // UNIT
        z_at = stream(table, count, entry, before, 0, DTYPE)
        if in_vectors(z_at, begin, end, VECTOR):
            signs = signs_of(block, seed_low, seed_high, number, sample, tl.float32, UNITS)
            store(z_at, begin, end, units_of(UNITS), signs.to(DTYPE), DTYPE, VECTOR)
        else:
            signs = signs_of(block, seed_low, seed_high, number, sample, tl.float32, UNITS)
            store(z_at, begin, end, units_of(UNITS), signs.to(DTYPE), DTYPE, 1)


def rademacher_(signs: Sequence[Tensor], indices: Sequence[int], seed: int, evaluation: Tensor, sample: int) -> None:
    """signs <- the +-1 of this sample in the Hessian evaluation whose index is in evaluation (csrc/schema.cpp).

    Raises:
        ValueError: arguments do not fit each other, before anything is written.
    """
    check_numbers("indices", signs, indices, END_OF_INDICES)
    if not signs:
        return
    check_list("signs", signs)
    first = signs[0]
    check_scalar("evaluation", evaluation, torch.int64, first.device)
    if not has_memory(first):
        return
    written = dense(signs)
    contents = Contents(
        lengths_of(written), units_on(first.device, first.dtype, 1), (stream_of(written),), indices=tuple(indices)
    )
    launch_over(
        table_on(first.device, contents),
        rademacher_kernel,
        *key_of(seed),
        evaluation,
        word_of(sample),
        registers=registers_for(first.dtype),
        DTYPE=DTYPES[first.dtype],
    )
    write_back(signs, written)

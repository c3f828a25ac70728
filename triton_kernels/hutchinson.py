"""hutchinson_: products with the probes are summed to an estimate of the Hessian diagonal, the signs recomputed."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import has_memory, state_dtype
from .arithmetic import divided, double
from .checks import check_list, check_numbers, check_parts, check_scalar, check_tensor
from .launch import DTYPES, launch_over, registers_for, units_on
from .lists import dense
from .signs import END_OF_INDICES, key_of, signs_of, word_of
from .table import Contents, lengths_of, parts_of, stream_of, table_on
from .tiles import NUMBER, UNIT, entry_of, field, in_vectors, load, place_of, store, stream, units_of


@triton.jit
def _add_tile(
    product_at,
    estimate_at,
    begin,
    end,
    signs,
    divisor,
    FIRST: tl.constexpr,
    DTYPE: tl.constexpr,
    STATE: tl.constexpr,
    UNITS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    index = units_of(UNITS)
    estimate = signs * load(product_at, begin, end, index, DTYPE, VECTOR).to(STATE)
    if not FIRST:
        estimate = load(estimate_at, begin, end, index, STATE, VECTOR) + estimate
    if divisor != 1.0:
        estimate = divided(estimate, divisor, STATE)
    store(estimate_at, begin, end, index, estimate, STATE, VECTOR)


@triton.jit(do_not_specialize=["table", "count", "tiles", "seed_low", "seed_high", "evaluation", "sample", "samples"])
def hutchinson_kernel(
    table: tl.pointer_type(tl.int64),
    count: tl.int64,
    tiles: tl.int64,
    seed_low: tl.int32,
    seed_high: tl.int32,
    evaluation: tl.pointer_type(tl.int64),
    sample: tl.int32,
    samples: tl.float64,
    FIRST: tl.constexpr,
    DTYPE: tl.constexpr,
    STATE: tl.constexpr,
    UNITS: tl.constexpr,
):
    r"""estimate :math:`\leftarrow` estimate :math:`+ z \cdot Hz`, from 0 if FIRST; then divided by samples.

    Streams: the products Hz, of DTYPE, and the estimate, of STATE, of any length. Moves 12 bytes per float32 element
    (8 if FIRST).
    """
    VECTOR: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    number = tl.load(evaluation)
    divisor = double(samples).to(STATE)
    for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
        entry = entry_of(table, count, tile)
        before, begin, end = place_of(table, count, entry, tile, UNITS)
        block = field(table, count, entry, NUMBER) + before // UNIT
        product_at = stream(table, count, entry, before, 0, DTYPE)
        estimate_at = stream(table, count, entry, before, 1, STATE)
        if in_vectors(product_at | estimate_at, begin, end, VECTOR):
            signs = signs_of(block, seed_low, seed_high, number, sample, STATE, UNITS)
            _add_tile(product_at, estimate_at, begin, end, signs, divisor, FIRST, DTYPE, STATE, UNITS, VECTOR)
        else:
            signs = signs_of(block, seed_low, seed_high, number, sample, STATE, UNITS)
            _add_tile(product_at, estimate_at, begin, end, signs, divisor, FIRST, DTYPE, STATE, UNITS, 1)


def hutchinson_(
    products: Sequence[Tensor],
    estimate: Tensor,
    offsets: Sequence[int],
    indices: Sequence[int],
    seed: int,
    evaluation: Tensor,
    sample: int,
    samples: int,
) -> None:
    r"""estimate :math:`\leftarrow` estimate :math:`+ z \cdot Hz`, from 0 at the first sample; at last the mean.

    As csrc/schema.cpp says.

    Raises:
        ValueError: arguments do not fit each other, before anything is written.
    """
    check_parts(products, offsets, estimate)
    check_numbers("indices", products, indices, END_OF_INDICES)
    if not products:
        return
    check_list("products", products)
    first = products[0]
    check_tensor("estimate", estimate, state_dtype(first), first.device)
    check_scalar("evaluation", evaluation, torch.int64, first.device)
    if not has_memory(first):
        return
    terms = dense(products)
    streams = (stream_of(terms), parts_of(estimate, tuple(offsets)))
    contents = Contents(
        lengths_of(terms), units_on(first.device, first.dtype, len(streams)), streams, indices=tuple(indices)
    )
    launch_over(
        table_on(first.device, contents),
        hutchinson_kernel,
        *key_of(seed),
        evaluation,
        word_of(sample),
        float(samples) if sample == samples - 1 else 1.0,
        registers=registers_for(first.dtype, state=True),
        FIRST=sample == 0,
        DTYPE=DTYPES[first.dtype],
        STATE=DTYPES[state_dtype(first)],
    )

"""Arguments for the operators, laid out in every way memory can be, between guard zones; and how results are judged."""

from __future__ import annotations

import bisect
import itertools
import mmap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import sassha_fused.bucket
from sassha_fused.layout import block_index
from tests.support.formulas import ulp
from tests.support.reference import memory_order

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# For what has to do with modes, where backends are slow: float16 differs from bfloat16 in conversions alone.
BUT_FLOAT16 = DTYPES[:3]
LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced", "padded")

# One below, at and above every vector, the signs of one Philox call (128), tiles and blocks, and some between.
BOUNDARIES = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384)
SIZES = sorted({edge + step for edge in BOUNDARIES for step in (-1, 0, 1)} | {57, 77, 2051, 8196, 20003})

# How far from the exact value float32 arithmetic may end, in ulp of the largest term summed: w'; m and D (the worst of
# 18 million at random hyperparameters was 1.5); the new weight (4.8), where up to nine roundings meet: two of m, five
# of the direction, eps among them, and two of the sum; the new weight at a general power, whose root is less exact.
ULPS = 4
AVERAGE_ULPS = 2
UPDATE_ULPS = 5
GENERAL_POWER_ULPS = 8

PART_ALIGNMENT = 128
GUARD = 64  # elements before and after what an operator may touch
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=[str(dtype).removeprefix("torch.") for dtype in DTYPES])
# In these every operation is one IEEE rounding in float32, the same on every backend.
each_narrow_dtype = pytest.mark.parametrize("dtype", DTYPES[1:], ids=[str(dtype)[6:] for dtype in DTYPES[1:]])


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Runs torch with a number of threads; small tensors are served best by one."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------------------------
# Tensors in memory


class Spec(NamedTuple):
    """Where a parameter lies: its strides, and how many elements behind a 64-byte boundary it starts."""

    shape: tuple[int, ...]
    layout: str = "contiguous"
    shift: int = 0


def strides_of(shape: Sequence[int], layout: str) -> list[int]:
    """Strides of a layout of LAYOUTS; "sliced" and "padded" leave gaps, between elements or between rows."""
    slow_to_fast = list(range(len(shape)))
    if layout == "transposed":
        slow_to_fast.reverse()
    if layout == "channels_last" and len(shape) > 2:
        slow_to_fast = [0, *slow_to_fast[2:], 1]
    stride, run = [0] * len(shape), 2 if layout == "sliced" else 1
    for d in reversed(slow_to_fast):
        stride[d] = run
        run = run * max(shape[d], 1) + (3 if layout == "padded" else 0)
    return stride


def place(values: Tensor, dtype: torch.dtype, layout: str = "contiguous", shift: int = 0) -> Tensor:
    """values as a view into memory whose every other element is a NaN (a -1 if of integers)."""
    stride = strides_of(values.shape, layout)
    span = 1 + sum((n - 1) * s for n, s in zip(values.shape, stride, strict=True)) if values.numel() else 0
    base = torch.full((GUARD + shift + span + GUARD,), float("nan") if dtype.is_floating_point else -1, dtype=dtype)
    return base.as_strided(values.shape, stride, GUARD + shift).copy_(values)


def whole(t: Tensor) -> Tensor:
    """All of the memory of which t is a view."""
    return t.detach().as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)


def moved(t: Tensor, device: str) -> Tensor:
    """A copy of t and of the memory around it."""
    return whole(t).to(device, copy=True).as_strided(t.shape, t.stride(), t.storage_offset())


def bits(t: Tensor) -> Tensor:
    """The elements as integers: equal only where every bit is."""
    return t.detach().contiguous().view(_INTEGERS[t.element_size()])


def part(flat: Tensor, offset: int, like: Tensor) -> Tensor:
    """The elements of a flat buffer that belong to a parameter, in its order."""
    return flat[offset : offset + like.numel()]


def block_part(flat: Tensor, offset: int, numel: int, block: int, blocked: int) -> Tensor:
    """The numbers of a buffer that belong to a parameter, where parts below blocked have one for each block."""
    start = block_index(offset, block, blocked)
    return flat[start : start + -(-numel // (block if offset < blocked else 1))]


def units(count: int) -> int:
    """A number of elements, rounded up to where the next part may start."""
    return -(-count // PART_ALIGNMENT) * PART_ALIGNMENT


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def sparse(count: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take up memory only where they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        return torch.frombuffer(mmap.mmap(-1, max(count * dtype.itemsize, 1), flags=flags), dtype=dtype, count=count)
    except OSError as error:
        pytest.skip(f"no address space for {count} elements: {error}")


# ---------------------------------------------------------------------------------------------------------------------
# The arguments of an operator


@dataclass
class Case:
    """Arguments for all operators at once; backup holds w, and params what happens to be there."""

    params: list[Tensor]
    grads: list[Tensor]
    products: list[Tensor]
    backup: Tensor
    exp_avg: Tensor
    exp_hessian: Tensor
    estimate: Tensor
    steps: Tensor
    skipped: Tensor
    offsets: list[int]
    rows: list[int]
    indices: list[int]

    def to(self, device: str) -> Case:
        """A copy on a device."""

        def convert(value: Any) -> Any:
            if isinstance(value, Tensor):
                return moved(value, device)
            return [convert(v) for v in value] if isinstance(value, list) else value

        return Case(**{field.name: convert(getattr(self, field.name)) for field in fields(self)})

    def only(self, i: int) -> Case:
        """The same memory with parameter i alone in the lists."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Case(**{name: [value[i]] if isinstance(value, list) else value for name, value in values.items()})

    def tensors(self) -> dict[str, list[Tensor]]:
        """Every tensor argument by name, as a list."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        lists = {name: value if isinstance(value, list) else [value] for name, value in values.items()}
        return {name: value for name, value in lists.items() if value and isinstance(value[0], Tensor)}

    def parts(self, flat: Tensor) -> list[Tensor]:
        """The part of each parameter of a flat buffer."""
        return [part(flat, offset, param) for offset, param in zip(self.offsets, self.params, strict=True)]

    def in_order(self, tensors: Sequence[Tensor]) -> Tensor:
        """The elements of all gradients or products, each in the order of its parameter's memory."""
        return torch.cat([flat_of(t, param) for t, param in zip(tensors, self.params, strict=True)])

    def per_element(self, values: Tensor) -> Tensor:
        """One value per parameter, repeated for each of its elements."""
        return values.repeat_interleave(torch.tensor([param.numel() for param in self.params]))


def make_case(dtype: torch.dtype, specs: Iterable[Spec], *, others: str = "same", seed: int = 0) -> Case:
    """A case of random values on the CPU, in its own memory, each element of the magnitudes that training sees.

    others: the layout of gradients and products, "same" for that of their parameter.
    """
    specs = list(specs)
    generator = torch.Generator().manual_seed(seed)

    def random(count: int, low: float, high: float) -> Tensor:
        magnitude = 10 ** (low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64))
        return magnitude * torch.randn(count, generator=generator, dtype=torch.float64)

    wide = compute_dtype(dtype)
    vector = 64 // dtype.itemsize
    counts = [torch.Size(spec.shape).numel() for spec in specs]
    offsets, total = [], PART_ALIGNMENT
    for i, count in enumerate(counts):
        offsets.append(total)
        # Parts touch, as in the optimizer, or leave a gap that nobody owns.
        total += -(-count // PART_ALIGNMENT) * PART_ALIGNMENT + PART_ALIGNMENT * (i % 2)

    def tensors(low: float, high: float, own_layout: bool, stagger: int) -> list[Tensor]:
        values = random(sum(counts), low, high).split(counts)
        return [
            place(
                v.view(spec.shape),
                dtype,
                spec.layout if own_layout else others,
                (spec.shift * stagger) % vector,
            )
            for v, spec in zip(values, specs, strict=True)
        ]

    def flat(dtype: torch.dtype, low: float, high: float, positive: bool = False) -> Tensor:
        buffer = torch.full((total + PART_ALIGNMENT,), float("nan"), dtype=dtype)
        for offset, values in zip(offsets, random(sum(counts), low, high).split(counts), strict=True):
            buffer[offset : offset + len(values)] = values.abs() if positive else values
        return buffer

    rows = torch.randperm(len(specs) + 3, generator=generator)[: len(specs)].tolist()
    steps = torch.tensor([[1 + 7 * row % 40, 1 + 3 * row % 17] for row in range(len(specs) + 3)])
    first = torch.randint(0, 2**20, (len(specs),), generator=generator).tolist()
    return Case(
        params=tensors(-2, 1, True, 1),
        grads=tensors(-3, 1, others == "same", 3),
        products=tensors(-3, 1, others == "same", 5),
        backup=flat(dtype, -2, 1),
        exp_avg=flat(wide, -3, 1),
        exp_hessian=flat(wide, -3, 1, positive=True),
        estimate=flat(wide, -3, 1),
        steps=place(steps, torch.int64),
        skipped=place(torch.tensor([7]), torch.int64),
        offsets=offsets,
        rows=rows,
        indices=[2 * index + 1 for index in first],
    )


def every_size(dtype: torch.dtype) -> list[Spec]:
    """One tensor of each size, at whatever alignment."""
    return [Spec((size,), shift=i % (64 // dtype.itemsize)) for i, size in enumerate(SIZES)]


def every_size_at_every_alignment(dtype: torch.dtype) -> list[Spec]:
    """Each size at each distance, in elements, from a 64-byte boundary (longer ones at a few)."""
    shifts = range(64 // dtype.itemsize)
    return [Spec((size,), shift=shift) for size in SIZES for shift in (shifts if size < 130 else (0, 1, 3))]


def every_layout() -> list[Spec]:
    """Shapes of up to five dimensions, with empty, single and no dimensions, in each layout."""
    shapes = [(), (1,), (7,), (0, 3), (5, 13), (1, 9), (9, 1), (4, 1, 3), (3, 5, 7), (4, 3, 5, 5), (2, 3, 4, 5, 3)]
    specs = [Spec(shape, layout, 1) for shape in [*shapes, (64, 65)] for layout in LAYOUTS]
    return [*specs, Spec((16, 8, 3, 3), "channels_last"), Spec((40, 130), "sliced"), Spec((70, 130), "transposed")]


def many(count: int, seed: int = 0) -> list[Spec]:
    """A number of tensors of sizes from 0 up, mostly small."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (torch.rand(count, generator=generator) ** 4 * 3000).int().tolist()
    return [Spec((size,), shift=i % 4) for i, size in enumerate(sizes)]


class Recorder:
    """Operators that note the Hessian estimates that reach update_."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.products: dict[Tensor, Tensor] = {}
        original = sassha_fused.bucket.operators
        monkeypatch.setattr(sassha_fused.bucket, "operators", lambda *arguments: self._wrap(original(*arguments)))

    def _wrap(self, operators: Any) -> Any:
        def update_(params: list[Tensor], grads: list[Tensor], products: list[Tensor], *rest: Any) -> None:
            for param, product in zip(params, products, strict=bool(products)):
                self.products[param] = product.detach().clone()
            operators.update_(params, grads, products, *rest)

        names = ("grad_norm", "perturb_", "rademacher_", "hutchinson_", "block_average_")
        return SimpleNamespace(update_=update_, **{name: getattr(operators, name) for name in names})


# ---------------------------------------------------------------------------------------------------------------------
# Judging results


def assert_rounded(actual: Sequence[Tensor], exact: Tensor, largest: Tensor, ulps: float) -> None:
    """Every element is what rounding to its dtype makes of a number near the exact one.

    Near: within some ulp, of the compute dtype, of the largest term summed; in float64 within 1e-12 of that term.
    exact and largest run over the elements of all tensors, each in the order of its memory.
    """
    found = torch.cat([memory_order(t) for t in actual])
    wide = compute_dtype(found.dtype)
    bound = 1e-12 * largest if wide == torch.float64 else ulps * ulp(largest, wide)
    low, high = (exact - bound).to(found.dtype), (exact + bound).to(found.dtype)
    wrong = (~((low <= found) & (found <= high))).nonzero().flatten().tolist()
    if wrong:
        error = ((found.double() - exact).abs() / ulp(largest, found.dtype)).nan_to_num(torch.inf).max()
        ends = list(itertools.accumulate(t.numel() for t in actual))
        at = bisect.bisect_right(ends, wrong[0])
        raise AssertionError(
            f"{len(wrong)} of {len(found)} elements are wrong, by up to {error:.2f} ulp of the largest term summed; "
            f"the first, element {wrong[0] - ends[at] + actual[at].numel()} in memory of tensor {at} (shape "
            f"{tuple(actual[at].shape)}), is {found[wrong[0]]} instead of {exact[wrong[0]]}"
        )


def assert_same_bits(actual: Tensor, expected: Tensor, what: str) -> None:
    assert actual.dtype == expected.dtype
    a, b = bits(actual), bits(expected)
    assert torch.equal(a, b), f"{what}: {int((a != b).sum())} of {a.numel()} elements differ in some bit"


def assert_same_case(actual: Case, expected: Case) -> None:
    for name, tensors in actual.tensors().items():
        for i, (t, other) in enumerate(zip(tensors, expected.tensors()[name], strict=True)):
            assert_same_bits(t, other, f"{name} {i}")


def assert_untouched(after: Case, before: Case, *, except_for: Sequence[str] = ()) -> None:
    """Of all memory, only the elements of the named arguments' parts may have changed."""
    for name, found in after.tensors().items():
        memory = torch.cat([bits(whole(t)) for t in found])
        changed = memory != torch.cat([bits(whole(t)) for t in before.tensors()[name]])
        if name in except_for:
            changed &= ~torch.cat([_inside(t, after) for t in found])
        assert not changed.any(), f"{name}: {int(changed.sum())} elements changed that must not"


def _inside(t: Tensor, case: Case) -> Tensor:
    """Of the memory around t, what belongs to t; of a flat buffer, what belongs to some parameter."""
    inside = torch.zeros_like(whole(t), dtype=torch.bool)
    if any(t is buffer for buffer in (case.backup, case.exp_avg, case.exp_hessian, case.estimate)):
        for offset, param in zip(case.offsets, case.params, strict=True):
            part(inside, offset, param).fill_(True)
    else:
        inside.as_strided(t.shape, t.stride(), t.storage_offset()).fill_(True)
    return inside


def flat_of(t: Tensor, like: Tensor) -> Tensor:
    """The elements of a gradient or product in the order of its parameter's memory."""
    same_order = torch.empty_strided(like.shape, like.stride(), dtype=t.dtype).copy_(t)
    return memory_order(same_order)

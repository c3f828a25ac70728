"""What nvcc makes of the kernels: bytes and widths as executed, every kernel, and that the checks find what is wrong.

That it computes the formulas is tested in tests/operators, as backend cuda_ptx: each of its launches must be without a
race, a read of memory that nothing has written, an access out of bounds or misaligned (tests/support/ptx.py).
"""

import numpy as np
import pytest
import torch

ptxrun = pytest.importorskip("ptxrun")

from tests.support import arena, backends, emulation, ptx  # noqa: E402
from tests.support.calls import call_everything, norm_of  # noqa: E402
from tests.support.cases import DTYPES, GUARD, Spec, compute_dtype, each_dtype, make_case  # noqa: E402
from tests.support.floors import (  # noqa: E402
    BY_BLOCKS,
    FLOORS,
    LONG,
    bytes_per_element,
    elements_of,
    longest,
    narrow_sectors,
    wide_sectors,
)
from tests.support.lists import LIST_NAMES, listed_case  # noqa: E402
from tests.support.ways import summed  # noqa: E402

NAME = "cuda_ptx"
THREADS = 256

pytestmark = backends.marks_of(NAME)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[arena.Run]:
    """The launches of this test, as they come."""
    found: list[arena.Run] = []
    monkeypatch.setattr(backends.executed(NAME), "runs", found)
    return found


@each_dtype
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_norm_has_the_bits_of_the_emulation(dtype: torch.dtype, adaptive: bool) -> None:
    for specs in LIST_NAMES:
        case = listed_case(NAME, dtype, specs)
        # Only the same blocks sum in the same order, and the emulation is of a chip that is slow at float64.
        with emulation.device(ptx.MULTIPROCESSORS, 1), summed(NAME, quick=False):
            assert len({norm_of(name, case.grads, case.params, adaptive) for name in (emulation.BACKEND, NAME)}) == 1


# ---------------------------------------------------------------------------------------------------------------------
# What moves


def streaming(runs: list[arena.Run]) -> arena.Run:
    """The launch that goes over the elements, of a call's launches; the others touch a few bytes per tensor."""
    run, others = longest(runs)
    for other in others:
        rows = len(LONG) + 3
        # Counts, guards and what each parameter has of its own in, scalars out; or partial sums in, and the norm out.
        assert other.stats.ld["bytes"] <= (16 + 24) * rows + 8 * (run.blocks + 4)
        assert other.stats.st["bytes"] <= 72 * rows + 8
    return run


def most_other_bytes(run: arena.Run, tensors: int) -> dict[str, int]:
    """What a launch may read and write beside the elements: as many bytes, whatever the number of elements.

    Read: by each thread one scalar and each tensor's prepared row of three, or by each block each tensor's rho; by each
    block the partial sums, of one launch of as many blocks; the new counts. Written: a partial sum per block, the
    counts, the norm or a flag.
    """
    threads = run.blocks * THREADS
    return {
        "ld": threads * 8 * (1 + 3 * tensors) + 8 * run.blocks * run.blocks + 16 * tensors,
        "st": 8 * (run.blocks + 2 * tensors + 1),
    }


@pytest.mark.parametrize("operator", FLOORS)
@each_dtype
def test_aligned_tensors_move_at_the_floor_and_16_bytes_at_a_time(
    runs: list[arena.Run], operator: str, dtype: torch.dtype
) -> None:
    call, *terms = FLOORS[operator]
    case = make_case(dtype, [Spec((size,)) for size in LONG])
    widths = {"p": dtype.itemsize, "s": compute_dtype(dtype).itemsize}
    call(NAME, case)
    run = streaming(runs)
    for (kind, floor), of_kind in zip(bytes_per_element(operator, dtype).items(), terms, strict=True):
        moved, least = getattr(run.stats, kind), elements_of(case) * floor
        assert 16 * run.stats.width[kind, 16] == least, kind
        assert moved["bytes"] - least <= most_other_bytes(run, len(LONG))[kind], kind
        # A sector holds 32 bytes. The state of a narrow parameter is twice as wide: the four elements that a thread
        # takes at a time lie 32 bytes from its neighbour's, so each of its sectors is asked for twice in a row.
        per_term = {"p": 1, "s": 2 if dtype.itemsize == 2 else 1}
        expected = elements_of(case) * sum(widths[term] * per_term[term] for term in of_kind) // 32
        wide = wide_sectors(run.stats, kind)
        assert wide == expected, kind
        if of_kind:
            assert wide >= 0.97 * moved["sectors"], kind


@pytest.mark.parametrize("operator", BY_BLOCKS)
@each_dtype
def test_each_block_moves_once_beside_the_elements(runs: list[arena.Run], operator: str, dtype: torch.dtype) -> None:
    call, *terms, times = BY_BLOCKS[operator]
    case = make_case(dtype, [Spec((size,)) for size in LONG])
    widths = {"p": dtype.itemsize, "s": compute_dtype(dtype).itemsize}
    found, expected = [], []
    for block in (4, 8):
        runs.clear()
        call(NAME, case, block)
        run, _ = longest(runs)
        for kind, of_kind in zip(("ld", "st"), terms, strict=True):
            assert 16 * run.stats.width[kind, 16] == elements_of(case) * sum(widths[term] for term in of_kind), kind
        # Of eight narrow elements a thread has four at a time, or two blocks of four: a sector is asked for twice.
        twice = dtype.itemsize == 2 and (operator == "lazy update" or block == 4)
        moved = elements_of(case) // block * widths["s"] * (2 if twice else 1)
        expected.append([moved * count // 32 for count in times])
        found.append([narrow_sectors(run.stats, kind) for kind in ("ld", "st")])
    # What else is read and written narrowly is the same for every block.
    assert [long - short for long, short in zip(*found)] == [long - short for long, short in zip(*expected)]


@pytest.mark.parametrize("operator", FLOORS)
@each_dtype
def test_tensors_at_any_alignment_move_at_the_floor_too(
    runs: list[arena.Run], operator: str, dtype: torch.dtype
) -> None:
    case = make_case(dtype, [Spec((size // 4 + 1,), shift=1) for size in LONG])
    FLOORS[operator][0](NAME, case)
    run = streaming(runs)
    for kind, floor in bytes_per_element(operator, dtype).items():
        least = elements_of(case) * floor
        most = least + most_other_bytes(run, len(LONG))[kind]
        assert least <= getattr(run.stats, kind)["bytes"] <= most, kind


# ---------------------------------------------------------------------------------------------------------------------
# The checks themselves


def test_every_kernel_that_nvcc_compiles_is_run(runs: list[arena.Run]) -> None:
    for dtype in DTYPES:
        call_everything(NAME, dtype)
    assert {run.name for run in runs} == ptx.kernels()


def shifted_pointers(arguments: bytes, shift: int) -> bytes:
    """A kernel's arguments with every pointer into the memory of the call moved by some bytes."""
    whole = len(arguments) // 8 * 8
    words = np.frombuffer(arguments[:whole], np.int64).copy()
    # Below are counts beside the upper half of a pointer that was there before.
    pointers = (words >= ptxrun.GBASE + 256) & (words < ptxrun.GBASE + arena.ARENA_BYTES)
    assert pointers.any()
    words[pointers] += shift
    return words.tobytes() + arguments[whole:]


@pytest.mark.parametrize(
    "shift, finding",
    [(1, "misaligned"), (4, "uninitialised"), (-4, "uninitialised"), (4 * GUARD + 256, "out-of-bounds")],
)
def test_pointers_that_point_elsewhere_are_found(monkeypatch: pytest.MonkeyPatch, shift: int, finding: str) -> None:
    original = ptx.Backend._launch

    def launch(self: ptx.Backend, memory: arena.Memory, launch: emulation.Launch) -> None:
        launch.arguments = shifted_pointers(launch.arguments, shift)
        original(self, memory, launch)

    case = make_case(torch.float32, [Spec((131,), shift=1)])
    monkeypatch.setattr(ptx.Backend, "_launch", launch)
    with pytest.raises(ptxrun.PtxError, match=finding):
        norm_of(NAME, case.grads)

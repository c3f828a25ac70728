"""What Triton makes of the kernels: bytes and widths as executed, every variant, and that the checks find faults.

That it computes the formulas is tested in tests/operators, as backend triton_ptx: each of its launches must be without
a race, a read of memory that nothing has written, an access out of bounds or misaligned (tests/support/triton_ptx.py).
"""

import math
from dataclasses import replace

import pytest
import torch

ptxrun = pytest.importorskip("ptxrun")
pytest.importorskip("triton")

from bench.triton_code import variants  # noqa: E402
from sassha_fused.triton_kernels import table  # noqa: E402
from sassha_fused.triton_kernels.counts import SCALARS  # noqa: E402
from tests.support import arena, backends, triton_ptx  # noqa: E402
from tests.support.calls import HYPER, call_everything, call_with_norm, norm_of, run_perturb, run_update  # noqa: E402
from tests.support.cases import DTYPES, GUARD, Case, Spec, compute_dtype, each_dtype, make_case  # noqa: E402
from tests.support.checks import check_skip, exact_norm  # noqa: E402
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
from tests.support.ways import summed  # noqa: E402

NAME = "triton_ptx"
# On so many there are more programs than are summed up at a time.
MANY_MULTIPROCESSORS = 140

pytestmark = backends.marks_of(NAME)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[arena.Run]:
    """The launches of this test, as they come."""
    found: list[arena.Run] = []
    monkeypatch.setattr(backends.executed(NAME), "runs", found)
    return found


def test_more_programs_than_are_summed_up_at_a_time_change_nothing(
    monkeypatch: pytest.MonkeyPatch, runs: list[arena.Run]
) -> None:
    monkeypatch.setattr(backends.executed(NAME), "multiprocessors", MANY_MULTIPROCESSORS)
    case = make_case(torch.float32, [Spec((1 + i % 3,), shift=i % 4) for i in range(1200)])
    found = norm_of(NAME, case.grads)
    assert runs[0].blocks > 1024
    assert found == pytest.approx(exact_norm(case.grads), rel=8 * 2**-53, abs=0)
    # What the last program finds is among the last to be summed up.
    case.grads[runs[0].blocks - 1][-1] = math.nan
    check_skip(NAME, case, guard_grads=True, hessian=False)


# ---------------------------------------------------------------------------------------------------------------------
# What moves


def on_whole_units(case: Case) -> Case:
    """The case with each tensor's signs from the first one of a Philox block on."""
    return replace(case, indices=[index // table.UNIT * table.UNIT for index in case.indices])


def streaming(runs: list[arena.Run]) -> arena.Run:
    """The launch that goes over the elements, of a call's launches; the others touch a few bytes per tensor."""
    run, others = longest(runs)
    for other in others:
        # By each thread a few settings and guards; two counts and three numbers in per tensor and seven out, or the
        # partial sums of a launch.
        rows = len(LONG) + 3
        assert other.stats.ld["bytes"] <= 8 * (9 * other.blocks * other.threads + run.blocks + 5 * rows)
        assert other.stats.st["bytes"] <= 8 * (other.blocks + 7 * rows)
    return run


def tiles_of(run: arena.Run, case: Case) -> int:
    """How many tiles a launch goes over, where these begin with the tensors."""
    size = table.UNIT * triton_ptx.compiled()[run.name].variant.constants["UNITS"]
    return sum(-(-param.numel() // size) for param in case.params)


def most_other_bytes(run: arena.Run, case: Case) -> dict[str, int]:
    """What a launch may read and write beside the elements, whose addresses every thread looks up for each tile.

    Read: by each thread and tile the entry's first tile twice, its skip, length, number and shift, up to six addresses
    and four scalars, or seven halves as wide; by each thread the settings, one scalar and the new counts, by each
    program the partial sums. Written: a partial sum per program, the counts, the norm or a flag.
    """
    # One more for elements before the first of the tensor, in its first Philox block.
    tiles = tiles_of(run, case) + len(case.params)
    return {
        "ld": 8 * (run.threads * (16 * tiles + 14 * run.blocks) + run.blocks * run.blocks),
        "st": 8 * (run.blocks + 2 * len(case.params) + 1),
    }


def element_bytes(run: arena.Run, kind: str, case: Case) -> int:
    """What was moved of elements; single ones of float64 are left out, for tables, counts and scalars look the same."""
    if case.params[0].dtype == torch.float64:
        return 16 * run.stats.width[kind, 16]
    moved = sum(width * run.stats.width[kind, width] for width in (2, 4, 16))
    # What the elements of a tensor share is read by each thread for each tile; in a skipped step only the perturbation,
    # which narrow parameters have no use for in others.
    shared = 0
    if kind == "ld" and run.name.startswith("update_kernel"):
        narrow = case.params[0].dtype.itemsize == 2
        shared = 1 if int(case.skipped) else SCALARS - narrow
    return moved - 4 * shared * run.threads * tiles_of(run, case)


@pytest.mark.parametrize("operator", FLOORS)
@each_dtype
def test_aligned_tensors_move_at_the_floor_and_16_bytes_at_a_time(
    runs: list[arena.Run], operator: str, dtype: torch.dtype
) -> None:
    case = on_whole_units(make_case(dtype, [Spec((size,)) for size in LONG]))
    FLOORS[operator][0](NAME, case)
    run = streaming(runs)
    for kind, floor in bytes_per_element(operator, dtype).items():
        least = elements_of(case) * floor
        assert element_bytes(run, kind, case) == 16 * run.stats.width[kind, 16] == least, kind
        assert getattr(run.stats, kind)["bytes"] - least <= most_other_bytes(run, case)[kind], kind
        # A sector holds 32 bytes. The state of a narrow parameter is twice as wide: where a thread keeps to the
        # elements whose parameters it reads, each sector of their state is asked for twice in a row.
        most = least * (2 if dtype.itemsize == 2 else 1)
        assert least <= 32 * wide_sectors(run.stats, kind) <= most, kind


@pytest.mark.parametrize("operator", [operator for operator in FLOORS if "adaptive" not in operator])
@each_dtype
def test_tensors_at_any_alignment_move_at_the_floor_too(
    runs: list[arena.Run], operator: str, dtype: torch.dtype
) -> None:
    case = make_case(dtype, [Spec((size // 4 + 1,), shift=1) for size in LONG])
    FLOORS[operator][0](NAME, case)
    run = streaming(runs)
    for kind, floor in bytes_per_element(operator, dtype).items():
        least = elements_of(case) * floor
        if dtype != torch.float64:
            assert element_bytes(run, kind, case) == least, kind
        assert least <= getattr(run.stats, kind)["bytes"] <= least + most_other_bytes(run, case)[kind], kind


@pytest.mark.parametrize("operator", BY_BLOCKS)
@each_dtype
def test_beside_the_elements_each_vector_asks_for_its_blocks(
    runs: list[arena.Run], operator: str, dtype: torch.dtype
) -> None:
    call, *terms, (_, writes) = BY_BLOCKS[operator]
    case = make_case(dtype, [Spec((size,)) for size in LONG])
    widths = {"p": dtype.itemsize, "s": compute_dtype(dtype).itemsize}
    sectors = []
    for block in (8, 16):
        runs.clear()
        call(NAME, case, block)
        run = streaming(runs)
        for kind, of_kind in zip(("ld", "st"), terms, strict=True):
            assert 16 * run.stats.width[kind, 16] == elements_of(case) * sum(widths[term] for term in of_kind), kind
        # One number for each block; in float64 counts and a flag look the same.
        if writes or dtype != torch.float64:
            assert run.stats.width["st", widths["s"]] == writes * elements_of(case) // block
        sectors.append(narrow_sectors(run.stats, "ld"))
    # Every element of a vector asks for its block's sector, which is in the cache for all but the first.
    most = elements_of(case) // 16 * widths["s"] // 32
    assert sectors[0] - sectors[1] <= 16 // dtype.itemsize * most


@each_dtype
def test_a_skipped_step_without_a_backup_touches_no_element(runs: list[arena.Run], dtype: torch.dtype) -> None:
    case = on_whole_units(make_case(dtype, [Spec((size,)) for size in LONG]))
    run_update(NAME, case, HYPER, True, [torch.tensor(math.nan)], backup=False)
    assert [(run.stats.width["ld", 16], run.stats.width["st", 16]) for run in runs] == [(0, 0)] * 2
    assert sum(run.stats.st["bytes"] for run in runs) < 8 * elements_of(case)


def test_only_aligned_tensors_and_only_their_whole_tiles_go_16_bytes_at_a_time(runs: list[arena.Run]) -> None:
    size, tile = 3 * 512 + 1, 512
    for shift, wide in ((0, size // tile * tile), (1, 0), (4, size // tile * tile)):
        runs.clear()
        run_perturb(NAME, make_case(torch.float32, [Spec((size,), shift=shift)]), 1.0, 0.2, False, False)
        (run,) = runs
        assert triton_ptx.compiled()[run.name].variant.constants["UNITS"] * table.UNIT == tile
        for kind in ("ld", "st"):
            assert 4 * run.stats.width[kind, 16] == 2 * wide
            assert run.stats.width[kind, 4] == 2 * (size - wide)


# ---------------------------------------------------------------------------------------------------------------------
# The checks themselves


def test_every_variant_that_is_compiled_is_run(runs: list[arena.Run]) -> None:
    for dtype in DTYPES:
        call_everything(NAME, dtype)
        with summed(NAME, quick=False):
            case = make_case(dtype, [Spec((5,), shift=1), Spec((130,))])
            for adaptive in (False, True):
                norm_of(NAME, case.grads, case.params, adaptive)
            call_with_norm(NAME, case)
    listed = {variant.name for variant in variants(triton_ptx.ARCHITECTURE)}
    assert {run.name for run in runs} == listed == set(triton_ptx.compiled())


@pytest.mark.parametrize(
    "shift, finding",
    [(1, "misaligned"), (4, "uninitialised"), (-4, "uninitialised"), (4 * GUARD + 256, "out-of-bounds")],
)
def test_addresses_that_point_elsewhere_are_found(monkeypatch: pytest.MonkeyPatch, shift: int, finding: str) -> None:
    original = table._addresses
    monkeypatch.setattr(table, "_addresses", lambda *stream: [address + shift for address in original(*stream)])
    case = make_case(torch.float32, [Spec((131,), shift=1)])
    with pytest.raises(ptxrun.PtxError, match=finding):
        norm_of(NAME, case.grads)


def test_programs_that_work_on_the_same_elements_are_found() -> None:
    case = make_case(torch.float32, [Spec((131,)), Spec((131,))])
    case.params[1] = case.params[0]
    with pytest.raises(ptxrun.PtxError, match="race-global"):
        run_perturb(NAME, case, 1.0, 0.2, False, False)

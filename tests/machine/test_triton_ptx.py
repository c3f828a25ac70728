"""What Triton makes of the kernels, against the formulas: every launch run on the CPU, every access checked, counted.

The checks are those of tests/operators/test_operators.py. Every launch must be without a race, a read
of memory that nothing has written, an access out of bounds or misaligned; see tests/support/triton_ptx.py.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

ptxrun = pytest.importorskip("ptxrun")
pytest.importorskip("triton")

from bench.triton_code import variants  # noqa: E402
from sassha_fused import ops  # noqa: E402
from sassha_fused.triton_kernels import table  # noqa: E402
from tests.support import arena, backends, triton_ptx  # noqa: E402
from tests.operators.test_operators import (  # noqa: E402
    HYPER,
    check_hutchinson,
    check_perturb,
    check_skip,
    check_update,
    exact_norm,
    hutchinson,
    norm_of,
    perturb,
    run_hutchinson,
    run_perturb,
    run_rademacher,
    run_update,
    update,
)
from tests.operators.test_signs import BEYOND_32_BITS, KNOWN_WORDS, signs_of  # noqa: E402
from tests.support.backends import operators_of  # noqa: E402
from tests.support.cases import (  # noqa: E402
    DTYPES,
    GUARD,
    LAYOUTS,
    SIZES,
    Case,
    Spec,
    assert_same_bits,
    assert_same_case,
    assert_untouched,
    compute_dtype,
    each_dtype,
    each_narrow_dtype,
    every_layout,
    every_size,
    make_case,
    many,
)
from tests.support.problems import single_threaded  # noqa: E402
from tests.support.reference import memory_order, signs  # noqa: E402

NAME = "triton_ptx"
POWERS = (0.5, 1.0, 0.7)

# Of the longer lists each program has several tiles; on many there are more programs than are summed up at a time.
MULTIPROCESSORS = 8
MANY_MULTIPROCESSORS = 140

LISTS: dict[str, Callable[[torch.dtype], list[Spec]]] = {
    "every size": every_size,
    "every layout": lambda dtype: every_layout(),
    "no elements": lambda dtype: [Spec((0,)), Spec((0, 3))],
    "1 tensor": lambda dtype: [Spec((3, 7), shift=1)],
    "57 tensors": lambda dtype: many(57),
    # More than a program has rows of the counts, and than are searched at once.
    "150 tensors": lambda dtype: [Spec((7 * i % 150,), shift=i % 4) for i in range(150)],
    "1200 tensors": lambda dtype: [Spec((1 + i % 3,), shift=i % 4) for i in range(1200)],
}
each_list = pytest.mark.parametrize("specs", [name for name in LISTS if name != "1200 tensors"])
each_kind = pytest.mark.parametrize("hessian", [False, True], ids=["lazy", "hessian"])

one_thread = pytest.fixture(autouse=True, scope="module")(single_threaded)


@functools.cache
def listed_case(dtype: torch.dtype, specs: str) -> Case:
    return make_case(dtype, LISTS[specs](dtype))


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[triton_ptx.Backend]:
    """The backend, known by its name to the helpers of other tests while this module runs."""
    backend = triton_ptx.Backend(MULTIPROCESSORS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ops.BACKENDS, NAME, ops.Backend(("cpu",), lambda: None, backend.operators))
        patch.setitem(backends.BACKENDS, NAME, "cpu")
        yield backend


@pytest.fixture
def runs(registered: triton_ptx.Backend) -> list[arena.Run]:
    """The launches of this test, as they come."""
    registered.runs.clear()
    return registered.runs


# ---------------------------------------------------------------------------------------------------------------------
# The formulas, element by element


@each_dtype
@each_list
def test_perturb_moves_every_element_by_the_formula_and_nothing_else(dtype: torch.dtype, specs: str) -> None:
    check_perturb(NAME, listed_case(dtype, specs), 7.3)


@each_dtype
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_perturb_is_the_formula_in_every_mode(dtype: torch.dtype, adaptive: bool, maximize: bool) -> None:
    check_perturb(NAME, listed_case(dtype, "57 tensors"), 0.37, 0.05, adaptive, maximize)


@each_dtype
@pytest.mark.parametrize("adaptive", [False, True])
def test_perturb_measures_the_norm_that_grad_norm_does(dtype: torch.dtype, adaptive: bool) -> None:
    operators, before = operators_of(NAME), make_case(dtype, many(20))
    given, measured = before.to("cpu"), before.to("cpu")
    norm = operators.grad_norm(given.grads, given.params if adaptive else [], adaptive)
    own = torch.full_like(norm, math.nan)
    for case, scalar, measure in ((given, norm, False), (measured, own, True)):
        operators.perturb_(case.params, case.grads, case.backup, case.offsets, scalar, measure, 0.2, adaptive, False)
    assert_same_bits(own, norm, "norm")
    assert_same_case(measured, given)


@each_dtype
@each_list
@each_kind
def test_update_changes_every_element_by_the_formula_and_nothing_else(
    dtype: torch.dtype, specs: str, hessian: bool
) -> None:
    check_update(NAME, listed_case(dtype, specs), hessian)


@each_dtype
@each_kind
@pytest.mark.parametrize("hessian_power", POWERS)
def test_update_is_the_formula_at_every_power(dtype: torch.dtype, hessian: bool, hessian_power: float) -> None:
    check_update(NAME, make_case(dtype, many(20)), hessian, hessian_power=hessian_power)


@each_dtype
@each_kind
@pytest.mark.parametrize("bias_correction, maximize", [("step", True), ("update", False)])
def test_update_is_the_formula_in_every_mode(
    dtype: torch.dtype, hessian: bool, bias_correction: str, maximize: bool
) -> None:
    check_update(NAME, make_case(dtype, many(12)), hessian, bias_correction=bias_correction, maximize=maximize)


@pytest.mark.parametrize("steps", [(0, 0), (9, 1), (100_000, 3), (3_000_000_000, 3_000_000_000)])
def test_counts_of_any_length_correct_the_bias(steps: tuple[int, int]) -> None:
    case = make_case(torch.float64, [Spec((5,))])
    case.steps[case.rows[0]] = torch.tensor(steps)
    for correction in ("step", "update"):
        check_update(NAME, case, hessian=True, bias_correction=correction)


@each_dtype
@pytest.mark.parametrize("lr_dtype", DTYPES, ids=str)
def test_a_tensor_takes_the_place_of_the_learning_rate(dtype: torch.dtype, lr_dtype: torch.dtype) -> None:
    case = make_case(dtype, [*many(5), Spec(())])
    check_update(NAME, case, True, lr_tensor=torch.tensor(0.033, dtype=lr_dtype), lr=1e6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("hessian_power", POWERS)
def test_update_takes_products_in_the_dtype_of_the_state(dtype: torch.dtype, hessian_power: float) -> None:
    specs = [*many(20), Spec((3, 4, 5, 5), "channels_last"), Spec((5, 6), "sliced")]
    case = replace(make_case(dtype, specs), products=make_case(torch.float32, specs, seed=1).products)
    check_update(NAME, case, hessian=True, hessian_power=hessian_power)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("others", LAYOUTS)
def test_gradients_and_products_may_have_other_strides_than_their_parameter(dtype: torch.dtype, others: str) -> None:
    specs = [Spec(shape, layout, 1) for shape in [(6, 11), (4, 3, 5, 5)] for layout in LAYOUTS]
    case = make_case(dtype, specs, others=others)
    check_perturb(NAME, case, 2.0)
    check_update(NAME, case, hessian=True)


@each_dtype
@each_list
def test_one_sample_of_the_estimate_is_the_product_with_its_signs(dtype: torch.dtype, specs: str) -> None:
    check_hutchinson(NAME, listed_case(dtype, specs), 0, 1)


@each_dtype
@pytest.mark.parametrize("sample", [0, 1, 2])
def test_the_estimate_starts_at_zero_and_ends_as_the_mean(dtype: torch.dtype, sample: int) -> None:
    check_hutchinson(NAME, listed_case(dtype, "every layout"), sample, 3)


@each_dtype
@each_list
@pytest.mark.parametrize("adaptive", [False, True])
def test_norm_is_exact_to_a_few_ulp_of_float64(dtype: torch.dtype, specs: str, adaptive: bool) -> None:
    case = listed_case(dtype, specs)
    expected = exact_norm(case.grads, case.params if adaptive else None)
    assert norm_of(NAME, case.grads, case.params, adaptive) == pytest.approx(expected, rel=8 * 2**-53, abs=0)


def test_more_programs_than_are_summed_up_at_a_time_change_nothing(
    monkeypatch: pytest.MonkeyPatch, registered: triton_ptx.Backend, runs: list[arena.Run]
) -> None:
    monkeypatch.setattr(registered, "multiprocessors", MANY_MULTIPROCESSORS)
    case = listed_case(torch.float32, "1200 tensors").to("cpu")
    found = norm_of(NAME, case.grads)
    assert runs[0].blocks > 1024
    assert found == pytest.approx(exact_norm(case.grads), rel=8 * 2**-53, abs=0)
    # What the last program finds is among the last to be summed up.
    case.grads[runs[0].blocks - 1][-1] = math.nan
    check_skip(NAME, case, guard_grads=True, hessian=False)


# ---------------------------------------------------------------------------------------------------------------------
# Bad steps


@pytest.mark.parametrize("guard_dtype", DTYPES, ids=str)
@each_kind
def test_a_guard_that_is_not_finite_restores_the_weights_and_writes_nothing_else(
    guard_dtype: torch.dtype, hessian: bool
) -> None:
    case = make_case(torch.float32, [*many(12), Spec((3, 4, 5, 5), "channels_last"), Spec((5, 6), "sliced"), Spec(())])
    check_skip(NAME, case, torch.tensor(math.inf, dtype=guard_dtype), hessian=hessian)


def test_any_one_of_several_guards_skips_the_step() -> None:
    case, good = make_case(torch.float32, many(3)), [torch.tensor(float(i)) for i in range(4)]
    for i in range(len(good) + 1):
        check_skip(NAME, case, *good[:i], torch.tensor(math.nan), *good[i:])
    assert update(NAME, case, HYPER, True, good).skipped.tolist() == [0]


@each_dtype
@pytest.mark.parametrize("name", ["grads", "products"])
def test_one_element_that_is_not_finite_skips_the_step_where_gradients_are_guards(
    dtype: torch.dtype, name: str
) -> None:
    case = make_case(dtype, [Spec((5_000,), shift=1), *many(3), Spec((3, 4, 5, 5), "channels_last"), Spec(())])
    assert update(NAME, case, HYPER, True, guard_grads=True).skipped.tolist() == [0]
    tensors = getattr(case, name)
    for i in (0, len(tensors) - 1):
        for element in {0, tensors[i].numel() - 1}:
            kept = tensors[i]
            tensors[i] = kept.clone(memory_format=torch.preserve_format)
            tensors[i].view(-1)[element] = math.nan
            check_skip(NAME, case, guard_grads=True)
            tensors[i] = kept


@each_dtype
def test_a_skipped_step_brings_back_every_size_and_layout(dtype: torch.dtype) -> None:
    check_skip(NAME, make_case(dtype, [*every_size(dtype), *every_layout()]), torch.tensor(math.inf))


# ---------------------------------------------------------------------------------------------------------------------
# Signs


@each_dtype
def test_the_first_signs_are_the_bits_of_the_known_answer(dtype: torch.dtype) -> None:
    bits = [word >> bit & 1 for word in KNOWN_WORDS for bit in range(32)]
    assert signs_of(NAME, 0, 128, 0, 0, 0, dtype).tolist() == [1 if bit else -1 for bit in bits]


@pytest.mark.parametrize("index", [0, 1, 31, 32, 33, 96, 127, 129, 2**31 - 77, 3 * BEYOND_32_BITS - 300])
def test_signs_from_any_index_on_are_those_of_the_reference(index: int) -> None:
    for count in (1, 33, 129, 1500):
        assert_same_bits(signs_of(NAME, index, count, 5, 6, 7), signs(index, count, 5, 6, 7).float(), "signs")


def test_signs_depend_on_every_bit_of_seed_evaluation_and_sample() -> None:
    for seed, evaluation, sample in ((2**63 - 1, 2**32 - 1, 2**31 - 1), (1 << 32, 0, 0), (0, 1 << 31, 0), (0, 0, 1)):
        found = signs_of(NAME, 5, 300, seed, evaluation, sample)
        assert_same_bits(found, signs(5, 300, seed, evaluation, sample).float(), "signs")


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_signs_follow_the_memory_of_dense_tensors_and_the_rows_of_others(dtype: torch.dtype, layout: str) -> None:
    shapes = [(), (1,), (0, 3), (9, 1), (6, 11), (4, 3, 5, 5), (33, 140)]
    sizes = [n for n in SIZES if n < 5000]
    before = make_case(dtype, [*(Spec(shape, layout, 1) for shape in shapes), *(Spec((n,), layout, 3) for n in sizes)])
    case = before.to("cpu")
    run_rademacher(NAME, case, 5, 6, 7)
    for z, index in zip(case.params, case.indices, strict=True):
        assert_same_bits(memory_order(z), signs(index, z.numel(), 5, 6, 7).to(dtype), "signs")
    assert_untouched(case, before, but=("params",))


def test_a_thousand_tensors_have_the_signs_of_one() -> None:
    tensors = [torch.empty(spec.shape) for spec in LISTS["1200 tensors"](torch.float32)]
    starts = torch.tensor([0, *(t.numel() for t in tensors)]).cumsum(0).tolist()
    operators_of(NAME).rademacher_(tensors, starts[:-1], 5, torch.tensor(6), 7)
    assert_same_bits(torch.cat(tensors), signs(0, starts[-1], 5, 6, 7).float(), "signs")


# ---------------------------------------------------------------------------------------------------------------------
# The same bits as other compilers make


def assert_same_bits_as_cpu(specs: str, dtype: torch.dtype, run: Callable[[str, Case], Case]) -> None:
    case = listed_case(dtype, specs)
    assert_same_case(run(NAME, case), run("cpu", case))


@each_narrow_dtype
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("specs", ["every size", "every layout"])
def test_perturb_gives_the_bits_of_the_cpu_kernels(dtype: torch.dtype, adaptive: bool, specs: str) -> None:
    assert_same_bits_as_cpu(specs, dtype, lambda name, case: perturb(name, case, 7.3, 0.2, adaptive, False))


@each_narrow_dtype
@pytest.mark.parametrize("hessian_power", [0.5, 1.0])
@pytest.mark.parametrize("specs, hessian", [("every size", True), ("57 tensors", False)])
def test_update_gives_the_bits_of_the_cpu_kernels(
    dtype: torch.dtype, hessian_power: float, specs: str, hessian: bool
) -> None:
    hyper = {**HYPER, "hessian_power": hessian_power}
    assert_same_bits_as_cpu(specs, dtype, lambda name, case: update(name, case, hyper, hessian))


@pytest.mark.parametrize("hessian_power", [0.5, 1.0])
def test_update_of_float64_gives_the_bits_of_the_cpu_kernels(hessian_power: float) -> None:
    # Bias corrections enter here without being rounded to float32.
    case = listed_case(torch.float64, "57 tensors").to("cpu")
    case.steps[:] = 10 ** (torch.rand(case.steps.shape, generator=torch.Generator().manual_seed(0)) * 9)
    hyper = {**HYPER, "hessian_power": hessian_power, "betas": (0.9, 0.99999)}
    assert_same_case(*(update(name, case, hyper, True) for name in (NAME, "cpu")))


@each_dtype
@pytest.mark.parametrize("sample", [0, 1, 2])
def test_the_estimate_has_the_bits_of_the_cpu_kernels(dtype: torch.dtype, sample: int) -> None:
    assert_same_bits_as_cpu("every size", dtype, lambda name, case: hutchinson(name, case, 1, 2, sample, 3))


# ---------------------------------------------------------------------------------------------------------------------
# What moves


def elements_of(case: Case) -> int:
    return sum(param.numel() for param in case.params)


def on_whole_units(case: Case) -> Case:
    """The case with each tensor's signs from the first one of a Philox block on."""
    return replace(case, indices=[index // table.UNIT * table.UNIT for index in case.indices])


def streaming(runs: list[arena.Run]) -> arena.Run:
    """The launch that goes over the elements, of a call's launches; the others touch a few bytes per tensor."""
    *others, longest = sorted(runs, key=lambda run: run.stats.ld["bytes"] + run.stats.st["bytes"])
    for run in others:
        # By each thread a few scalars; counts in and three scalars out per tensor, or the partial sums of a launch.
        rows = len(arena.LONG) + 3
        assert run.stats.ld["bytes"] <= 8 * (3 * run.blocks * run.threads + longest.blocks + 2 * rows)
        assert run.stats.st["bytes"] <= 8 * (run.blocks + 3 * rows)
    return longest


def most_other_bytes(run: arena.Run, case: Case) -> dict[str, int]:
    """What a launch may read and write beside the elements, whose addresses every thread looks up for each tile.

    Read: by each thread and tile the entry's first tile twice, its skip, length and number, up to six addresses and
    three scalars; by each thread one scalar and the new counts, by each program the partial sums. Written: a partial
    sum per program, the counts, the norm or a flag.
    """
    size = table.UNIT * triton_ptx.compiled()[run.name].variant.constants["UNITS"]
    # One more for elements before the first of the tensor, in its first Philox block.
    tiles = sum(-(-param.numel() // size) + 1 for param in case.params)
    return {
        "ld": 8 * (run.threads * (14 * tiles + 4 * run.blocks) + run.blocks * run.blocks),
        "st": 8 * (run.blocks + 2 * len(case.params) + 1),
    }


def bytes_per_element(operator: str, dtype: torch.dtype) -> dict[str, int]:
    """What an operator must read (ld) and write (st) of each element."""
    widths = {"p": dtype.itemsize, "s": compute_dtype(dtype).itemsize}
    _, *terms = arena.FLOORS[operator]
    return {kind: sum(widths[term] for term in of_kind) for kind, of_kind in zip(("ld", "st"), terms, strict=True)}


def element_bytes(run: arena.Run, kind: str, dtype: torch.dtype) -> int:
    """What was moved of elements; single ones of float64 are left out, for tables, counts and scalars look the same."""
    widths = (16,) if dtype == torch.float64 else (2, 4, 16)
    return sum(width * run.stats.width[kind, width] for width in widths)


@pytest.mark.parametrize("operator", arena.FLOORS)
@each_dtype
def test_aligned_tensors_move_at_the_floor_and_16_bytes_at_a_time(
    runs: list[arena.Run], operator: str, dtype: torch.dtype
) -> None:
    case = on_whole_units(make_case(dtype, [Spec((size,)) for size in arena.LONG]))
    floor = bytes_per_element(operator, dtype)
    if dtype == torch.float32 and operator in arena.FLOAT32_BYTES:
        assert sum(floor.values()) == arena.FLOAT32_BYTES[operator]
    arena.FLOORS[operator][0](NAME, case)
    run = streaming(runs)
    for kind in ("ld", "st"):
        least = elements_of(case) * floor[kind]
        assert element_bytes(run, kind, dtype) == 16 * run.stats.width[kind, 16] == least, kind
        assert getattr(run.stats, kind)["bytes"] - least <= most_other_bytes(run, case)[kind], kind
        # A sector holds 32 bytes. The state of a narrow parameter is twice as wide: where a thread keeps to the
        # elements whose parameters it reads, each sector of their state is asked for twice in a row.
        most = least * (2 if dtype.itemsize == 2 else 1)
        assert least <= 32 * arena.wide_sectors(run.stats, kind) <= most, kind


@pytest.mark.parametrize("operator", [operator for operator in arena.FLOORS if "adaptive" not in operator])
@each_dtype
def test_tensors_at_any_alignment_move_at_the_floor_too(
    runs: list[arena.Run], operator: str, dtype: torch.dtype
) -> None:
    case = make_case(dtype, [Spec((size + 1,), shift=1) for size in arena.LONG])
    arena.FLOORS[operator][0](NAME, case)
    run = streaming(runs)
    for kind, floor in bytes_per_element(operator, dtype).items():
        least = elements_of(case) * floor
        if dtype != torch.float64:
            assert element_bytes(run, kind, dtype) == least, kind
        assert least <= getattr(run.stats, kind)["bytes"] <= least + most_other_bytes(run, case)[kind], kind


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


def call_everything(dtype: torch.dtype) -> None:
    """Every operator in every mode that has a kernel of its own."""
    case = make_case(dtype, [Spec((5,), shift=1), Spec((130,))])
    for adaptive in (False, True):
        norm_of(NAME, case.grads, case.params, adaptive)
        run_perturb(NAME, case, 1.0, 0.2, adaptive, False)
    run_rademacher(NAME, case, 1, 2, 3)
    for sample in (0, 1):
        run_hutchinson(NAME, case, 1, 2, sample, 2)
    wide = replace(case, products=[product.to(compute_dtype(dtype)) for product in case.products])
    for hessian_power in POWERS:
        hyper = {**HYPER, "hessian_power": hessian_power}
        for on, hessian in ((case, False), (case, True), (wide, True)):
            run_update(NAME, on, hyper, hessian)


def test_every_variant_that_is_compiled_is_run(runs: list[arena.Run]) -> None:
    for dtype in DTYPES:
        call_everything(dtype)
    listed = {variant.name for variant in variants(triton_ptx.WARP_SIZE)}
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

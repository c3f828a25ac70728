"""What nvcc makes of the kernels, against the formulas: every launch run on the CPU, every access checked and counted.

The checks are those of tests/operators/test_operators.py. Every launch must be without a race, a read
of memory that nothing has written, an access out of bounds or misaligned; see tests/support/ptx.py.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

ptxrun = pytest.importorskip("ptxrun")

from sassha_fused import ops  # noqa: E402
from tests.support import arena, backends, emulation, ptx  # noqa: E402
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

if ptx.nvcc() is None:
    pytest.skip("nvcc was not found", allow_module_level=True)

NAME = "cuda_ptx"
POWERS = (0.5, 1.0, 0.7)

# The loops over what is left of a table come round several times in the longer ones.
MULTIPROCESSORS = 4

LISTS: dict[str, Callable[[torch.dtype], list[Spec]]] = {
    "every size": every_size,
    "every layout": lambda dtype: every_layout(),
    "1 tensor": lambda dtype: [Spec((3, 7), shift=1)],
    "57 tensors": lambda dtype: many(57),
    # Each of up to two units; more than one table holds.
    "1000 tensors": lambda dtype: [Spec((7 * i % 150,), shift=i % 4) for i in range(1000)],
}
each_list = pytest.mark.parametrize("specs", LISTS)
each_kind = pytest.mark.parametrize("hessian", [False, True], ids=["lazy", "hessian"])

one_thread = pytest.fixture(autouse=True, scope="module")(single_threaded)


@functools.cache
def listed_case(dtype: torch.dtype, specs: str) -> Case:
    return make_case(dtype, LISTS[specs](dtype))


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[ptx.Backend]:
    """The backend, known by its name to the helpers of other tests while this module runs."""
    backend = ptx.Backend()
    with pytest.MonkeyPatch.context() as patch, emulation.device(MULTIPROCESSORS, 1):
        patch.setitem(ops.BACKENDS, NAME, ops.Backend(("cpu",), lambda: None, backend.operators))
        patch.setitem(backends.BACKENDS, NAME, "cpu")
        yield backend


@pytest.fixture
def runs(registered: ptx.Backend) -> list[arena.Run]:
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
    operators, before = operators_of(NAME), listed_case(dtype, "every size")
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
@pytest.mark.parametrize("bias_correction, maximize", [("step", True), ("update", False)])
def test_update_is_the_formula_in_every_mode(
    dtype: torch.dtype, hessian: bool, hessian_power: float, bias_correction: str, maximize: bool
) -> None:
    modes = {"hessian_power": hessian_power, "bias_correction": bias_correction, "maximize": maximize}
    check_update(NAME, make_case(dtype, many(20)), hessian, **modes)


@each_dtype
@pytest.mark.parametrize("lr_dtype", DTYPES, ids=str)
def test_a_tensor_takes_the_place_of_the_learning_rate(dtype: torch.dtype, lr_dtype: torch.dtype) -> None:
    case = make_case(dtype, [*many(9), Spec(())])
    check_update(NAME, case, True, lr_tensor=torch.tensor(0.033, dtype=lr_dtype), lr=1e6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("hessian_power", POWERS)
def test_update_takes_products_in_the_dtype_of_the_state(dtype: torch.dtype, hessian_power: float) -> None:
    specs = [*many(20), *every_layout()]
    case = replace(make_case(dtype, specs), products=make_case(torch.float32, specs, seed=1).products)
    check_update(NAME, case, hessian=True, hessian_power=hessian_power)


@each_dtype
@pytest.mark.parametrize("others", LAYOUTS)
def test_gradients_and_products_may_have_other_strides_than_their_parameter(dtype: torch.dtype, others: str) -> None:
    specs = [Spec(shape, layout, 1) for shape in [(3, 1, 4), (6, 11), (4, 3, 5, 5)] for layout in LAYOUTS]
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
    check_hutchinson(NAME, listed_case(dtype, "every size"), sample, 3)


@each_dtype
@each_list
@pytest.mark.parametrize("adaptive", [False, True])
def test_norm_is_exact_to_a_few_ulp_of_float64(dtype: torch.dtype, specs: str, adaptive: bool) -> None:
    case = listed_case(dtype, specs)
    expected = exact_norm(case.grads, case.params if adaptive else None)
    assert norm_of(NAME, case.grads, case.params, adaptive) == pytest.approx(expected, rel=8 * 2**-53, abs=0)


# ---------------------------------------------------------------------------------------------------------------------
# Bad steps


@each_dtype
@pytest.mark.parametrize("guard_dtype", DTYPES, ids=str)
@each_kind
def test_a_guard_that_is_not_finite_restores_the_weights_and_writes_nothing_else(
    dtype: torch.dtype, guard_dtype: torch.dtype, hessian: bool
) -> None:
    case = make_case(dtype, [*many(12), Spec((3, 4, 5, 5), "channels_last"), Spec((5, 6), "sliced"), Spec(())])
    check_skip(NAME, case, torch.tensor(math.inf, dtype=guard_dtype), hessian=hessian)


def test_any_one_of_several_guards_skips_the_step() -> None:
    # More than one launch looks at.
    case, good = make_case(torch.float32, many(5)), [torch.tensor(float(i)) for i in range(6)]
    for i in range(len(good) + 1):
        check_skip(NAME, case, *good[:i], torch.tensor(math.nan), *good[i:])
    assert update(NAME, case, HYPER, True, good).skipped.tolist() == [0]


@each_dtype
@pytest.mark.parametrize("name", ["grads", "products"])
def test_one_element_that_is_not_finite_skips_the_step_where_gradients_are_guards(
    dtype: torch.dtype, name: str
) -> None:
    case = make_case(dtype, [Spec((20_000,), shift=1), *many(5), Spec((3, 4, 5, 5), "channels_last"), Spec(())])
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


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_signs_follow_the_memory_of_dense_tensors_and_the_rows_of_others(dtype: torch.dtype, layout: str) -> None:
    shapes = [(), (1,), (0, 3), (9, 1), (6, 11), (4, 3, 5, 5), (33, 140)]
    before = make_case(dtype, [*(Spec(shape, layout, 1) for shape in shapes), *(Spec((n,), layout, 3) for n in SIZES)])
    case = before.to("cpu")
    run_rademacher(NAME, case, 5, 6, 7)
    for z, index in zip(case.params, case.indices, strict=True):
        assert_same_bits(memory_order(z), signs(index, z.numel(), 5, 6, 7).to(dtype), "signs")
    assert_untouched(case, before, but=("params",))


def test_a_thousand_tensors_have_the_signs_of_one() -> None:
    tensors = [torch.empty(spec.shape) for spec in LISTS["1000 tensors"](torch.float32)]
    starts = torch.tensor([0, *(t.numel() for t in tensors)]).cumsum(0).tolist()
    operators_of(NAME).rademacher_(tensors, starts[:-1], 5, torch.tensor(6), 7)
    assert_same_bits(torch.cat(tensors), signs(0, starts[-1], 5, 6, 7).float(), "signs")


# ---------------------------------------------------------------------------------------------------------------------
# The same bits as other compilers make


SAME_BITS_LISTS = ("every size", "every layout", "57 tensors")


def assert_same_everywhere(specs: str, dtype: torch.dtype, run: Callable[[str, Case], Case]) -> None:
    """Whatever is run gives the bits of the CPU kernels and those of g++'s version of the same sources."""
    case = listed_case(dtype, specs)
    found = run(NAME, case)
    for other in ("cpu", "cuda_emulated"):
        assert_same_case(found, run(other, case))


@each_narrow_dtype
@pytest.mark.parametrize("adaptive", [False, True])
def test_perturb_gives_the_bits_of_other_backends(dtype: torch.dtype, adaptive: bool) -> None:
    for specs in SAME_BITS_LISTS:
        assert_same_everywhere(specs, dtype, lambda name, case: perturb(name, case, 7.3, 0.2, adaptive, False))


@each_narrow_dtype
@pytest.mark.parametrize("hessian_power", [0.5, 1.0])
@each_kind
def test_update_gives_the_bits_of_other_backends(dtype: torch.dtype, hessian_power: float, hessian: bool) -> None:
    hyper = {**HYPER, "hessian_power": hessian_power}
    for specs in SAME_BITS_LISTS:
        assert_same_everywhere(specs, dtype, lambda name, case: update(name, case, hyper, hessian))


@each_dtype
@pytest.mark.parametrize("sample", [0, 1, 2])
def test_the_estimate_has_the_bits_of_other_backends(dtype: torch.dtype, sample: int) -> None:
    for specs in SAME_BITS_LISTS:
        assert_same_everywhere(specs, dtype, lambda name, case: hutchinson(name, case, 1, 2, sample, 3))


@each_dtype
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_norm_has_the_bits_of_the_emulation(dtype: torch.dtype, adaptive: bool) -> None:
    # Only the same blocks sum in the same order.
    for specs in LISTS:
        case = listed_case(dtype, specs)
        norms = {norm_of(name, case.grads, case.params, adaptive) for name in (NAME, "cuda_emulated")}
        assert len(norms) == 1


# ---------------------------------------------------------------------------------------------------------------------
# What moves

THREADS = 256


def streaming(runs: list[arena.Run]) -> arena.Run:
    """The launch that goes over the elements, of a call's launches; the others touch a few bytes per tensor."""
    *others, longest = sorted(runs, key=lambda run: run.stats.ld["bytes"] + run.stats.st["bytes"])
    for run in others:
        rows = len(arena.LONG) + 3
        # Counts and guards in, scalars out; or one partial sum per block in, and the norm out.
        assert run.stats.ld["bytes"] <= 16 * rows + 8 * (longest.blocks + 4)
        assert run.stats.st["bytes"] <= 40 * rows + 8
    return longest


def most_other_bytes(run: arena.Run, tensors: int) -> dict[str, int]:
    """What a launch may read and write beside the elements: as many bytes, whatever the number of elements.

    Read: by each thread one scalar and each tensor's prepared row of three, by each block the partial sums, of one
    launch of as many blocks; the new counts. Written: a partial sum per block, the counts, the norm or a flag.
    """
    threads = run.blocks * THREADS
    return {
        "ld": threads * 8 * (1 + 3 * tensors) + 8 * run.blocks * run.blocks + 16 * tensors,
        "st": 8 * (run.blocks + 2 * tensors + 1),
    }


@pytest.mark.parametrize("operator", arena.FLOORS)
@each_dtype
def test_aligned_tensors_move_at_the_floor_and_16_bytes_at_a_time(
    runs: list[arena.Run], operator: str, dtype: torch.dtype
) -> None:
    call, *floors = arena.FLOORS[operator]
    case = make_case(dtype, [Spec((size,)) for size in arena.LONG])
    widths = {"p": dtype.itemsize, "s": compute_dtype(dtype).itemsize}
    if dtype == torch.float32 and operator in arena.FLOAT32_BYTES:
        assert sum(widths[term] for terms in floors for term in terms) == arena.FLOAT32_BYTES[operator]
    call(NAME, case)
    run = streaming(runs)
    for kind, terms in zip(("ld", "st"), floors, strict=True):
        moved = getattr(run.stats, kind)
        least = sum(arena.LONG) * sum(widths[term] for term in terms)
        assert 16 * run.stats.width[kind, 16] == least, kind
        assert moved["bytes"] - least <= most_other_bytes(run, len(arena.LONG))[kind], kind
        # A sector holds 32 bytes. The state of a narrow parameter is twice as wide: the four elements that a thread
        # takes at a time lie 32 bytes from its neighbour's, so each of its sectors is asked for twice in a row.
        per_term = {"p": 1, "s": 2 if dtype.itemsize == 2 else 1}
        expected = sum(arena.LONG) * sum(widths[term] * per_term[term] for term in terms) // 32
        wide = arena.wide_sectors(run.stats, kind)
        assert wide == expected, kind
        if terms:
            assert wide >= 0.99 * moved["sectors"], kind


@pytest.mark.parametrize("operator", arena.FLOORS)
@each_dtype
def test_tensors_at_any_alignment_move_at_the_floor_too(
    runs: list[arena.Run], operator: str, dtype: torch.dtype
) -> None:
    call, *floors = arena.FLOORS[operator]
    sizes = [size + 1 for size in arena.LONG]
    case = make_case(dtype, [Spec((size,), shift=1) for size in sizes])
    widths = {"p": dtype.itemsize, "s": compute_dtype(dtype).itemsize}
    call(NAME, case)
    run = streaming(runs)
    for kind, terms in zip(("ld", "st"), floors, strict=True):
        least = sum(sizes) * sum(widths[term] for term in terms)
        assert least <= getattr(run.stats, kind)["bytes"] <= least + most_other_bytes(run, len(sizes))[kind], kind


# ---------------------------------------------------------------------------------------------------------------------
# The checks themselves


def call_everything(dtype: torch.dtype) -> None:
    """Every operator in every mode that has a kernel of its own."""
    case = make_case(dtype, [Spec((5,), shift=1), Spec((130,))])
    for adaptive in (False, True):
        norm_of(NAME, case.grads, case.params, adaptive)
        run_perturb(NAME, case, 1.0, 0.2, adaptive, False)
    run_rademacher(NAME, case, 1, 2, 3)
    run_hutchinson(NAME, case, 1, 2, 0, 1)
    wide = replace(case, products=[product.to(compute_dtype(dtype)) for product in case.products])
    for hessian_power in POWERS:
        hyper = {**HYPER, "hessian_power": hessian_power}
        for on, hessian in ((case, False), (case, True), (wide, True)):
            run_update(NAME, on, hyper, hessian)


def test_every_kernel_that_nvcc_compiles_is_run(runs: list[arena.Run]) -> None:
    for dtype in DTYPES:
        call_everything(dtype)
    assert {run.name for run in runs} == set(ptx.kernels())


def shifted_pointers(arguments: bytes, shift: int) -> bytes:
    """A kernel's arguments with every pointer into the memory of the call moved by some bytes."""
    whole = len(arguments) // 8 * 8
    words = np.frombuffer(arguments[:whole], np.int64).copy()
    pointers = (words >= ptxrun.GBASE) & (words < ptxrun.GBASE + arena.ARENA_BYTES)
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

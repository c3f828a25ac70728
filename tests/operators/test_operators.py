"""Every operator of every backend against the formulas, element by element: sizes, alignments, strides, counts."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sassha_fused.checks import BIAS_CORRECTIONS
from tests.support.backends import (
    BACKENDS,
    BASELINE,
    INTERPRETED,
    each_backend,
    each_other_backend,
    each_quick_backend,
    evaluation_on,
    marks_of,
    operators_of,
)
from tests.support.cases import (
    DTYPES,
    GENERAL_POWER_ULPS,
    LAYOUTS,
    SIZES,
    ULPS,
    Case,
    Spec,
    assert_rounded,
    assert_same_bits,
    assert_same_case,
    assert_untouched,
    each_dtype,
    each_narrow_dtype,
    every_layout,
    every_size,
    every_size_at_every_alignment,
    make_case,
    many,
    threads,
)
from tests.support.problems import single_threaded
from tests.support.reference import formula_perturb, formula_update, memory_order, signs

HYPER: dict[str, Any] = {
    "lr": 0.15,
    "betas": (0.9, 0.999),
    "eps": 1e-4,
    "weight_decay": 0.01,
    "hessian_power": 0.5,
    "bias_correction": "step",
    "maximize": False,
}

LISTS: dict[str, Callable[[torch.dtype], list[Spec]]] = {
    "every size": every_size,
    "every size at every alignment": every_size_at_every_alignment,
    "every layout": lambda dtype: every_layout(),
    "1 tensor": lambda dtype: [Spec((3, 7), shift=1)],
    "57 tensors": lambda dtype: many(57),
    "1000 tensors": lambda dtype: many(1000),
    "a long one": lambda dtype: [Spec((5,)), Spec((150_001,), shift=1), Spec((3,))],
}


# In place of these, for interpreted backends.
SHORT_LISTS: dict[str, Callable[[torch.dtype], list[Spec]]] = {
    "every size": lambda dtype: [Spec((size,), shift=i) for i, size in enumerate((*SIZES[1::4], SIZES[-1]))],
    "every size at every alignment": lambda dtype: [
        Spec((size,), shift=shift) for size in (1, 7, 128, 515) for shift in range(16 // dtype.itemsize)
    ],
    "57 tensors": lambda dtype: many(20),
    "1000 tensors": lambda dtype: many(40),
}


@functools.cache
def _made(dtype: torch.dtype, make_specs: Callable[[torch.dtype], list[Spec]]) -> Case:
    return make_case(dtype, make_specs(dtype))


def listed_case(backend: str, dtype: torch.dtype, specs: str) -> Case:
    """The case of a list for a backend."""
    lists = {**LISTS, **SHORT_LISTS} if backend in INTERPRETED else LISTS
    return _made(dtype, lists[specs])


each_list = pytest.mark.parametrize("specs", [name for name in LISTS if name != "a long one"])


# What more threads do is a test of its own.
one_thread = pytest.fixture(autouse=True, scope="module")(single_threaded)


# ---------------------------------------------------------------------------------------------------------------------
# Calls, and what must hold after them


def run_perturb(backend: str, on: Case, norm: float, rho: float, adaptive: bool, maximize: bool) -> None:
    scalar = torch.tensor(norm, dtype=torch.float64, device=BACKENDS[backend])
    operators_of(backend).perturb_(on.params, on.grads, on.backup, on.offsets, scalar, False, rho, adaptive, maximize)


def perturb(backend: str, case: Case, norm: float, rho: float, adaptive: bool, maximize: bool) -> Case:
    """What perturb_ makes of a case, on the CPU."""
    on = case.to(BACKENDS[backend])
    run_perturb(backend, on, norm, rho, adaptive, maximize)
    return on.to("cpu")


def check_perturb(
    backend: str, before: Case, norm: float, rho: float = 0.2, adaptive: bool = False, maximize: bool = False
) -> None:
    after = perturb(backend, before, norm, rho, adaptive, maximize)
    w = before.in_order(before.params)
    exact = formula_perturb(w, before.in_order(before.grads), norm, rho, adaptive, maximize)
    assert_rounded(after.params, exact.w, exact.w_largest, ULPS)
    assert_same_bits(torch.cat(after.parts(after.backup)), w, "backup")
    assert_untouched(after, before, but=("params", "backup"))


def run_update(
    backend: str,
    on: Case,
    hyper: dict[str, Any],
    hessian: bool,
    guards: Sequence[Tensor] = (torch.tensor(1.0),),
    guard_grads: bool = False,
    lr_tensor: Tensor | None = None,
) -> None:
    device = BACKENDS[backend]
    operators_of(backend).update_(
        on.params,
        on.grads,
        on.products if hessian else [],
        on.backup,
        on.exp_avg,
        on.exp_hessian,
        on.steps,
        on.skipped,
        on.offsets,
        on.rows,
        [guard.to(device) for guard in guards],
        guard_grads,
        None if lr_tensor is None else lr_tensor.to(device),
        hyper["lr"],
        *hyper["betas"],
        hyper["eps"],
        hyper["weight_decay"],
        hyper["hessian_power"],
        BIAS_CORRECTIONS.index(hyper["bias_correction"]),
        hyper["maximize"],
    )


def update(backend: str, case: Case, hyper: dict[str, Any], hessian: bool, *scalars: Any, **more: Any) -> Case:
    """What update_ makes of a case, on the CPU."""
    on = case.to(BACKENDS[backend])
    run_update(backend, on, hyper, hessian, *scalars, **more)
    return on.to("cpu")


def check_update(backend: str, before: Case, hessian: bool, lr_tensor: Tensor | None = None, **changes: Any) -> None:
    hyper = {**HYPER, **changes}
    after = update(backend, before, hyper, hessian, lr_tensor=lr_tensor)
    if lr_tensor is not None:
        hyper["lr"] = float(lr_tensor)
    counts = before.steps[before.rows]
    t, e = (
        int(count[0]) if (count == count[0]).all() else before.per_element(count.double()) for count in counts.unbind(1)
    )
    w, m, D = (torch.cat(before.parts(flat)) for flat in (before.backup, before.exp_avg, before.exp_hessian))
    exact = formula_update(
        w,
        before.in_order(before.grads),
        before.in_order(before.products) if hessian else None,
        m,
        D,
        t,
        e,
        **hyper,
    )
    assert_rounded(
        after.params, exact.w, exact.w_largest, ULPS if hyper["hessian_power"] in (0.5, 1.0) else GENERAL_POWER_ULPS
    )
    assert_rounded(after.parts(after.exp_avg), exact.m, exact.m_largest, ULPS)
    assert_rounded(after.parts(after.exp_hessian), exact.D, exact.D_largest, ULPS)
    expected = [
        [t + 1, (t if hyper["bias_correction"] == "step" else e) + 1 if hessian else e] for t, e in counts.tolist()
    ]
    assert after.steps[before.rows].tolist() == expected
    others = [row for row in range(len(before.steps)) if row not in set(before.rows)]
    assert_same_bits(after.steps[others], before.steps[others], "the counts of other parameters")
    assert after.skipped.tolist() == [0]
    # On a lazy step not one bit of D may change.
    written = ("params", "exp_avg", "steps", "skipped") + (("exp_hessian",) if hessian else ())
    assert_untouched(after, before, but=written)


def run_hutchinson(backend: str, on: Case, seed: int, evaluation: int, sample: int, samples: int) -> None:
    operators_of(backend).hutchinson_(
        on.products, on.estimate, on.offsets, on.indices, seed, evaluation_on(backend, evaluation), sample, samples
    )


def hutchinson(backend: str, case: Case, seed: int, evaluation: int, sample: int, samples: int) -> Case:
    """What hutchinson_ makes of a case, on the CPU."""
    on = case.to(BACKENDS[backend])
    run_hutchinson(backend, on, seed, evaluation, sample, samples)
    return on.to("cpu")


def run_rademacher(backend: str, on: Case, seed: int, evaluation: int, sample: int) -> None:
    """Writes the signs over the parameters."""
    operators_of(backend).rademacher_(on.params, on.indices, seed, evaluation_on(backend, evaluation), sample)


def check_hutchinson(backend: str, before: Case, sample: int, samples: int) -> None:
    after = hutchinson(backend, before, 5, 6, sample, samples)
    z = [signs(i, p.numel(), 5, 6, sample) for i, p in zip(before.indices, before.products, strict=True)]
    terms = [torch.cat(z) * before.in_order(before.products).double()]
    if sample > 0:
        terms.append(torch.cat(before.parts(before.estimate)).double())
    exact, largest = torch.stack(terms).sum(0), torch.stack(terms).abs().amax(0)
    if sample == samples - 1:
        exact, largest = exact / samples, largest / samples
    assert_rounded(after.parts(after.estimate), exact, largest, 2)
    assert_untouched(after, before, but=("estimate",))


# ---------------------------------------------------------------------------------------------------------------------
# The formulas, element by element


@each_backend
@each_dtype
@each_list
def test_perturb_moves_every_element_by_the_formula_and_nothing_else(
    backend: str, dtype: torch.dtype, specs: str
) -> None:
    check_perturb(backend, listed_case(backend, dtype, specs), 7.3)


@each_backend
@each_dtype
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_perturb_is_the_formula_in_every_mode(backend: str, dtype: torch.dtype, adaptive: bool, maximize: bool) -> None:
    check_perturb(backend, listed_case(backend, dtype, "every size"), 0.37, 0.05, adaptive, maximize)
    check_perturb(backend, listed_case(backend, dtype, "every layout"), 1e3, 3.0, adaptive, maximize)


@each_backend
@each_dtype
@pytest.mark.parametrize("adaptive", [False, True])
def test_perturb_measures_the_norm_that_grad_norm_does(backend: str, dtype: torch.dtype, adaptive: bool) -> None:
    operators = operators_of(backend)
    for specs in ("every size", "every layout"):
        given, measured = (listed_case(backend, dtype, specs).to(BACKENDS[backend]) for _ in range(2))
        norm = operators.grad_norm(given.grads, given.params if adaptive else [], adaptive)
        own = torch.full_like(norm, math.nan)
        for case, scalar, measure in ((given, norm, False), (measured, own, True)):
            operators.perturb_(
                case.params, case.grads, case.backup, case.offsets, scalar, measure, 0.2, adaptive, False
            )
        assert_same_bits(own, norm, "norm")
        assert_same_case(measured, given)


@each_backend
@pytest.mark.parametrize("norm", [0.0, 1e-13])
def test_the_perturbation_of_a_vanishing_gradient_is_that_of_the_formula(backend: str, norm: float) -> None:
    case = make_case(torch.float64, [Spec((5,))])
    for g in case.grads:
        g.mul_(norm)
    check_perturb(backend, case, norm)


@each_backend
@each_dtype
@each_list
@pytest.mark.parametrize("hessian", [False, True], ids=["lazy", "hessian"])
def test_update_changes_every_element_by_the_formula_and_nothing_else(
    backend: str, dtype: torch.dtype, specs: str, hessian: bool
) -> None:
    check_update(backend, listed_case(backend, dtype, specs), hessian)


@each_backend
@each_dtype
@pytest.mark.parametrize("hessian", [False, True], ids=["lazy", "hessian"])
@pytest.mark.parametrize("hessian_power", [0.5, 1.0, 0.7])
@pytest.mark.parametrize("bias_correction", ["step", "update"])
@pytest.mark.parametrize("maximize", [False, True])
def test_update_is_the_formula_in_every_mode(
    backend: str, dtype: torch.dtype, hessian: bool, hessian_power: float, bias_correction: str, maximize: bool
) -> None:
    check_update(
        backend,
        listed_case(backend, dtype, "every size"),
        hessian,
        hessian_power=hessian_power,
        bias_correction=bias_correction,
        maximize=maximize,
    )


@each_backend
@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("others", LAYOUTS)
def test_gradients_and_products_may_have_other_strides_than_their_parameter(
    backend: str, dtype: torch.dtype, layout: str, others: str
) -> None:
    specs = [Spec(shape, layout, 1) for shape in [(), (3, 1, 4), (6, 11), (4, 3, 5, 5), (33, 40)]]
    case = make_case(dtype, specs, others=others)
    check_perturb(backend, case, 2.0)
    check_update(backend, case, hessian=True)


@each_quick_backend
@each_dtype
def test_writes_too_large_for_the_caches_are_the_same_writes(backend: str, dtype: torch.dtype) -> None:
    # One call writes more than 8 MiB to each array, and must equal one call per tensor, each of which writes less.
    count = (8 << 20) // dtype.itemsize // 10
    case = make_case(dtype, [Spec((count + 77 * i,), shift=i) for i in range(9)] + [Spec((500, 601), "transposed", 3)])
    together, one_by_one = case.to(BACKENDS[backend]), case.to(BACKENDS[backend])
    singles = [one_by_one.only(i) for i in range(len(case.params))]

    def run(operator: Callable[..., None], *arguments: Any) -> None:
        operator(backend, together, *arguments)
        for single in singles:
            operator(backend, single, *arguments)
        assert_same_case(together, one_by_one)

    run(run_perturb, 3.0, 0.2, False, False)
    run(run_update, HYPER, True)
    run(run_rademacher, 1, 2, 3)
    run(run_update, HYPER, True, [torch.tensor(math.nan)])


@each_backend
@each_dtype
@pytest.mark.parametrize(
    "hyper",
    [
        {"betas": (0.0, 0.0)},
        {"betas": (0.999, 0.9)},
        {"eps": 1.0, "hessian_power": 1.0},
        {"weight_decay": 0.5, "lr": 1.0},
        {"lr": 0.0},
        {"weight_decay": 0.0, "hessian_power": 0.25},
    ],
    ids=str,
)
@pytest.mark.parametrize("hessian", [False, True], ids=["lazy", "hessian"])
def test_update_is_the_formula_at_unusual_hyperparameters(
    backend: str, dtype: torch.dtype, hyper: dict[str, Any], hessian: bool
) -> None:
    check_update(backend, make_case(dtype, many(20)), hessian, **hyper)


@each_backend
@pytest.mark.parametrize("steps", [(0, 0), (1, 1), (9, 1), (9, 9), (100_000, 3), (3_000_000_000, 3_000_000_000)])
def test_counts_of_any_length_correct_the_bias(backend: str, steps: tuple[int, int]) -> None:
    case = make_case(torch.float64, [Spec((5,))])
    case.steps[case.rows[0]] = torch.tensor(steps)
    for correction in ("step", "update"):
        check_update(backend, case, hessian=True, bias_correction=correction)
        if steps[1]:
            check_update(backend, case, hessian=False, bias_correction=correction)


@each_backend
@each_dtype
@pytest.mark.parametrize("lr_dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_tensor_takes_the_place_of_the_learning_rate(backend: str, dtype: torch.dtype, lr_dtype: torch.dtype) -> None:
    case = make_case(dtype, [*many(9), Spec(())])
    check_update(backend, case, True, lr_tensor=torch.tensor(0.033, dtype=lr_dtype), lr=1e6)


@each_backend
def test_a_learning_rate_of_shape_one_updates_scalars_too(backend: str) -> None:
    check_update(backend, make_case(torch.float32, [Spec(()), Spec((3,))]), True, lr_tensor=torch.tensor([0.033]))


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_update_takes_products_in_the_dtype_of_the_state(backend: str, dtype: torch.dtype) -> None:
    case = make_case(dtype, [*many(20), *every_layout()])
    wide = make_case(torch.float32, [*many(20), *every_layout()], seed=1)
    case.products = wide.products
    check_update(backend, case, hessian=True)


@each_backend
@each_dtype
@each_list
def test_one_sample_of_the_estimate_is_the_product_with_its_signs(backend: str, dtype: torch.dtype, specs: str) -> None:
    check_hutchinson(backend, listed_case(backend, dtype, specs), 0, 1)


@each_backend
@each_dtype
@pytest.mark.parametrize("sample", [0, 1, 2])
def test_the_estimate_starts_at_zero_and_ends_as_the_mean(backend: str, dtype: torch.dtype, sample: int) -> None:
    check_hutchinson(backend, listed_case(backend, dtype, "every size"), sample, 3)
    check_hutchinson(backend, listed_case(backend, dtype, "every layout"), sample, 3)


# ---------------------------------------------------------------------------------------------------------------------
# Bad steps


def check_skip(backend: str, before: Case, *guards: Tensor, hessian: bool = True, guard_grads: bool = False) -> None:
    after = update(backend, before, HYPER, hessian, [torch.tensor(1.0), *guards], guard_grads)
    restored = torch.cat([memory_order(w) for w in after.params])
    assert_same_bits(restored, torch.cat(before.parts(before.backup)), "w after a skipped step")
    assert after.skipped.tolist() == [1]
    assert_untouched(after, before, but=("params", "skipped"))


@each_backend
@each_dtype
@pytest.mark.parametrize("guard_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("hessian", [False, True], ids=["lazy", "hessian"])
def test_a_guard_that_is_not_finite_restores_the_weights_and_writes_nothing_else(
    backend: str, dtype: torch.dtype, guard_dtype: torch.dtype, bad: float, hessian: bool
) -> None:
    case = make_case(dtype, [*many(12), Spec((3, 4, 5, 5), "channels_last"), Spec((5, 6), "sliced"), Spec(())])
    check_skip(backend, case, torch.tensor(bad, dtype=guard_dtype), hessian=hessian)


@each_backend
def test_any_one_of_several_guards_skips_the_step(backend: str) -> None:
    case = make_case(torch.float32, many(5))
    good = [torch.tensor(3.4e38), torch.tensor(-1e308, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float16)]
    good *= 2  # more than a CUDA launch takes
    for i in range(len(good) + 1):
        guards = [*good[:i], torch.tensor(math.nan), *good[i:]]
        check_skip(backend, case, *guards)
    assert update(backend, case, HYPER, True, good).skipped.tolist() == [0]


@each_backend
@each_dtype
@pytest.mark.parametrize("name", ["grads", "products"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_element_that_is_not_finite_skips_the_step_where_gradients_are_guards(
    backend: str, dtype: torch.dtype, name: str, bad: float
) -> None:
    case = make_case(dtype, [Spec((40_000,), shift=1), *many(5), Spec((3, 4, 5, 5), "channels_last"), Spec(())])
    assert update(backend, case, HYPER, True, guard_grads=True).skipped.tolist() == [0]
    tensors = getattr(case, name)
    for i in (0, 1, len(tensors) - 1):
        for element in {0, tensors[i].numel() // 2, tensors[i].numel() - 1}:
            kept = tensors[i]
            tensors[i] = kept.clone(memory_format=torch.preserve_format)
            tensors[i].view(-1)[element] = bad
            check_skip(backend, case, guard_grads=True)
            tensors[i] = kept


@each_backend
@each_dtype
def test_the_largest_finite_gradients_and_products_skip_no_step(backend: str, dtype: torch.dtype) -> None:
    case = make_case(dtype, [Spec((40_000,), shift=1), *many(5)])
    # Of float64 half the exponent: the check sums squares.
    largest = 1e150 if dtype == torch.float64 else torch.finfo(dtype).max
    for gradient, product in zip(case.grads, case.products, strict=True):
        gradient.fill_(largest)
        product.fill_(-largest)
    assert update(backend, case, HYPER, True, guard_grads=True).skipped.tolist() == [0]


@each_backend
@each_dtype
def test_a_skipped_step_brings_back_every_size_and_layout(backend: str, dtype: torch.dtype) -> None:
    check_skip(backend, make_case(dtype, [*every_size(dtype), *every_layout()]), torch.tensor(math.inf))


# ---------------------------------------------------------------------------------------------------------------------
# Backends among each other


SAME_BITS_LISTS = ("every size at every alignment", "every layout", "57 tensors")


@each_other_backend
@each_narrow_dtype
@pytest.mark.parametrize("adaptive", [False, True])
def test_backends_perturb_to_the_same_bits(backend: str, dtype: torch.dtype, adaptive: bool) -> None:
    for specs in SAME_BITS_LISTS:
        case = listed_case(backend, dtype, specs)
        assert_same_case(*(perturb(name, case, 7.3, 0.2, adaptive, False) for name in (backend, BASELINE)))


@each_other_backend
@each_narrow_dtype
@pytest.mark.parametrize("hessian_power", [0.5, 1.0])
@pytest.mark.parametrize("hessian", [False, True], ids=["lazy", "hessian"])
def test_backends_update_to_the_same_bits(
    backend: str, dtype: torch.dtype, hessian_power: float, hessian: bool
) -> None:
    for specs in SAME_BITS_LISTS:
        case = listed_case(backend, dtype, specs)
        hyper = {**HYPER, "hessian_power": hessian_power}
        assert_same_case(*(update(name, case, hyper, hessian) for name in (backend, BASELINE)))


@each_other_backend
@pytest.mark.parametrize("hessian_power", [0.5, 1.0])
def test_compiled_backends_update_float64_to_the_same_bits(backend: str, hessian_power: float) -> None:
    # Bias corrections enter here without being rounded to float32: they too must be the same on every platform.
    case = listed_case(backend, torch.float64, "57 tensors").to("cpu")
    case.steps[:] = 10 ** (torch.rand(case.steps.shape, generator=torch.Generator().manual_seed(0)) * 9)
    hyper = {**HYPER, "hessian_power": hessian_power, "betas": (0.9, 0.99999)}
    assert_same_case(*(update(name, case, hyper, True) for name in (backend, "cpu")))


@each_other_backend
@each_dtype
@pytest.mark.parametrize("sample", [0, 1, 2])
def test_backends_estimate_to_the_same_bits(backend: str, dtype: torch.dtype, sample: int) -> None:
    for specs in SAME_BITS_LISTS:
        case = listed_case(backend, dtype, specs)
        assert_same_case(*(hutchinson(name, case, 1, 2, sample, 3) for name in (backend, BASELINE)))


# ---------------------------------------------------------------------------------------------------------------------
# Any shapes and hyperparameters

unit = st.floats(0, 0.9999)
shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)
any_specs = st.lists(st.builds(Spec, shapes, st.sampled_from(LAYOUTS), st.integers(0, 31)), min_size=1, max_size=6)


@each_backend
@given(
    specs=any_specs,
    others=st.sampled_from(["same", *LAYOUTS]),
    dtype=st.sampled_from(DTYPES),
    norm=st.floats(1e-3, 1e3),
    rho=st.floats(0, 10),
    adaptive=st.booleans(),
    maximize=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_perturb_is_the_formula_for_any_shapes_and_scalars(
    backend: str, specs: list[Spec], others: str, dtype: torch.dtype, seed: int, **scalars: Any
) -> None:
    check_perturb(backend, make_case(dtype, specs, others=others, seed=seed), **scalars)


@each_backend
@given(
    specs=any_specs,
    others=st.sampled_from(["same", *LAYOUTS]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
    hessian=st.booleans(),
    lr=st.floats(0, 10),
    betas=st.tuples(unit, unit),
    eps=st.floats(1e-8, 1),
    weight_decay=st.floats(0, 1),
    hessian_power=st.sampled_from([0.5, 1.0]) | st.floats(0.01, 1),
    bias_correction=st.sampled_from(["step", "update"]),
    maximize=st.booleans(),
)
def test_update_is_the_formula_for_any_shapes_and_hyperparameters(
    backend: str, specs: list[Spec], others: str, dtype: torch.dtype, seed: int, hessian: bool, **hyper: Any
) -> None:
    check_update(backend, make_case(dtype, specs, others=others, seed=seed), hessian, **hyper)


# ---------------------------------------------------------------------------------------------------------------------
# The norm


def norm_of(backend: str, grads: Sequence[Tensor], params: Sequence[Tensor] = (), adaptive: bool = False) -> float:
    device = BACKENDS[backend]
    norm = operators_of(backend).grad_norm([g.to(device) for g in grads], [w.to(device) for w in params], adaptive)
    assert norm.shape == () and norm.dtype == torch.float64 and norm.device.type == torch.device(device).type
    return float(norm)


def exact_norm(grads: Sequence[Tensor], params: Sequence[Tensor] | None = None) -> float:
    """The norm, with the squares summed without any rounding."""
    terms = [g.double() if params is None else g.double() * w.double() for g, w in zip(grads, params or grads)]
    return math.sqrt(math.fsum(torch.cat([memory_order(term) for term in terms]).square().tolist()))


@each_backend
@each_dtype
@each_list
@pytest.mark.parametrize("adaptive", [False, True])
def test_norm_is_exact_to_a_few_ulp_of_float64(backend: str, dtype: torch.dtype, specs: str, adaptive: bool) -> None:
    case = listed_case(backend, dtype, specs)
    expected = exact_norm(case.grads, case.params if adaptive else None)
    assert norm_of(backend, case.grads, case.params, adaptive) == pytest.approx(expected, rel=8 * 2**-53, abs=0)


@each_backend
@pytest.mark.parametrize("values", [(3.0, 4.0), (5.0,), (0.0, 0.0), ()], ids=str)
@pytest.mark.parametrize("scale", [1.0, 2.0**125, 2.0**-149], ids=["1", "2^125", "2^-149"])
def test_norm_neither_overflows_nor_underflows_in_float32(
    backend: str, values: tuple[float, ...], scale: float
) -> None:
    # The squares of these lie beyond the range of float32, the smallest are its subnormal numbers.
    grads = [torch.tensor(values, dtype=torch.float64).mul(scale).float(), torch.zeros(3)]
    assert norm_of(backend, grads) == (scale * 5.0 if sum(values) else 0.0)


@each_backend
@each_dtype
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("size", [1, 15, 16, 17, 63, 64, 65, 129, 1025])
def test_one_element_that_is_not_finite_shows_in_the_norm(
    backend: str, dtype: torch.dtype, bad: float, size: int
) -> None:
    for at in {0, size // 3, size // 2, size - 1}:
        grads = [torch.ones(3, dtype=dtype), torch.ones(size, dtype=dtype), torch.ones((), dtype=dtype)]
        grads[1][at] = bad
        for adaptive in (False, True):
            assert not math.isfinite(norm_of(backend, grads, [torch.zeros_like(g) for g in grads], adaptive))


@each_backend
@each_dtype
def test_norm_without_parameters_is_the_norm(backend: str, dtype: torch.dtype) -> None:
    grads = listed_case(backend, dtype, "57 tensors").grads
    assert norm_of(backend, grads) == norm_of(backend, grads, listed_case(backend, dtype, "57 tensors").params)


@each_backend
@each_dtype
@pytest.mark.parametrize("others", LAYOUTS)
def test_adaptive_norm_pairs_elements_of_different_strides(backend: str, dtype: torch.dtype, others: str) -> None:
    specs = [Spec(shape, layout, 1) for shape in [(6, 11), (4, 3, 5, 5)] for layout in LAYOUTS]
    case = make_case(dtype, specs, others=others)
    expected = math.sqrt(sum(exact_norm([g], [w]) ** 2 for g, w in zip(case.grads, case.params, strict=True)))
    assert norm_of(backend, case.grads, case.params, True) == pytest.approx(expected, rel=8 * 2**-53, abs=0)


THREADS = (1, 2, 5)


# The sums of torch, which eager uses, follow the number of threads in their last bits.
@each_other_backend
@each_dtype
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_number_of_threads_changes_no_bit_of_the_norm(backend: str, dtype: torch.dtype, adaptive: bool) -> None:
    case = make_case(dtype, [Spec((100_003,)), *many(57), Spec((70_001,), shift=1)])
    norms = set()
    for count in THREADS:
        with threads(count):
            norms.add(norm_of(backend, case.grads, case.params, adaptive))
    assert len(norms) == 1


# The baseline leaves the threads to torch, whatever the list; the interpreter has one.
@pytest.mark.parametrize(
    "backend, specs",
    [pytest.param(name, "a long one", marks=marks_of(name)) for name in BACKENDS if name not in INTERPRETED]
    + [
        pytest.param(name, specs, marks=marks_of(name))
        for name in BACKENDS
        if name not in {BASELINE, *INTERPRETED}
        for specs in ("every size at every alignment", "every layout", "1000 tensors")
    ],
)
@each_dtype
def test_the_number_of_threads_changes_no_bit_of_what_is_written(backend: str, dtype: torch.dtype, specs: str) -> None:
    results: list[Case] = []
    for count in THREADS:
        on = listed_case(backend, dtype, specs).to(BACKENDS[backend])
        with threads(count):
            run_perturb(backend, on, 3.0, 0.2, True, False)
            run_hutchinson(backend, on, 1, 2, 0, 3)
            run_update(backend, on, HYPER, True)
            run_rademacher(backend, replace(on, params=on.grads), 1, 2, 3)
        results.append(on.to("cpu"))
        assert_same_case(results[-1], results[0])

"""Operators as torch sees them: schemas, fake kernels, compilation; and arguments that they refuse."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sassha_fused import eager
from sassha_fused.checks import BIAS_CORRECTIONS
from sassha_fused.layout import layouts_of
from sassha_fused.ops import NAMES
from sassha_fused.settings import DIRECTIONS, Settings
from tests.support.backends import BACKENDS, marks_of, operators_of
from tests.support.calls import arguments_of
from tests.support.cases import (
    PART_ALIGNMENT,
    Case,
    Spec,
    assert_same_bits,
    assert_same_case,
    assert_untouched,
    make_case,
)

NAMESPACE = torch.ops.sassha_fused


def small_case(dtype: torch.dtype = torch.float32) -> Case:
    return make_case(
        dtype, [Spec((5,), shift=1), Spec((3, 4), "transposed"), Spec((2, 3, 4, 4), "channels_last"), Spec(())]
    )


each_operator = pytest.mark.parametrize("name", NAMES)


def variants(name: str, case: Case) -> list[dict[str, Any]]:
    """An operator's arguments, and those of its other paths."""
    arguments = arguments_of(name, case)
    others: dict[str, list[dict[str, Any]]] = {
        "grad_norm": [{"params": [], "adaptive": False}],
        "perturb_": [{"measure": True}],
        "update_": [
            {"products": []},
            {"products": [], "exp_avg_norm": torch.tensor(0.0, dtype=torch.float64)},
            {"backup": None, "guard_grads": True},
            {"guards": [torch.tensor(math.nan), torch.tensor(1.0, dtype=torch.float64)]},
        ],
    }
    return [arguments, *({**arguments, **changes} for changes in others.get(name, []))]


@pytest.mark.slow
@each_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_accepts_the_operator(name: str, dtype: torch.dtype) -> None:
    # Schema and what is really written, registration for autograd, fake kernels, and compilation with dynamic shapes.
    for arguments in variants(name, small_case(dtype)):
        results = torch.library.opcheck(getattr(NAMESPACE, name).default, (), arguments)
        assert set(results.values()) == {"SUCCESS"} and len(results) == 4


@each_operator
def test_arguments_in_plain_torch_are_those_of_the_schema(name: str) -> None:
    schema = getattr(NAMESPACE, name).default._schema
    written = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    expected = {
        "grad_norm": set(),
        "perturb_": {"params", "backup", "norm"},
        "rademacher_": {"signs"},
        "hutchinson_": {"estimate"},
        "block_average_": {"averaged"},
        "update_": {"params", "exp_avg", "exp_hessian", "exp_avg_norm", "steps", "skipped"},
    }
    assert list(inspect.signature(getattr(eager, name)).parameters) == [a.name for a in schema.arguments]
    assert list(arguments_of(name, small_case())) == [a.name for a in schema.arguments]
    assert written == expected[name]
    assert not any(a.has_default_value() for a in schema.arguments)


@each_operator
def test_shapes_and_dtypes_are_known_without_values(name: str) -> None:
    case = small_case()
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = {
            key: pytree.tree_map_only(Tensor, mode.from_tensor, value)
            for key, value in arguments_of(name, case).items()
        }
        result = getattr(NAMESPACE, name)(**fake)
    if name == "grad_norm":
        assert result.shape == () and result.dtype == torch.float64
    else:
        assert result is None


@pytest.mark.slow
@each_operator
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_compiled_function_writes_the_same_bits(name: str, compiler: str) -> None:
    for i in range(len(variants(name, small_case()))):
        ran, compiled = small_case(), small_case()
        torch._dynamo.reset()
        function = torch.compile(getattr(NAMESPACE, name), fullgraph=True, backend=compiler)
        expected = getattr(NAMESPACE, name)(**variants(name, ran)[i])
        found = function(**variants(name, compiled)[i])
        assert_same_case(compiled, ran)
        if name == "grad_norm":
            assert_same_bits(found, expected, "norm")


@pytest.mark.parametrize("default", ["meta", "cpu"])
def test_layouts_lie_on_the_cpu_whatever_the_default_device(default: str) -> None:
    params = small_case().params
    with torch.device(default):
        layouts = layouts_of(params)
    assert layouts.device.type == "cpu"
    assert torch.equal(layouts, layouts_of(params))


# ---------------------------------------------------------------------------------------------------------------------
# Bad arguments


def shorter(values: Any) -> Any:
    return values[:-1]


def longer(values: Any) -> Any:
    return torch.cat([values, values[-1:]]) if isinstance(values, Tensor) else [*values, values[-1]]


def misshapen(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return [*tensors[:-2], tensors[-2].flatten(), tensors[-1]]


def transposed(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return [tensors[0], tensors[1].t(), *tensors[2:]]


def mixed(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return [*tensors[:-1], tensors[-1].half()]


def reinterpreted(value: Any) -> Any:
    """The same memory under another dtype."""
    if isinstance(value, list):
        return [reinterpreted(t) for t in value]
    return value.view(
        torch.int32 if value.dtype == torch.float32 else torch.float64 if value.dtype == torch.int64 else torch.int64
    )


def doubled(value: Any) -> Any:
    return [t.double() for t in value] if isinstance(value, list) else value.double()


def truncated(flat: Tensor) -> Tensor:
    """Without the part of the last parameter."""
    return flat[: -3 * PART_ALIGNMENT]


def truncated_rows(per_row: Tensor) -> Tensor:
    return per_row[:-1]


def beyond(rows: Sequence[int]) -> Sequence[int]:
    return [*rows[:-1], len(rows) + 3]


def emptied(value: Any) -> Any:
    return [t.flatten()[:0] for t in value] if isinstance(value, list) else value.flatten()[:0]


def in_one_row(steps: Tensor) -> Tensor:
    return steps.flatten()


def with_gaps(flat: Tensor) -> Tensor:
    return torch.stack((flat, flat), dim=-1)[..., 0]


def negative(indices: Sequence[int]) -> Sequence[int]:
    return [*indices[:-1], -1]


def with_unknown_correction(settings: Sequence[float]) -> Sequence[float]:
    return list(Settings(*settings)._replace(bias_correction=len(BIAS_CORRECTIONS)))


def with_negative_correction(settings: Sequence[float]) -> Sequence[float]:
    return list(Settings(*settings)._replace(bias_correction=-1))


def narrower(table: Tensor) -> Tensor:
    return table[:, :-1].contiguous()


def of_other_strides(layouts: Tensor) -> Tensor:
    return layouts.index_put((torch.tensor(1), torch.tensor(3)), torch.tensor(7))


def of_another_shape(layouts: Tensor) -> Tensor:
    return layouts.index_put((torch.tensor(0), torch.tensor(1)), torch.tensor(7))


def in_another_order(layouts: Tensor) -> Tensor:
    return layouts.flip(0)


def off_the_grid(blocked: int) -> int:
    return blocked + PART_ALIGNMENT // 2


def below_zero(blocked: int) -> int:
    return blocked - PART_ALIGNMENT


def beyond_the_state(blocked: int) -> int:
    return blocked + PART_ALIGNMENT << 20


def given(nothing: None) -> Tensor:
    return torch.zeros((), dtype=torch.float64)


def given_in_full(nothing: None) -> Tensor:
    return torch.zeros(16 * PART_ALIGNMENT)


def left_out(flat: Tensor) -> None:
    return None


def by_blocks(settings: Sequence[float]) -> Sequence[float]:
    return list(Settings(*settings)._replace(hessian_block=8))


def by_threes(settings: Sequence[float]) -> Sequence[float]:
    return list(Settings(*settings)._replace(hessian_block=3))


def in_a_plain_direction(settings: Sequence[float]) -> Sequence[float]:
    return list(Settings(*settings)._replace(direction=DIRECTIONS.index("plain")))


LENGTHS = (shorter, longer)
TENSORS = (*LENGTHS, misshapen, transposed, mixed, reinterpreted, doubled)
FLATS = (truncated, reinterpreted, doubled, with_gaps)
ROWS = (*LENGTHS, beyond, negative)
LAYOUTS = (*LENGTHS, reinterpreted, with_gaps, in_one_row, in_another_order, of_other_strides, of_another_shape)
PER_ROW = (reinterpreted, with_gaps, in_one_row, narrower)
SETTINGS = (*LENGTHS, with_unknown_correction, with_negative_correction, by_threes)
BAD_ARGUMENTS = [
    (name, argument, change)
    for name, argument, changes in [
        ("grad_norm", "grads", TENSORS),
        ("perturb_", "grads", TENSORS),
        ("perturb_", "backup", FLATS),
        ("perturb_", "offsets", LENGTHS),
        ("perturb_", "rows", ROWS),
        ("perturb_", "layouts", LAYOUTS),
        ("perturb_", "norm", (reinterpreted, emptied)),
        ("perturb_", "per_row", PER_ROW),
        ("perturb_", "settings", SETTINGS),
        ("rademacher_", "indices", (*LENGTHS, negative)),
        ("rademacher_", "evaluation", (reinterpreted, emptied)),
        ("hutchinson_", "estimate", FLATS),
        ("hutchinson_", "offsets", LENGTHS),
        ("hutchinson_", "indices", (*LENGTHS, negative)),
        ("hutchinson_", "evaluation", (reinterpreted, emptied)),
        ("block_average_", "products", (mixed, doubled)),
        ("block_average_", "exp_hessian", FLATS),
        ("block_average_", "averaged", FLATS),
        ("block_average_", "offsets", LENGTHS),
        ("block_average_", "blocked", (off_the_grid, below_zero)),
        ("block_average_", "settings", SETTINGS),
        ("update_", "grads", TENSORS),
        # Products come with a backup: neither averaged nor norm goes with them.
        ("update_", "averaged", (given_in_full,)),
        ("update_", "norm", (given,)),
        ("update_", "blocked", (off_the_grid, below_zero, beyond_the_state)),
        ("update_", "products", TENSORS),
        ("update_", "backup", FLATS),
        ("update_", "exp_avg", FLATS),
        ("update_", "exp_hessian", (*FLATS, left_out)),
        ("update_", "steps", (reinterpreted, in_one_row, with_gaps)),
        ("update_", "skipped", (reinterpreted, emptied)),
        ("update_", "guards", (reinterpreted, emptied)),
        ("update_", "offsets", LENGTHS),
        ("update_", "rows", ROWS),
        ("update_", "layouts", LAYOUTS),
        ("update_", "per_row", (truncated_rows, *PER_ROW)),
        ("update_", "settings", (*SETTINGS, by_blocks, in_a_plain_direction)),
    ]
    for change in changes
]


# Compiled kernels write through pointers and check every argument; eager leaves all but the gradients to torch.
REFUSED = [
    pytest.param(backend, *bad, id="-".join((bad[0], bad[1], bad[2].__name__, backend)), marks=marks_of(backend))
    for backend in BACKENDS
    for bad in BAD_ARGUMENTS
    if backend != "eager" or bad[1] == "grads"
]


@pytest.mark.parametrize("backend, name, argument, change", REFUSED)
def test_arguments_that_do_not_fit_are_refused_and_nothing_is_written(
    backend: str, name: str, argument: str, change: Callable[[Any], Any]
) -> None:
    before = small_case()
    case = before.to(BACKENDS[backend])
    arguments = arguments_of(name, case)
    arguments[argument] = change(arguments[argument])
    with pytest.raises((ValueError, RuntimeError, TypeError)):
        getattr(operators_of(backend), name)(**arguments)
    assert_untouched(case.to("cpu"), before)

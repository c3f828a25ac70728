"""Fused is the per-tensor loop: every member over seven steps, weights and states, on each backend, in each dtype."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor, nn

from tests.optimizer.test_memory import SLACK, allocated
from tests.support.backends import QUICK, device_of, each_backend_and, each_of, each_quick_backend
from tests.support.generic import Several, each_input, inputs_of, make, seven_steps, states_of
from tests.support.members import ALONG_MOMENTUM, MEMBERS, STYLES, OfMember, each_member
from tests.support.problems import BACKENDS, assert_differ, assert_same, single_threaded, weights
from tests.support.reference_family import ReferenceMember

one_thread = pytest.fixture(autouse=True)(single_threaded)
DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "float64": (torch.float64,),
    "float32": (torch.float32,),
    "bfloat16": (torch.bfloat16,),
    "float16": (torch.float16,),
    "mixed": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
}
# Along the momentum and without a copy of w, what is narrow is refused.
KINDS = [
    (member, dtype)
    for member, (_, options) in MEMBERS.items()
    for dtype in DTYPES
    if options.get("exact_restore", True) or dtype in ("float64", "float32")
]


@functools.cache
def by_reference(member: str, option: str) -> tuple[list[list[Tensor]], list[dict[str, Tensor]]]:
    """Weights after each step and states after the last, of the loop over the parameters."""
    model = Several(torch.float64)
    arguments = {name: value for name, value in inputs_of(member)[option].items() if name != "exact_restore"}
    reference = ReferenceMember(model.parameters(), MEMBERS[member][0].__name__, **arguments)
    history = seven_steps(model, reference)
    states = [reference.state.get(param, {}) for param in model.parameters()]
    return history, [{name: torch.as_tensor(value) for name, value in state.items()} for state in states]


@each_quick_backend
@each_input
def test_seven_steps_are_those_of_the_per_tensor_loop(backend: str, member: str, option: str) -> None:
    model = Several(torch.float64, device=device_of(backend))
    opt = make(member, model.parameters(), option, backend=backend)
    history = seven_steps(model, opt)
    assert_differ(history[6][:-1], history[5][:-1])
    assert_same(history[4], history[3])  # the step without gradients
    assert_same(history[3][2], history[1][2])  # the frozen parameter
    expected, expected_states = by_reference(member, option)
    for mine, theirs in zip(history, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12, check_device=False)
    *states, of_idle = states_of(opt, history[6])
    for state, theirs in zip(states, expected_states):
        assert state.keys() == theirs.keys()
        for name, value in state.items():
            torch.testing.assert_close(value, theirs[name].to(value), rtol=1e-10, atol=1e-12)
    # Along the momentum all that is trained has a state from the start.
    assert not any(value.any() for value in of_idle.values())


@each_backend_and("kind", KINDS, [kind for kind in KINDS if kind[1] == "float32"], without="eager", id_of="-".join)
def test_the_backends_agree_bit_for_bit_in_every_dtype(backend: str, kind: tuple[str, str]) -> None:
    (member, dtype), found = kind, []
    for name in ("eager", backend):
        model = Several(*DTYPES[dtype], device=device_of(backend))
        opt = make(member, model.parameters(), backend=name)
        found.append([*seven_steps(model, opt), states_of(opt, [*model.parameters()])])
    assert_differ(found[0][0][:-1], found[0][6][:-1])
    if dtype in ("float64", "mixed"):  # where the norm, also summed in float64, is not rounded once more
        torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-13)
    else:
        assert_same(found[0], found[1])


@each_of(BACKENDS)
@each_member
@pytest.mark.parametrize("default", [torch.float64, torch.float16], ids=str)
def test_the_default_dtype_has_no_influence(backend: str, member: str, default: torch.dtype) -> None:
    found = []
    for dtype in (torch.float32, default):
        torch.set_default_dtype(dtype)
        try:
            model = Several(torch.float32)
            opt = make(member, model.parameters(), backend=backend)
            found.append([seven_steps(model, opt), states_of(opt, [*model.parameters()])])
        finally:
            torch.set_default_dtype(torch.float32)
    assert_same(*found)


@each_of(name for name in QUICK if name != "eager")
@pytest.mark.parametrize(
    "member, shape",
    [
        *[("Sassha", shape) for shape in ((300_001,), (70, 40, 50), (2, 100_000), (3, 64, 30, 30))],
        *[(member, (300_001,)) for member in MEMBERS if member != "Sassha"],
    ],
    ids=str,
)
def test_the_backends_agree_bit_for_bit_on_a_large_tensor(backend: str, member: str, shape: tuple[int, ...]) -> None:
    found = []
    for name in ("eager", backend):
        values = torch.linspace(-2, 2, math.prod(shape), device=device_of(backend)).reshape(shape)
        w = nn.Parameter(values.clone(memory_format=torch.channels_last if len(shape) == 4 else torch.preserve_format))
        opt = make(member, [w], lr=0.01, backend=name)
        for _ in range(3):
            opt.step(lambda: w.pow(4).mean() * 1000)
        found.append([w.detach().clone(), states_of(opt, [w])])
    assert_same(*found)
    assert not torch.equal(found[0][0], values)


# Meta tensors go through Python: half a second for each member.
@pytest.mark.parametrize(
    "member, style",
    [
        *[("Sassha", style) for style in STYLES],
        *[pytest.param(member, "closure", marks=pytest.mark.slow) for member in MEMBERS if member != "Sassha"],
    ],
)
def test_meta_parameters_go_through_every_step_without_numbers(member: str, style: str) -> None:
    problem = OfMember(member)
    with torch.device("meta"):
        model, inputs = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.empty(5, 3)
    problem.opt = make(member, model.parameters())
    for _ in range(2):  # a Hessian step and a lazy one
        problem.opt.zero_grad()
        assert STYLES[style](problem, lambda: model(inputs).square().mean()).is_meta
    assert len(problem.opt.state) == 4
    assert all(value.is_meta for state in problem.opt.state.values() for value in state.values())
    assert problem.opt.skipped_steps == 0


@each_member
def test_a_lazy_step_of_the_fused_kernels_takes_no_memory(member: str) -> None:
    params = [nn.Parameter(torch.ones(size)) for size in (50_000, 10_007, 3)]
    gradients = [torch.full_like(param, 0.5) for param in params]
    opt = make(member, params, backend="cpu")
    opt.step(lambda: torch.stack([param.square().sum() for param in params]).sum())

    def step() -> None:
        for phase in (opt.perturb, opt.step) if "rho" in opt.defaults else (opt.step,):
            for param, gradient in zip(params, gradients):
                param.grad = None if member in ALONG_MOMENTUM and phase == opt.perturb else gradient
            phase()

    before = weights(params)
    left, peak = allocated(step)
    assert left <= SLACK and peak <= SLACK
    assert_differ(weights(params), before)

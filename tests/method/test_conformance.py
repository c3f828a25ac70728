"""The optimizer against the method written a second time: every parameter and every state after every step."""

import functools
import itertools
import math
import warnings
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sassha_fused import Sassha
from tests.support.backends import BACKENDS, BASELINE, INTERPRETED, each_backend, each_backend_and, each_quick_backend
from tests.support.cases import (
    GENERAL_POWER_ULPS,
    ULPS,
    Recorder,
    assert_rounded,
    assert_same_bits,
    each_dtype,
    each_narrow_dtype,
    flat_of,
    place,
    threads,
    whole,
)
from tests.support.problems import single_threaded
from tests.support.reference import (
    ReferenceSassha,
    formula_norm,
    formula_perturb,
    formula_update,
    from_memory_order,
    memory_order,
    signs,
)

STEPS = 12


def steps_of(backend: str) -> int:
    """How many steps a backend takes: interpreted ones not as far into the schedule."""
    return STEPS // 2 if backend in INTERPRETED else STEPS


# What more threads do is a test of its own.
one_thread = pytest.fixture(autouse=True, scope="module")(single_threaded)


class Network(nn.Module):
    """A small smooth network with a parameter of every kind, each between guard zones; the same at every call."""

    def __init__(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)
        self.dtype, self.device = dtype, device
        self.convolution = self.parameter(3, 2, 3, 3, layout="channels_last")
        self.shift = self.parameter(3)
        self.gain = self.parameter(48)
        self.hidden = self.parameter(5, 48, layout="transposed")
        self.sliced = self.parameter(5, 3, layout="sliced")
        self.unused = self.parameter(7)
        self.scale = self.parameter()
        self.linear = self.parameter(1, 9)
        self.sometimes = self.parameter(5)
        self.empty = self.parameter(0, 3)
        self.inputs = [self.random(4, 2, 6, 6) for _ in range(STEPS + 4)]

    def random(self, *shape: int) -> Tensor:
        # Rounded to the narrowest dtype, so that networks of all dtypes start from the same numbers.
        return torch.randn(shape, generator=self.generator).bfloat16().to(self.device, self.dtype)

    def parameter(self, *shape: int, layout: str = "contiguous") -> nn.Parameter:
        base = place(self.random(*shape).cpu() / 4, self.dtype, layout, shift=1)
        return nn.Parameter(whole(base).to(self.device).as_strided(shape, base.stride(), base.storage_offset()))

    def loss(self, step: int) -> Tensor:
        x = F.gelu(F.conv2d(self.inputs[step], self.convolution, self.shift)).flatten(1)
        x = F.layer_norm(x, (48,), self.gain)
        x = torch.tanh(x @ self.hidden.t())
        if step % 3 == 1:
            x = x + self.sometimes**3
        x = (x @ self.sliced).square() * (1 + self.scale)
        return x.mean() + self.linear.sum() + self.empty.sum()

    def assert_guards_untouched(self) -> None:
        for parameter in self.parameters():
            if parameter.layout == torch.strided and parameter.storage_offset():
                outside = torch.ones_like(whole(parameter), dtype=torch.bool)
                outside.as_strided(parameter.shape, parameter.stride(), parameter.storage_offset()).fill_(False)
                assert whole(parameter)[outside].isnan().all()


Groups = Callable[[Network], Any]


def one_group(network: Network) -> Any:
    return network.parameters()


def many_groups(network: Network) -> Any:
    """Groups that share no hyperparameter that they may have to themselves."""
    return [
        {"params": [network.convolution, network.shift], "rho": 0.1, "weight_decay": 0.1},
        {
            "params": [network.sliced, network.hidden, network.unused],
            "lr": 0.02,
            "betas": (0.5, 0.9),
            "eps": 1e-2,
            "hessian_interval": 1,
            "bias_correction": "update",
            "adaptive": True,
        },
        {"params": [network.scale, network.sometimes, network.empty], "hessian_interval": 4, "hessian_warmup": 2},
        {"params": [network.gain], "hessian_power": 1.0, "eps": 0.1, "lr": 0.01, "maximize": True},
        {"params": [network.linear], "hessian_power": 0.8, "rho": 0.0, "weight_decay": 0.5},
    ]


GROUPINGS = (one_group, many_groups)


# ---------------------------------------------------------------------------------------------------------------------
# float64: the whole trajectory


State = dict[str, Any]


def snapshot(optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, State]]:
    """Every parameter and its state, copied, in group order."""
    copies = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = {
                name: value.detach().cpu().clone() if isinstance(value, Tensor) else value
                for name, value in optimizer.state.get(parameter, {}).items()
            }
            copies.append((parameter.detach().cpu().clone(), state))
    return copies


Trajectory = list[list[tuple[Tensor, State]]]


def reference_trajectory(groups: Groups, options: dict[str, Any]) -> Trajectory:
    network = Network()
    optimizer = ReferenceSassha(groups(network), **options)
    trajectory = []
    for step in range(STEPS):
        optimizer.step(lambda: network.loss(step))
        trajectory.append(snapshot(optimizer))
    return trajectory


@functools.cache
def cached_reference_trajectory(groups: Groups, options: tuple[tuple[str, Any], ...]) -> Trajectory:
    return reference_trajectory(groups, dict(options))


def assert_near(actual: Tensor, expected: Tensor, floor: float, what: str) -> None:
    """Within 1e-12 of the element or, where terms cancel, within floor of the tensor's largest one."""
    atol = floor * float(expected.abs().amax()) if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=atol, msg=lambda text: f"{what}: {text}")


def check_trajectory(
    backend: str, groups: Groups, options: dict[str, Any], expected: Trajectory, floor: float = 1e-14
) -> None:
    network = Network(device=BACKENDS[backend])
    optimizer = Sassha(groups(network), backend=backend, **options)
    for step, reference in enumerate(expected):
        optimizer.step(lambda: network.loss(step))
        found = snapshot(optimizer)
        for i, ((w, state), (expected_w, expected_state)) in enumerate(zip(found, reference, strict=True)):
            where = f"step {step + 1}, parameter {i}"
            assert_near(w, expected_w, floor, f"{where}, w")
            assert set(state) == set(expected_state)
            for name, value in expected_state.items():
                if isinstance(value, Tensor):
                    assert_near(state[name], value, floor, f"{where}, {name}")
                else:
                    assert int(state[name]) == value, f"{where}, {name}"
    network.assert_guards_untouched()


POWERS = (0.5, 1.0, 0.7)
NAMES = ("hessian_interval", "hessian_warmup", "hessian_samples", "adaptive", "bias_correction")
# Every combination of these, with the powers in turn, so that each power meets each pair of them.
GRID = [
    dict(zip(NAMES, values, strict=True), hessian_power=POWERS[i % 3])
    for i, values in enumerate(itertools.product([1, 3, 10], [0, 4], [1, 3], [False, True], ["step", "update"]))
]
COMMON = {"lr": 0.05, "rho": 0.1, "weight_decay": 0.02, "eps": 1e-2, "seed": 3}


@each_backend_and("options", GRID, GRID[::16], id_of=lambda options: "-".join(map(str, options.values())))
def test_float64_trajectory_is_that_of_the_reference(backend: str, options: dict[str, Any]) -> None:
    options = {**COMMON, **options}
    check_trajectory(backend, one_group, options, cached_reference_trajectory(one_group, tuple(options.items())))


@each_backend
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"maximize": True, "lr": 1e-3},
        {"betas": (0.0, 0.0)},
        {"betas": (0.99, 0.5), "eps": 1.0},
        {"rho": 0.0, "weight_decay": 0.0},
        # A loud one, but not chaotic: 1e-10 of the first weights grows to 5e-9 (at rho 1 and lr .5 to 7e-7, and with
        # it the last bits in which processors differ).
        {"rho": 0.5, "lr": 0.1, "seed": (1 << 63) - 1},
        {"lr": 0.0, "weight_decay": 0.3},
        {"lr": torch.tensor(0.05, dtype=torch.float64)},
    ],
    ids=str,
)
def test_float64_trajectory_is_that_of_the_reference_at_other_hyperparameters(
    backend: str, options: dict[str, Any]
) -> None:
    options = {**COMMON, "hessian_interval": 3, **options}
    check_trajectory(backend, one_group, options, cached_reference_trajectory(one_group, tuple(options.items())))


@each_backend
@pytest.mark.parametrize("hessian_samples", [1, 3])
def test_float64_trajectory_of_several_groups_is_that_of_the_reference(backend: str, hessian_samples: int) -> None:
    options = {**COMMON, "hessian_interval": 3, "hessian_samples": hessian_samples}
    check_trajectory(backend, many_groups, options, cached_reference_trajectory(many_groups, tuple(options.items())))


@each_quick_backend
@settings(max_examples=15)
@given(
    lr=st.floats(0, 0.1),
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    eps=st.floats(1e-2, 1),
    weight_decay=st.floats(0, 0.5),
    rho=st.floats(0, 0.5),
    adaptive=st.booleans(),
    hessian_interval=st.integers(1, STEPS + 1),
    hessian_warmup=st.integers(0, STEPS + 1),
    hessian_samples=st.integers(1, 4),
    hessian_power=st.floats(0.1, 1),
    bias_correction=st.sampled_from(["step", "update"]),
    seed=st.integers(0, 2**63 - 1),
)
def test_float64_trajectory_is_that_of_the_reference_at_any_hyperparameters(backend: str, **options: Any) -> None:
    # Some amplify rounding more than others, most where the samples of an estimate cancel.
    check_trajectory(backend, one_group, options, reference_trajectory(one_group, options), floor=1e-12)


@each_backend
def test_the_trajectory_is_not_that_of_other_hyperparameters(backend: str) -> None:
    # The comparison above would notice: each of these changes the end of the trajectory.
    options = {**COMMON, "hessian_interval": 3, "hessian_samples": 2}
    expected = reference_trajectory(one_group, options)
    for change in (
        {"seed": 4},
        {"hessian_interval": 4},
        {"hessian_warmup": 2},
        {"bias_correction": "update"},
        {"adaptive": True},
        {"hessian_power": 0.500001},
        {"eps": 1.0000001e-2},
        {"rho": 0.1000001},
    ):
        with pytest.raises(AssertionError):
            check_trajectory(backend, one_group, {**options, **change}, expected)


# ---------------------------------------------------------------------------------------------------------------------
# float32, bfloat16, float16: each step from the same state


def is_due(group: dict[str, Any], state: State) -> bool:
    """Whether the next step of a parameter in this state is a Hessian step."""
    t = int(state.get("step", 0)) + 1
    return (t - 1) % group["hessian_interval"] == 0 or t <= group["hessian_warmup"]


def products_of(due: list[Tensor], starts: dict[Tensor, int], samples: int, seed: int, evaluation: int) -> Any:
    """For each sample the terms z . Hz, in float64, from the graph that the gradients in .grad carry."""
    curved = [p for p in due if p.grad.requires_grad]
    for sample in range(samples):
        z = {p: from_memory_order(signs(starts[p], p.numel(), seed, evaluation, sample), p).to(p) for p in due}
        products = torch.autograd.grad(
            [p.grad for p in curved], due, [z[p] for p in curved], retain_graph=True, materialize_grads=True
        )
        yield [z[p].double() * product.double() for p, product in zip(due, products, strict=True)]


def check_update(
    group: dict[str, Any], p: Tensor, before: tuple[Tensor, State], state: State, g: Tensor, H: Any
) -> None:
    """Compares one parameter and its state after a step with the formula, taken from the state before."""
    w, old = before
    zeros = torch.zeros(w.shape)
    exact = formula_update(
        memory_order(w),
        flat_of(g, p),
        None if H is None else flat_of(H, p),
        flat_of(old.get("exp_avg", zeros), p),
        flat_of(old.get("exp_hessian", zeros), p),
        int(old.get("step", 0)),
        int(old.get("hessian_step", 0)),
        lr=group["lr"],
        betas=group["betas"],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        hessian_power=group["hessian_power"],
        bias_correction=group["bias_correction"],
        maximize=group["maximize"],
    )
    ulps = ULPS if group["hessian_power"] in (0.5, 1.0) else GENERAL_POWER_ULPS
    assert_rounded([p.detach().cpu()], exact.w, exact.w_largest, ulps)
    assert_rounded([state["exp_avg"].cpu()], exact.m, exact.m_largest, ULPS)
    assert_rounded([state["exp_hessian"].cpu()], exact.D, exact.D_largest, ULPS)
    assert (int(state["step"]), int(state["hessian_step"])) == (exact.t, exact.e)
    assert state["exp_avg"].dtype == state["exp_hessian"].dtype == torch.float32


def check_single_steps(backend: str, dtype: torch.dtype, groups: Groups, recorder: Recorder, **options: Any) -> None:
    network = Network(dtype, BACKENDS[backend])
    optimizer = Sassha(groups(network), backend=backend, **options)
    every = [(group, p) for group in optimizer.param_groups for p in group["params"]]
    params = [p for _, p in every]
    starts = dict(zip(params, itertools.accumulate((p.numel() for p in params), initial=0)))
    evaluations = 0
    for step in range(steps_of(backend)):
        optimizer.zero_grad()
        network.loss(step).backward()
        before = dict(zip(params, snapshot(optimizer), strict=True))
        active = [(group, p, p.grad.cpu().clone()) for group, p in every if p.grad is not None]

        optimizer.perturb()
        norms = [formula_norm([g], [before[p][0]] if group["adaptive"] else None) for group, p, g in active]
        for group, p, g in active:
            weights, modes = memory_order(before[p][0]), (group["rho"], group["adaptive"], group["maximize"])
            exact = formula_perturb(weights, flat_of(g, p), math.hypot(*norms), *modes)
            assert_rounded([p.detach().cpu()], exact.w, exact.w_largest, ULPS)

        due = [p for group, p, _ in active if is_due(group, before[p][1])]
        assert optimizer.hessian_due == bool(due)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Using backward")
            network.loss(step).backward(create_graph=bool(due))
        gradients = {p: p.grad.detach().cpu().clone() for _, p, _ in active}
        samples = list(
            products_of(due, starts, options["hessian_samples"], options["seed"], evaluations) if due else ()
        )
        evaluations += bool(due)
        recorder.products.clear()
        optimizer.step()

        assert set(recorder.products) == set(due)
        for terms in zip(due, *samples):
            check_estimate(recorder.products[terms[0]], torch.stack(terms[1:]))
        for group, p, _ in active:
            check_update(group, p, before[p], optimizer.state[p], gradients[p], recorder.products.get(p))
        for p in set(params) - {p for _, p, _ in active}:
            w, state = before[p]
            assert_same_bits(p.detach().cpu(), w, "a parameter without a gradient")
            assert all(torch.equal(value.cpu(), state[name]) for name, value in optimizer.state.get(p, {}).items())
    assert optimizer.skipped_steps == 0
    network.assert_guards_untouched()


def check_estimate(found: Tensor, terms: Tensor) -> None:
    """What reached update_ is the mean of the terms z . Hz; of a single one the sign does not matter."""
    if len(terms) == 1:
        torch.testing.assert_close(found.double().abs().cpu(), terms[0].abs().cpu(), rtol=0, atol=0)
    else:
        exact, largest = (flat_of(t.cpu(), found) for t in (terms.mean(0), terms.abs().amax(0)))
        assert_rounded([found.cpu()], exact, largest, 2)


@each_backend_and("groups", GROUPINGS, GROUPINGS[1:], id_of=attrgetter("__name__"))
@each_narrow_dtype
@pytest.mark.parametrize(
    "options",
    [
        {"hessian_interval": 3},
        {"hessian_interval": 3, "hessian_samples": 3, "hessian_power": 1.0, "adaptive": True},
        {"hessian_interval": 1, "hessian_samples": 3, "hessian_power": 0.7, "bias_correction": "update"},
        {"hessian_interval": 10, "hessian_warmup": 4, "maximize": True, "lr": 1e-3},
    ],
    ids=str,
)
def test_every_step_is_the_formula_from_the_state_before_it(
    backend: str, dtype: torch.dtype, groups: Groups, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**COMMON, "hessian_samples": 1, **options}
    check_single_steps(backend, dtype, groups, Recorder(monkeypatch), **options)


# ---------------------------------------------------------------------------------------------------------------------
# The same bits


def trajectory(
    backend: str, device: str, dtype: torch.dtype, groups: Groups, steps: int = STEPS, **options: Any
) -> Trajectory:
    network = Network(dtype, device)
    optimizer = Sassha(groups(network), backend=backend, **{**COMMON, **options})
    found = []
    for step in range(steps):
        optimizer.step(lambda: network.loss(step))
        found.append(snapshot(optimizer))
    return found


def assert_same_trajectory(actual: Trajectory, expected: Trajectory) -> None:
    for step, (found, wanted) in enumerate(zip(actual, expected, strict=True)):
        for i, ((w, state), (expected_w, expected_state)) in enumerate(zip(found, wanted, strict=True)):
            assert_same_bits(w, expected_w, f"step {step + 1}, parameter {i}")
            assert set(state) == set(expected_state)
            for name, value in expected_state.items():
                assert_same_bits(state[name], value, f"step {step + 1}, parameter {i}, {name}")


@each_backend_and("groups", GROUPINGS, GROUPINGS[1:], without=BASELINE, id_of=attrgetter("__name__"))
@each_narrow_dtype
@pytest.mark.parametrize(
    "options",
    [
        {"hessian_interval": 3},
        {"hessian_interval": 1, "hessian_samples": 3, "hessian_power": 1.0},
        {"hessian_interval": 10, "hessian_warmup": 4, "adaptive": True, "bias_correction": "update"},
    ],
    ids=str,
)
def test_backends_take_the_same_trajectory_to_the_bit(
    backend: str, dtype: torch.dtype, groups: Groups, options: dict[str, Any]
) -> None:
    # The baseline serves every device; the network's own passes must be the same.
    device = BACKENDS[backend]
    steps = steps_of(backend)
    found, expected = (trajectory(name, device, dtype, groups, steps, **options) for name in (backend, BASELINE))
    assert_same_trajectory(found, expected)


@each_quick_backend
@each_dtype
def test_two_runs_take_the_same_trajectory_to_the_bit(backend: str, dtype: torch.dtype) -> None:
    options = {"hessian_interval": 3, "hessian_samples": 3, "hessian_power": 0.7}
    found, expected = (trajectory(backend, BACKENDS[backend], dtype, many_groups, **options) for _ in range(2))
    assert_same_trajectory(found, expected)


@each_quick_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_number_of_threads_changes_no_bit_of_the_trajectory(
    backend: str, dtype: torch.dtype, adaptive: bool
) -> None:
    # The gradients and products of this loss are elementwise, so that nothing but the optimizer's passes sums.
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator).to(dtype) for shape in [(33_001,), (3,), (110, 150)]]
    results = []
    for count in (1, 2):
        params = [nn.Parameter(w.to(BACKENDS[backend], copy=True)) for w in start]
        optimizer = Sassha(params, backend=backend, **{**COMMON, "hessian_interval": 2, "adaptive": adaptive})
        with threads(count):
            for _ in range(3):
                optimizer.step(lambda: sum((w.square() * (1 + w / 8)).sum() for w in params))
        results.append([snapshot(optimizer)])
    assert_same_trajectory(*results)

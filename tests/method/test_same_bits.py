"""The same trajectory to the bit: on every backend, in every run, with any number of threads."""

from typing import Any

import pytest
import torch
from torch import nn

from sassha_fused import Sassha
from tests.support.backends import BACKENDS, BASELINE, each_other_backend, each_quick_backend
from tests.support.cases import assert_same_bits, each_dtype, threads
from tests.support.network import (
    COMMON,
    STEPS,
    Dropping,
    Groups,
    Network,
    Trajectory,
    each_run,
    many_groups,
    snapshot,
    steps_of,
)
from tests.support.problems import single_threaded

# What more threads do is a test of its own.
one_thread = pytest.fixture(autouse=True, scope="module")(single_threaded)


def trajectory(
    backend: str,
    device: str,
    dtype: torch.dtype,
    groups: Groups,
    options: dict[str, Any],
    *,
    steps: int = STEPS,
    kind: type[Network] = Network,
) -> Trajectory:
    network = kind(dtype, device)
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


def assert_same_as_baseline(backend: str, *arguments: Any, **rest: Any) -> None:
    # The baseline serves every device; the network's own passes must be the same.
    device = BACKENDS[backend]
    found, expected = (
        trajectory(name, device, *arguments, steps=steps_of(backend), **rest) for name in (backend, BASELINE)
    )
    assert_same_trajectory(found, expected)


@each_run(
    [backend for backend in BACKENDS if backend != BASELINE],
    [
        {"hessian_interval": 3, "bias_correction": "none"},
        {"hessian_interval": 1, "hessian_samples": 3, "hessian_power": 1.0},
        {"hessian_interval": 10, "hessian_warmup": 3, "adaptive": True, "bias_correction": "update"},
    ],
)
def test_backends_take_the_same_trajectory_to_the_bit(
    backend: str, dtype: torch.dtype, groups: Groups, options: dict[str, Any]
) -> None:
    assert_same_as_baseline(backend, dtype, groups, options)


@each_other_backend
def test_backends_take_the_same_trajectory_to_the_bit_where_parameters_come_and_go(backend: str) -> None:
    options = {"hessian_interval": 3, "hessian_samples": 3, "hessian_power": 0.7}
    assert_same_as_baseline(backend, torch.float32, many_groups, options, kind=Dropping)


@each_quick_backend
@each_dtype
def test_two_runs_take_the_same_trajectory_to_the_bit(backend: str, dtype: torch.dtype) -> None:
    options = {"hessian_interval": 3, "hessian_samples": 3, "hessian_power": 0.7}
    arguments = (backend, BACKENDS[backend], dtype, many_groups, options)
    assert_same_trajectory(*(trajectory(*arguments, steps=STEPS // 2) for _ in range(2)))


@each_quick_backend
@pytest.mark.parametrize("dtype, adaptive", [(torch.float32, False), (torch.bfloat16, True)], ids=str)
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

"""torch's own machinery for tests of optimizers (torch.testing._internal.common_optimizers) on the family.

It brings entries of optimizers, inputs that all must refuse, the schedulers that go with SGD and Adam, and a decorator
that makes a test of each entry. Of its flags foreach, fused, capturable and differentiable the family has none: what is
chosen here is a backend, and the tests of optimizer/torch_optim/ run on each.
"""

from __future__ import annotations

import copy
import unittest
from typing import Any

import pytest
import torch
from torch import nn

from sassha_fused import SAMSGD, SAMAdamW
from tests.support.generic import inputs_of, regression
from tests.support.members import MEMBERS
from tests.support.problems import BACKENDS, assert_differ, single_threaded, weights

pytestmark = pytest.mark.slow
one_thread = pytest.fixture(autouse=True)(single_threaded)

KINDS = {kind.__name__: kind for kind, _ in MEMBERS.values()}
# A wrong argument of each member beside those that all share.
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "Sassha": ({"hessian_power": 1.5}, ValueError, r"hessian_power must be a number in \(0, 1\], got 1.5"),
    "MSassha": ({"exact_restore": 0}, TypeError, "exact_restore must be a bool, got 0"),
    "SAMSGD": ({"nesterov": True}, ValueError, "nesterov needs momentum > 0"),
    "SAMAdamW": ({"ascent": "up"}, ValueError, "ascent must be one of 'gradient', 'momentum', got 'up'"),
    "AdaHessian": ({"hessian_interval": 0}, ValueError, "hessian_interval must be an int >= 1"),
    "SophiaH": ({"clip_threshold": -1.0}, ValueError, "clip_threshold must be finite and >= 0, got -1.0"),
}
SHARED_WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": -0.5}, ValueError, "lr must be finite and >= 0, got -0.5"),
    ({"weight_decay": -0.5}, ValueError, "weight_decay must be finite and >= 0, got -0.5"),
    ({"maximize": 1}, TypeError, "maximize must be a bool, got 1"),
    ({"fused": True}, TypeError, "unexpected keyword argument 'fused'"),
    ({"foreach": True}, TypeError, "unexpected keyword argument 'foreach'"),
]


@pytest.fixture(scope="module")
def torchs() -> Any:
    """Not imported before it is needed: it takes seconds, and would not let anybody set flags of backends any more."""
    pytest.importorskip("expecttest", reason="expecttest is not installed (requirements-dev.txt)")
    from torch.testing._internal import common_optimizers

    # What importing it takes away from the tests that come after.
    setattr(torch.backends, "__allow_nonbracketed_mutation_flag", True)
    return common_optimizers


def entry_of(torchs: Any, name: str) -> Any:
    """The OptimizerInfo of a class: its inputs are those of all its members with all their options."""

    def inputs(device: str, dtype: torch.dtype | None = None) -> list[Any]:
        named = [
            (m, *item) for m, (kind, _) in MEMBERS.items() if kind.__name__ == name for item in inputs_of(m).items()
        ]
        made = [torchs.OptimizerInput(None, copy.deepcopy(kwargs), f"{m}, {option}") for m, option, kwargs in named]
        tensor_lr = {**named[0][2], "lr": torch.tensor(named[0][2]["lr"])}
        return [*made, torchs.OptimizerInput(None, tensor_lr, "Tensor lr")]

    def errors(device: str, dtype: torch.dtype) -> list[Any]:
        shared = torchs.get_error_inputs_for_all_optims(device, dtype)
        for error in shared:
            if error.optimizer_error_input.desc == "Tensor lr must be 1-element":
                error.error_regex = "lr, if a tensor, must be one floating-point element"
        own = [
            torchs.ErrorOptimizerInput(
                torchs.OptimizerInput([nn.Parameter(torch.ones(2))], kwargs), error_type=error, error_regex=message
            )
            for kwargs, error, message in (*SHARED_WRONG, WRONG[name])
        ]
        return [*shared, *own]

    of_torch = {info.name: info for info in torchs.optim_db}
    schedulers = [*of_torch["SGD"].scheduler_inputs, *of_torch["Adam"].scheduler_inputs]
    return torchs.OptimizerInfo(
        KINDS[name],
        optim_inputs_func=inputs,
        optim_error_inputs_func=errors,
        scheduler_inputs=schedulers,
        supported_impls=(),
        not_og_supported_flags=("maximize",),
        supports_complex=False,  # refused by name
        step_requires_closure=True,  # of those that take two passes; the others take one as well
    )


def generic_tests(torchs: Any) -> type[unittest.TestCase]:
    """Tests of every entry, made by torch's decorator: a method for each, named test_what_Kind_cpu_float32."""
    from torch.testing._internal.common_device_type import instantiate_device_type_tests
    from torch.testing._internal.common_utils import TestCase

    entries = [entry_of(torchs, name) for name in KINDS]

    class Generic(TestCase):
        @torchs.optims(entries)
        def test_errors(self, device: str, dtype: torch.dtype, optim_info: Any) -> None:
            for wrong in optim_info.optim_error_inputs_func(device=device, dtype=dtype):
                given = wrong.optimizer_error_input
                params = [nn.Parameter(torch.ones(2))] if given.params is None else given.params
                expect = self.assertWarnsRegex if issubclass(wrong.error_type, Warning) else self.assertRaisesRegex
                with expect(wrong.error_type, wrong.error_regex):
                    optim_info.optim_cls(params, **given.kwargs)

        @torchs.optims(entries)
        def test_inputs_are_those_with_global_flags(self, device: str, dtype: torch.dtype, optim_info: Any) -> None:
            plain = optim_info.optim_inputs_func(device)
            every = torchs._get_optim_inputs_including_global_cliquey_kwargs(device, dtype, optim_info)
            self.assertEqual([it.desc for it in every], [it.desc for it in plain])
            self.assertFalse(any({"foreach", "fused", "differentiable"} & it.kwargs.keys() for it in plain))

        @torchs.optims(entries)
        def test_schedulers_of_sgd_and_adam(self, device: str, dtype: torch.dtype, optim_info: Any) -> None:
            for constructors in optim_info.scheduler_inputs:
                kwargs = optim_info.optim_inputs_func(device)[0].kwargs
                (weight, bias), loss = regression(device=device)
                opt = optim_info.optim_cls([{"params": [weight]}, {"params": [bias], "lr": 0.01}], **kwargs)
                schedulers = [constructor(opt) for constructor in constructors]
                start = loss().item()
                for _ in range(20):
                    value = opt.step(loss)
                    for scheduler in schedulers:
                        plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                        scheduler.step(*([value] if plateau else []))
                self.assertLess(loss().item(), start)

        @torchs.optims(entries, dtypes=[torch.float64, torch.float32])
        def test_fused_matches_forloop(self, device: str, dtype: torch.dtype, optim_info: Any) -> None:
            for given in optim_info.optim_inputs_func(device):
                models, opts = [], []
                for backend in BACKENDS:
                    models.append(torchs_model(dtype))
                    kwargs = {**copy.deepcopy(given.kwargs), "backend": backend}
                    opts.append(
                        optim_info.optim_cls([*models[-1].parameters(), nn.Parameter(torch.ones(()))], **kwargs)
                    )
                tracker = torchs.TensorTracker({"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {})
                for step in range(7):
                    for model, opt in zip(models, opts):
                        take_in_closure(model, opt, step, dtype)
                    # Of each pair the second takes over what the first is, so that no difference adds up.
                    for mine, theirs in zip(*(model.parameters() for model in models)):
                        pairs = [
                            (mine, theirs),
                            *((v, opts[1].state[theirs][k]) for k, v in opts[0].state[mine].items()),
                        ]
                        for one, other in pairs:
                            tracker.add(one)
                            tracker.pop_check_set(other, self)

    made: dict[str, Any] = {"Generic": Generic}
    instantiate_device_type_tests(Generic, made, only_for="cpu")
    return made["GenericCPU"]


INPUT = [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]


def torchs_model(dtype: torch.dtype) -> nn.Sequential:
    """The network of torch's own comparison, the same at every call."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator))
    return model.to(dtype)


def freeze(model: nn.Sequential, step: int) -> None:
    """As torch's comparison does: the second layer rests for two steps."""
    model[2].requires_grad_(step not in (3, 4))


def take_in_closure(model: nn.Sequential, opt: Any, step: int, dtype: torch.dtype) -> None:
    """One of torch's seven steps for an optimizer that takes two passes; the third has no gradients."""
    freeze(model, step)
    opt.zero_grad()
    opt.step(*([] if step == 2 else [lambda: model(torch.tensor(INPUT, dtype=dtype)).sum()]))


@pytest.fixture(scope="module")
def generic(torchs: Any) -> type[unittest.TestCase]:
    return generic_tests(torchs)


TESTS = [
    *("test_errors", "test_inputs_are_those_with_global_flags", "test_schedulers_of_sgd_and_adam"),
    "test_fused_matches_forloop",
]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("test", TESTS)
def test_torchs_decorators_run_on_every_member(generic: type[unittest.TestCase], test: str, name: str) -> None:
    methods = [method for method in dir(generic) if method.startswith(f"{test}_{name}_cpu_")]
    assert len(methods) == (2 if test == "test_fused_matches_forloop" else 1)
    result = unittest.TestResult()
    for method in methods:
        generic(method).run(result)
    assert result.testsRun == len(methods) and not result.skipped
    assert result.wasSuccessful(), "\n".join(text for _, text in (*result.errors, *result.failures))


def test_every_test_of_the_class_is_run(generic: type[unittest.TestCase]) -> None:
    made = {method for method in dir(generic) if method.startswith("test_") and callable(getattr(generic, method))}
    assert {m for m in made if not any(m.startswith(f"{t}_{n}_cpu_") for t in TESTS for n in KINDS)} == set()


# ---------------------------------------------------------------------------------------------------------------------
# Without a radius SAMSGD and SAMAdamW are SGD and AdamW, for all of torch's inputs and in its own loop


def plain_step(model: nn.Sequential, opt: Any, step: int) -> None:
    """One of torch's seven steps as torch takes it; one pass is enough where rho is 0."""
    freeze(model, step)
    opt.zero_grad()
    if step != 2:
        model(torch.tensor(INPUT, dtype=torch.float64)).sum().backward()
    opt.step()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind, torchs_kind", [(SAMSGD, torch.optim.SGD), (SAMAdamW, torch.optim.AdamW)])
def test_without_a_radius_all_of_torchs_inputs_give_torchs_steps(
    torchs: Any, backend: str, kind: Any, torchs_kind: Any
) -> None:
    (info,) = [info for info in torchs.optim_db if info.optim_cls is torchs_kind]
    inputs = [given for given in info.optim_inputs_func("cpu") if "amsgrad" not in given.kwargs]
    assert len(inputs) >= 4
    for given in inputs:
        mine, theirs = torchs_model(torch.float64), torchs_model(torch.float64)
        ours = kind(mine.parameters(), rho=0.0, backend=backend, **copy.deepcopy(given.kwargs))
        reference = torchs_kind(theirs.parameters(), foreach=False, **copy.deepcopy(given.kwargs))
        start = weights(mine.parameters())
        for step in range(7):
            plain_step(mine, ours, step)
            plain_step(theirs, reference, step)
            for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14, msg=lambda text: f"{given.desc}: {text}")
                for name, value in reference.state[other].items():
                    found = ours.state[one][name]
                    torch.testing.assert_close(found.double(), value.double(), rtol=1e-12, atol=1e-14)
        assert_differ([*mine.parameters()], start)

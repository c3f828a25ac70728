"""What the tests of steps that are not what they seem share: references in float64, refusals without a trace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.overrides import _len_torch_function_stack

from sassha_fused import Sassha
from sassha_fused.checks import SCHEDULE
from tests.support.problems import ALL_STYLES, Problem, assert_same, weights
from tests.support.reference import ReferenceSassha

all_styles = pytest.mark.parametrize("style", ALL_STYLES)


def reference_of(opt: Sassha) -> ReferenceSassha:
    """The reference on the same parameters with the same options."""
    mine = {"params", "lr", "betas", "eps", "weight_decay", "rho", "adaptive", "hessian_power", "bias_correction"}
    groups = [{k: v for k, v in group.items() if k in {*mine, "maximize"}} for group in opt.param_groups]
    schedule = {name: opt.param_groups[0][name] for name in SCHEDULE if name != "hessian_batches"}
    return ReferenceSassha(groups, **schedule)


def by_reference(kind: type[Problem], count: int, **options: Any) -> Problem:
    """The problem in float64 after some steps of the reference."""
    problem = kind(dtype=torch.float64, **options)
    problem.opt = reference_of(problem.opt)  # type: ignore[assignment]
    return problem.train(count)


def assert_close(actual: Problem, expected: Problem, rtol: float = 1e-11) -> None:
    """Every weight and every element of state agrees, relative to the largest of its tensor."""
    assert_states_close(actual.params, actual.opt, expected.params, expected.opt, rtol)


def assert_states_close(params: Sequence[Tensor], opt: Any, others: Sequence[Tensor], other: Any, rtol: float) -> None:
    """The same of two lists of parameters and their optimizers."""
    for i, (mine, theirs) in enumerate(zip(params, others, strict=True)):
        _assert_near(mine, theirs, rtol, f"parameter {i}")
        assert (mine in opt.state) == (theirs in other.state), f"state of parameter {i}"
        if mine in opt.state:
            one, two = opt.state[mine], other.state[theirs]
            for name in ("exp_avg", "exp_hessian"):
                _assert_near(one[name], two[name], rtol, f"{name} of parameter {i}")
            for name in ("step", "hessian_step"):
                assert int(one[name]) == int(two[name]), f"{name} of parameter {i}"


def _assert_near(mine: Tensor, theirs: Tensor, rtol: float, where: str) -> None:
    mine, theirs = mine.detach(), theirs.detach()
    largest = float(theirs.abs().max()) if theirs.numel() else 0.0
    torch.testing.assert_close(mine, theirs, rtol=rtol, atol=rtol * largest, msg=lambda text: f"{where}: {text}")


def assert_clean(params: Iterable[Tensor]) -> None:
    """Nothing of a step is left: no hook on a parameter or on modules in general, no mode, no graph."""
    for param in params:
        assert not param._backward_hooks
        assert not getattr(param, "_post_accumulate_grad_hooks", None)
        assert param.grad is None or not param.grad.requires_grad
    assert not modules._global_forward_hooks and not modules._global_forward_pre_hooks
    assert not modules._global_backward_hooks and not modules._global_backward_pre_hooks
    assert _len_torch_function_stack() == 0
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()


@contextmanager
def refused(problem: Problem, match: str, error: type[BaseException] = ValueError) -> Iterator[None]:
    """The block raises; the weights are then w, the state is what it was, and nothing is left of the step."""
    before = problem.snapshot()
    with pytest.raises(error, match=match):
        yield
    assert not problem.opt.perturbed
    assert_same(weights(problem.params), before["weights"], "weights")
    after = problem.snapshot()
    for param in after["state"].keys() - before["state"].keys():  # made at the first gradient, as torch.optim does
        assert not any(value.any() for value in after["state"].pop(param).values())
    assert_same(after, before)


def assert_goes_on(problem: Problem, count: int = 4, **options: Any) -> None:
    """The next steps are those of a run that nothing has disturbed."""
    problem.opt.zero_grad()
    undisturbed = type(problem)(**options).train(problem.steps + count)
    assert_same(problem.train(count).snapshot(), undisturbed.snapshot())


class Net(nn.Sequential):
    """A small network in float64 that is the same at every call, its batch and its loss."""

    def __init__(self, *layers: nn.Module, seed: int = 0) -> None:
        super().__init__(*(layers or (nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(torch.randn(param.shape, generator=generator) / 2)
        self.double()
        self.inputs = torch.randn(16, 5, generator=generator, dtype=torch.float64)
        self.targets = torch.randint(0, 3, (16,), generator=generator)

    def loss(self) -> Tensor:
        return nn.functional.cross_entropy(self(self.inputs), self.targets)

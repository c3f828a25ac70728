"""What the tests of the optimizer share: a small problem, the ways to take a step, comparisons bit for bit."""

from __future__ import annotations

import copy
import functools
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sassha_fused import Sassha
from sassha_fused.bucket import Bucket
from tests.support.cases import threads

BACKENDS = ("cpu", "eager")


class Problem:
    """A network of two parameter groups, a batch for every step, and its optimizer (every third step a Hessian one)."""

    def __init__(self, backend: str = "cpu", dtype: torch.dtype = torch.float32, **options: Any) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)

        self.model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).to(dtype)
        self.params = list(self.model.parameters())
        for param in self.params:
            param.data = random(*param.shape) / 2
        self.inputs, self.targets = random(32, 16, 5), random(32, 16, 2)
        groups = [{"params": self.params[:2]}, {"params": self.params[2:], "lr": 0.03, "weight_decay": 0.1}]
        self.opt = Sassha(groups, **{"lr": 0.05, "hessian_interval": 3, "backend": backend, **options})
        self.steps = 0

    def loss(self) -> Tensor:
        """The loss of the current batch; a step that raises leaves the batch as it is."""
        batch = self.steps % len(self.inputs)
        return (self.model(self.inputs[batch]) - self.targets[batch]).square().mean()

    def step(self, style: str = "closure") -> Tensor:
        """Takes a step in one of ALL_STYLES, as in a loop; returns its loss."""
        self.opt.zero_grad()
        loss = ALL_STYLES[style](self.opt, self.loss)
        self.steps += 1
        return loss

    def perturb(self) -> None:
        """The first half of a step in a hand-written loop."""
        self.opt.zero_grad()
        self.loss().backward()
        self.opt.perturb()

    def train(self, count: int, style: str = "closure") -> Problem:
        """Takes several steps."""
        for _ in range(count):
            self.step(style)
        return self

    def snapshot(self) -> dict[str, Any]:
        """Weights and whole state; where the weights are at w', asking for the state restores them."""
        state = copy.deepcopy(self.opt.state_dict())
        return {"weights": weights(self.params), **state}


class TwoBuckets(Problem):
    """The groups differ in what no table has a column for, so that each pass calls each operator twice."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.opt.param_groups[1]["eps"] = 0.01


def continued(problem: Problem, state: dict[str, Any], kind: type[Problem] = Problem, **options: Any) -> Problem:
    """Another process that goes on where this one stood: the same weights, and this state."""
    other = kind(**options)
    other.model.load_state_dict(problem.model.state_dict())
    other.opt.load_state_dict(state)
    other.steps = problem.steps
    return other


@functools.cache
def undisturbed(kind: type[Problem], backend: str, count: int) -> dict[str, Any]:
    """The snapshot after some steps that nothing disturbs; read it only."""
    return kind(backend).train(count).snapshot()


@contextmanager
def refused(problem: Problem, error: type[Exception], match: str) -> Iterator[None]:
    """The block raises, and leaves no trace: not in weights, state, groups or counts, nor in the steps after it."""
    backend = problem.opt._run.flat.backend
    expected = [undisturbed(type(problem), backend, problem.steps + more) for more in (0, 4)]
    assert_same(problem.snapshot(), expected[0])
    with pytest.raises(error, match=match):
        yield
    assert not problem.opt.perturbed
    assert_same(problem.snapshot(), expected[0])
    assert_same(problem.train(4).snapshot(), expected[1])


def naming(name: str, value: Any) -> str:
    """A message that has the argument's name, and later its value."""
    return rf"(?s){name}\b.*{re.escape(repr(value))}"


def parameter(*values: float, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def weights(params: Iterable[Tensor]) -> list[Tensor]:
    """Copies, in the same strides."""
    return [param.detach().clone() for param in params]


def backward(loss: Tensor, create_graph: bool = False) -> None:
    """loss.backward, without torch's warning about graphs that hold themselves: the optimizer breaks that cycle."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using backward")
        loss.backward(create_graph=create_graph)


def closure_style(opt: Sassha, loss: Callable[[], Tensor]) -> Tensor:
    """The closure returns the loss, the optimizer runs backward."""
    return opt.step(loss)


def standard_style(opt: Sassha, loss: Callable[[], Tensor]) -> Tensor:
    """The closure runs backward too."""

    def closure() -> Tensor:
        value = loss()
        value.backward()
        return value

    return opt.step(closure)


def phase_style(opt: Sassha, loss: Callable[[], Tensor]) -> Tensor:
    """A hand-written loop."""
    opt.zero_grad()
    value = loss()
    value.backward()
    opt.perturb()
    backward(loss(), create_graph=opt.hessian_due)
    opt.step()
    return value.detach()


STYLES: dict[str, Callable[[Sassha, Callable[[], Tensor]], Tensor]] = {
    "closure": closure_style,
    "standard": standard_style,
    "phase": phase_style,
}


def hessian_pass_style(opt: Sassha, loss: Callable[[], Tensor]) -> Tensor:
    """A hand-written loop whose second backward knows nothing of graphs."""
    opt.zero_grad()
    value = loss()
    value.backward()
    opt.perturb()
    with opt.hessian_pass():
        loss().backward()
    opt.step()
    return value.detach()


# With the one that the optimizer helps with a context.
ALL_STYLES = {**STYLES, "hessian_pass": hessian_pass_style}


def single_threaded() -> Iterator[None]:
    """Body of a fixture: threads of torch's own cost more than they save in small tests on a busy machine."""
    with threads(1):
        yield


def assert_same(actual: Any, expected: Any, where: str = "") -> None:
    """Equal bit for bit, tensor by tensor: -0 is not 0, and a NaN is the same NaN."""
    if isinstance(expected, Tensor):
        assert isinstance(actual, Tensor), f"{where}: {actual!r} is no tensor"
        kinds = [(t.shape, t.dtype, t.device) for t in (actual, expected)]
        assert kinds[0] == kinds[1], f"{where}: {kinds[0]} instead of {kinds[1]}"
        a, b = (t.detach().reshape(-1).contiguous() for t in (actual, expected))
        if not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            rows = [t.view(torch.uint8).view(len(t), -1) for t in (a, b)]
            wrong = (rows[0] != rows[1]).any(1).nonzero()[:, 0].tolist()
            first = f"element {wrong[0]} is {a[wrong[0]].item()!r} instead of {b[wrong[0]].item()!r}"
            raise AssertionError(f"{where}: {len(wrong)} of {len(a)} elements differ; {first}")
    elif isinstance(expected, dict):
        assert list(actual) == list(expected), f"{where}: {list(actual)} instead of {list(expected)}"
        for key in expected:
            assert_same(actual[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), f"{where}: {len(actual)} instead of {len(expected)} items"
        for i, pair in enumerate(zip(actual, expected)):
            assert_same(*pair, f"{where}[{i}]")
    else:
        assert actual == expected, f"{where}: {actual!r} instead of {expected!r}"


def assert_differ(actual: list[Tensor], other: list[Tensor]) -> None:
    """No tensor of one list equals its partner: guards a test against a step that does nothing."""
    for i, (a, b) in enumerate(zip(actual, other, strict=True)):
        assert not torch.equal(a, b), f"tensor {i} did not change"


class ManyGroups:
    """Parameters in groups with options of their own, and a loss that ties them together."""

    def __init__(self, options: list[dict[str, Any]], backend: str = "cpu", **shared: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self.params = [nn.Parameter(torch.randn(3, i + 1, generator=generator) / 2) for i in range(len(options))]
        groups = [{"params": [param], **own} for param, own in zip(self.params, options)]
        self.opt = Sassha(groups, **{"lr": 0.03, "hessian_interval": 3, "backend": backend, **shared})

    def loss(self) -> Tensor:
        rows = torch.stack([param.sum(1) for param in self.params]).sum(0)
        return (rows - 1).square().sum() + sum((param**4).sum() for param in self.params)

    def train(self, count: int, style: str = "closure") -> ManyGroups:
        for _ in range(count):
            self.opt.zero_grad()
            ALL_STYLES[style](self.opt, self.loss)
        return self

    @property
    def buckets(self) -> list[Bucket]:
        return self.opt._run.flat.buckets

    def everything(self) -> list[Any]:
        state = self.opt.state_dict()["state"]
        return [weights(self.params), state]

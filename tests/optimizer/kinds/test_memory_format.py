"""A part of the model takes another memory format: its state follows, element for element, or the step is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sassha_fused import Sassha
from tests.support.kinds import all_styles
from tests.support.problems import ALL_STYLES, BACKENDS, assert_same, single_threaded

one_thread = pytest.fixture(autouse=True)(single_threaded)
both_backends = pytest.mark.parametrize("backend", BACKENDS)

WHICH = {"the first": [0], "one between": [1], "the last": [3], "several": [0, 3], "all": [0, 1, 2, 3]}
each_part = pytest.mark.parametrize("which", WHICH)


class Convolutions:
    """Weights whose loss, curvature and gradients are the same bits in every memory format."""

    def __init__(self, backend: str, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = [(5, 3, 3, 3), (4, 4, 3, 3), (7,), (2, 6, 2, 5)]
        self.params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
        groups = [{"params": self.params[:2]}, {"params": self.params[2:], "lr": 0.002, **options}]
        self.opt = Sassha(groups, lr=0.003, hessian_interval=3, backend=backend)

    def loss(self) -> Tensor:
        return sum((param.contiguous() ** 4).sum() for param in self.params)  # type: ignore[return-value]

    def convert(self, which: str, memory_format: torch.memory_format) -> None:
        for i in WHICH[which]:
            if self.params[i].dim() == 4:
                self.params[i].data = self.params[i].data.to(memory_format=memory_format)

    def train(self, count: int, style: str) -> Convolutions:
        for _ in range(count):
            self.opt.zero_grad()
            ALL_STYLES[style](self.opt, self.loss)
        return self

    def everything(self) -> list[Any]:
        return [self.params, self.opt.state_dict()["state"]]


@both_backends
@all_styles
@pytest.mark.parametrize("steps", [1, 3], ids=["lazy", "Hessian"])
@pytest.mark.parametrize("options", [{}, {"betas": (0.5, 0.9)}], ids=["one bucket", "two buckets"])
@each_part
def test_state_follows(which: str, options: dict[str, Any], steps: int, style: str, backend: str) -> None:
    problem, expected = Convolutions(backend, **options).train(steps, style), Convolutions(backend, **options)
    problem.convert(which, torch.channels_last)
    problem.train(2, style)
    for i in WHICH[which]:
        assert problem.opt.state[problem.params[i]]["exp_avg"].stride() == problem.params[i].stride()
    assert_same(problem.everything(), expected.train(steps + 2, style).everything())
    problem.convert(which, torch.contiguous_format)
    assert_same(problem.train(2, style).everything(), expected.train(2, style).everything())


@both_backends
@each_part
def test_without_a_perturbation_too(which: str, backend: str) -> None:
    problem, expected = (Convolutions(backend) for _ in range(2))
    for each in (problem, expected):
        for group in each.opt.param_groups:
            group["rho"] = 0.0
        each.train(2, "closure")
    problem.convert(which, torch.channels_last)
    for count in (1, 3):
        assert_same(problem.train(count, "closure").everything(), expected.train(count, "closure").everything())


@both_backends
@all_styles
@each_part
def test_between_the_passes_it_is_refused_and_w_is_not_lost(which: str, style: str, backend: str) -> None:
    problem, expected = Convolutions(backend).train(1, style), Convolutions(backend).train(1, style)
    problem.opt.zero_grad()

    def converting() -> Tensor:
        loss = problem.loss()
        if problem.opt.perturbed:
            problem.convert(which, torch.channels_last)
        return loss

    with pytest.raises(ValueError, match=r"memory format of a model before perturb\(\) or after step\(\)"):
        ALL_STYLES[style](problem.opt, converting)
    assert_same(problem.everything(), expected.everything())
    assert_same(problem.train(3, style).everything(), expected.train(3, style).everything())

"""A whole training step, forward and backward included, against SGD with momentum on the same model and batch."""

import time
from statistics import median

import pytest
import torch
from torch.nn.functional import cross_entropy

from bench.interleave import interleaved, replay, replayed_seconds, spread
from bench.models import MODELS
from sassha_fused import Sassha, running_stats_once

SECONDS = 30
INTERVAL = 10
KIND = "whole step"


class Training:
    """One round is as many steps as lie between two Hessian evaluations; the mean step counts."""

    def __init__(self, name: str, model: str) -> None:
        torch.manual_seed(0)
        self.name = name
        self.network, self.inputs, self.targets = MODELS[model]()
        if name == "sassha cpu":
            self.optimizer = Sassha(
                self.network.parameters(), lr=1e-3, rho=0.05, hessian_interval=INTERVAL, backend="cpu"
            )
            running_stats_once(self.network, self.optimizer)
            self.step = lambda: self.optimizer.step(self.loss)
        else:
            self.optimizer = torch.optim.SGD(self.network.parameters(), lr=1e-3, momentum=0.9)
            self.step = self.step_sgd

    def loss(self) -> torch.Tensor:
        return cross_entropy(self.network(self.inputs), self.targets)

    def step_sgd(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def round(self) -> dict[str, float]:
        start = time.perf_counter()
        for _ in range(INTERVAL):
            self.step()
        return {KIND: (time.perf_counter() - start) / INTERVAL}


@pytest.fixture(scope="module", params=MODELS)
def measured(request, progress, report):
    model = request.param
    contenders = [Training("sassha cpu", model), Training("SGD momentum", model)]
    with progress(f"{model}, whole step") as done:
        samples = interleaved(contenders, SECONDS, done)
    ours, sgd = (median(samples[KIND, contender.name]) for contender in contenders)
    rows = [("", "ms", "spread", "this / SGD")]
    for name, seconds in (("sassha cpu", ours), ("SGD momentum", sgd)):
        rows.append((name, f"{1e3 * seconds:.2f}", spread(samples[KIND, name]), f"{seconds / sgd:.2f}"))
    rounds = len(samples[KIND, "sassha cpu"])
    report.table(f"{model}, {KIND}, mean over {INTERVAL}, medians of {rounds} rounds", rows)
    report.judge(model, ours / sgd)
    return model, samples


@pytest.mark.benchmark(timer=replayed_seconds)
@pytest.mark.parametrize("contender", ["sassha cpu", "SGD momentum"])
def test_whole_step(measured, contender, benchmark):
    model, samples = measured
    benchmark.group = f"{model}, {KIND}"
    replay(benchmark, samples[KIND, contender])

"""A whole training step, forward and backward included, against SGD with momentum or AdamW on the same batch."""

import time
from statistics import median

import pytest
import torch
from torch.nn.functional import cross_entropy

from bench.interleave import interleaved, replay, replayed_seconds, spread
from bench.models import MODELS
from sassha_fused import SAMSGD, MSassha, SAMAdamW, Sassha, running_stats_once

SECONDS = 60
INTERVAL = 10
KIND = "whole step"

OURS = {
    "sassha cpu": (Sassha, {"hessian_interval": INTERVAL}),
    "M-Sassha": (MSassha, {"hessian_interval": INTERVAL}),
    "SAMSGD along the momentum": (SAMSGD, {"momentum": 0.9, "ascent": "momentum"}),
    "SAMAdamW along the momentum": (SAMAdamW, {"ascent": "momentum"}),
}
BASES = {"SGD momentum": (torch.optim.SGD, {"momentum": 0.9}), "AdamW fused": (torch.optim.AdamW, {"fused": True})}
# What each is compared with, if it is not SGD.
BASE = {"SAMAdamW along the momentum": "AdamW fused", "AdamW fused": "AdamW fused"}


class Training:
    """One round is as many steps as lie between two Hessian evaluations; the mean step counts."""

    def __init__(self, name: str, model: str) -> None:
        torch.manual_seed(0)
        self.name = name
        self.network, self.inputs, self.targets = MODELS[model]()
        if name in OURS:
            member, options = OURS[name]
            self.optimizer = member(self.network.parameters(), lr=1e-3, rho=0.05, backend="cpu", **options)
            running_stats_once(self.network, self.optimizer)
            self.step = lambda: self.optimizer.step(self.loss)
        else:
            base, options = BASES[name]
            self.optimizer = base(self.network.parameters(), lr=1e-3, **options)
            self.step = self.step_of_base

    def loss(self) -> torch.Tensor:
        return cross_entropy(self.network(self.inputs), self.targets)

    def step_of_base(self) -> None:
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
    contenders = [Training(name, model) for name in (*OURS, *BASES)]
    with progress(f"{model}, whole step") as done:
        samples = interleaved(contenders, SECONDS, done)
    typical = {contender.name: median(samples[KIND, contender.name]) for contender in contenders}
    rows = [("", "ms", "spread", "this / SGD, AdamW")]
    for name, seconds in typical.items():
        ratio = seconds / typical[BASE.get(name, "SGD momentum")]
        rows.append((name, f"{1e3 * seconds:.2f}", spread(samples[KIND, name]), f"{ratio:.2f}"))
        if name in OURS:
            report.judge(model if name == "sassha cpu" else f"{name}, {model}", ratio)
    rounds = len(samples[KIND, "sassha cpu"])
    report.table(f"{model}, {KIND}, mean over {INTERVAL}, medians of {rounds} rounds", rows)
    return model, samples


@pytest.mark.benchmark(timer=replayed_seconds)
@pytest.mark.parametrize("contender", [*OURS, *BASES])
def test_whole_step(measured, contender, benchmark):
    model, samples = measured
    benchmark.group = f"{model}, {KIND}"
    replay(benchmark, samples[KIND, contender])

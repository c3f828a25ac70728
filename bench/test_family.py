"""The family beside other people's implementations: the optimizer's part of a training step, and the whole of it.

Batches are small, so that the optimizer counts beside forward and backward.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from statistics import median

import pytest
import torch
from torch.nn.functional import cross_entropy

from bench.family import OURS, PACKAGES, rows
from bench.interleave import Samples, interleaved, replay, replayed_seconds, spread
from bench.models import MODELS
from bench.outside import FORWARD, Outside
from bench.peak_memory import printed_by
from bench.peers import Make
from bench.report import Report

BATCHES = {"CNN": 8, "transformer": 2}
SECONDS = 1.5  # for each contender of a row
PART, WHOLE = "optimizer's part", "whole step"
MISSING = [name for name, module in PACKAGES.items() if module is None]
LEFT_OUT = f"; left out, as not installed: {', '.join(MISSING)}" if MISSING else ""


class Training:
    """The mean step of a round counts."""

    def __init__(self, name: str, make: Make, model: str, steps: int) -> None:
        torch.manual_seed(0)
        self.name = name
        self.steps = steps
        self.network, self.inputs, self.targets = MODELS[model](BATCHES[model])
        self.outside = Outside()
        self.step = make(list(self.network.parameters()), self.loss)

    def loss(self) -> torch.Tensor:
        with self.outside.a_pass(FORWARD):
            return cross_entropy(self.network(self.inputs), self.targets)

    def round(self) -> dict[str, float]:
        self.outside.seconds, self.outside.passes = 0.0, Counter()
        with self.outside.watching():
            start = time.perf_counter()
            for _ in range(self.steps):
                self.step()
            seconds = time.perf_counter() - start
        return {PART: (seconds - self.outside.seconds) / self.steps, WHOLE: seconds / self.steps}


@pytest.fixture(scope="module", params=MODELS)
def measured(request, progress, report) -> tuple[str, dict[str, Samples]]:
    model = request.param
    samples = {}
    with progress(f"{model}, the family") as done:
        every = rows()
        for i, row in enumerate(every):
            contenders = [Training(name, make, model, row.steps) for name, make in row.contenders.items()]
            samples[row.title] = interleaved(
                contenders, SECONDS * len(contenders), lambda part, i=i: done((i + part) / len(every))
            )
            for contender in contenders:
                passes, expected = contender.outside.passes, contenders[0].outside.passes
                assert passes == expected, f"{row.title}: {contender.name} takes {passes} a round, we {expected}"
    describe(report, model, samples)
    return model, samples


def describe(report: Report, model: str, samples: dict[str, Samples]) -> None:
    table = [("", "", PART, "this / ours", "spread", WHOLE, "this / ours", "spread")]
    worst = dict.fromkeys((PART, WHOLE), 0.0)
    for row in rows():
        taken = samples[row.title]
        for name in row.contenders:
            cells = []
            for kind in worst:
                seconds, ours = (median(taken[kind, each]) for each in (name, OURS))
                cells += [f"{1e3 * seconds:.2f} ms", f"{seconds / ours:.2f}", spread(taken[kind, name])]
                if name not in (OURS, *row.bases):
                    worst[kind] = max(worst[kind], ours / seconds)
            table.append((row.title if name == OURS else "", name, *cells))
    report.table(f"{model}, batch of {BATCHES[model]}, mean steps, medians{LEFT_OUT}", table)
    for kind, ratio in worst.items():
        report.judge(f"family, {model}, {kind}", ratio)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc/self/status")
def test_peak_memory(report):
    peaks = printed_by("bench.family_memory")
    table = [("bytes per parameter", *(names := list(dict.fromkeys(name for row in peaks.values() for name in row))))]
    for title, row in peaks.items():
        table.append((title, *(f"{row[name]:.1f}" if name in row else "" for name in names)))
    report.table(f"peak memory of whole steps beyond parameters and gradients{LEFT_OUT}", table)


@pytest.mark.benchmark(timer=replayed_seconds)
@pytest.mark.parametrize("kind", [PART, WHOLE])
@pytest.mark.parametrize(("row", "contender"), [(row.title, name) for row in rows() for name in row.contenders])
def test_family(measured, row, contender, kind, benchmark):
    model, samples = measured
    benchmark.group = f"{model}, {row}, {kind}"
    replay(benchmark, samples[row][kind, contender])

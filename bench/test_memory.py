"""Peak memory of a step, as the operating system sees it."""

import sys

import pytest

from bench.contenders import HESSIAN, LAZY
from bench.peak_memory import printed_by

PRODUCTS = 4  # the bench holds them ready; a real step allocates them


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc/self/status")
def test_peak_memory(report):
    peaks = printed_by("bench.peak_memory")
    report.judge("memory, lazy", round(peaks[LAZY], 1))
    report.judge("memory, Hessian", round(peaks[HESSIAN] + PRODUCTS, 1))


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc/self/status")
def test_micro_batches(report):
    for model, ways in printed_by("bench.micro_batches").items():
        base = ways["one batch"][0]
        rows = [("", "ms", "this / one batch", "peak, MB")]
        for way, (seconds, peak) in ways.items():
            rows.append((way, f"{1e3 * seconds:.0f}", f"{seconds / base:.2f}", f"{peak:.0f}"))
        report.table(f"{model}, a Hessian step in micro-batches", rows)

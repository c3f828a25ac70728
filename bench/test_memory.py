"""Peak memory of a step, as the operating system sees it."""

import json
import os
import subprocess
import sys

import pytest

from bench.contenders import HESSIAN, LAZY

PRODUCTS = 4  # the bench holds them ready; a real step allocates them


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc/self/status")
def test_peak_memory(report):
    # glibc would keep what was freed in earlier steps; at a fixed threshold it hands every large tensor back
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "bench.peak_memory"]
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    peaks = json.loads(run.stdout)
    report.judge("memory, lazy", round(peaks[LAZY], 1))
    report.judge("memory, Hessian", round(peaks[HESSIAN] + PRODUCTS, 1))

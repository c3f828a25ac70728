"""What `import sassha_fused` costs beyond `import torch`."""

import subprocess
import sys
from pathlib import Path
from statistics import median

ROUNDS = 5
TIMED = """
import time
start = time.perf_counter()
import torch
between = time.perf_counter()
import sassha_fused
print(between - start, time.perf_counter() - between)
"""


def test_import_time(progress, report):
    samples = []
    with progress("import") as done:
        # The first round fills the caches, and is not counted.
        for i in range(ROUNDS + 1):
            printed = subprocess.run(
                [sys.executable, "-c", TIMED], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
            ).stdout
            samples.append([1e3 * float(seconds) for seconds in printed.split()])
            done((i + 1) / (ROUNDS + 1))
    rows = [("", "ms", "range")]
    for name, times in zip(("torch", "sassha_fused beyond it"), zip(*samples[1:])):
        rows.append((name, f"{median(times):.0f}", f"{min(times):.0f} to {max(times):.0f}"))
    report.table(f"import, median of {ROUNDS} processes", rows)
    report.judge("import", median(samples[i][1] for i in range(1, ROUNDS + 1)))

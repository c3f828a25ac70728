"""Prints how far resident memory rises above parameters, gradients and products, in bytes per parameter.

A process of its own (`python -m bench.peak_memory`), so that no memory freed earlier is used again unseen. Linux only.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.contenders import Problem, sassha
from bench.shapes import MODELS


def resident(which: str) -> int:
    """VmRSS (now) or VmHWM (the most so far), in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{which}:\s+(\d+) kB", status).group(1))


def printed_by(module: str) -> dict[str, Any]:
    """What a module that measures memory prints, in a process of its own."""
    # glibc would keep what was freed in earlier steps; at a fixed threshold it hands every large tensor back
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run([sys.executable, "-m", module], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout)


def main() -> None:
    warm_up = sassha(Problem(((8,),)), "cpu")
    warm_up.round()
    problem = Problem(MODELS["GPT-2 small"])
    contender = sassha(problem, "cpu")
    before = resident("VmRSS")
    peaks: dict[str, float] = {}
    for _ in range(4):
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        kind, _ = contender.step()
        peaks[kind] = max(peaks.get(kind, 0.0), (resident("VmHWM") - before) / problem.count)
    print(json.dumps(peaks))


if __name__ == "__main__":
    main()

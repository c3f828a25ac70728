"""Prints how far resident memory rises above parameters, gradients and products, in bytes per parameter.

A process of its own (`python -m bench.peak_memory`), so that no memory freed earlier is used again unseen. Linux only.
"""

import json
import re
from pathlib import Path

from bench.contenders import Problem, sassha
from bench.shapes import MODELS


def resident(which: str) -> int:
    """VmRSS (now) or VmHWM (the most so far), in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{which}:\s+(\d+) kB", status).group(1))


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

"""Times contenders in turns within one run, so that a drifting machine slows all of them alike."""

import gc
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import quantiles
from typing import Protocol

Samples = dict[tuple[str, str], list[float]]

WARM_UP_ROUNDS = 1
MIN_ROUNDS = 3


class Contender(Protocol):
    name: str

    def round(self) -> dict[str, float]:
        """Runs once and returns the seconds taken by kind of step."""


def interleaved(contenders: Sequence[Contender], seconds: float, progress: Callable[[float], None]) -> Samples:
    """Rounds over all contenders, each starting with another one, until the first has used its share of `seconds`.

    Slower contenders sit out once they have used up theirs, but for a few rounds. `progress` gets the part done.
    """
    samples: Samples = defaultdict(list)
    used: dict[str, float] = defaultdict(float)
    share = seconds / len(contenders)
    gc.collect()
    gc.disable()
    try:
        rounds = 0
        done = 0.0
        while done < 1:
            first = rounds % len(contenders)
            for contender in (*contenders[first:], *contenders[:first]):
                if rounds >= WARM_UP_ROUNDS + MIN_ROUNDS and used[contender.name] > share:
                    continue
                start = time.perf_counter()
                taken = contender.round()
                used[contender.name] += time.perf_counter() - start
                for kind, seconds_taken in taken.items():
                    if rounds >= WARM_UP_ROUNDS:
                        samples[kind, contender.name].append(seconds_taken)
            rounds += 1
            done = min(used[contenders[0].name] / share, rounds / (WARM_UP_ROUNDS + MIN_ROUNDS))
            progress(min(done, 1))
    finally:
        gc.enable()
    return dict(samples)


def spread(samples: Sequence[float]) -> str:
    """Width of the middle half of the samples over their median; large where the machine was not quiet."""
    first, middle, third = quantiles(samples, n=4)
    return f"{100 * (third - first) / middle:.0f} %"


_replayed = 0.0


def replayed_seconds() -> float:
    """A timer for pytest-benchmark that runs only while `replay` replays samples."""
    return _replayed


def replay(benchmark, samples: Sequence[float]) -> None:
    """Hands samples measured in turns to pytest-benchmark, which itself can only time one contender after another."""
    remaining = iter(samples)

    def advance() -> None:
        global _replayed
        _replayed += next(remaining)

    benchmark.pedantic(advance, rounds=len(samples))

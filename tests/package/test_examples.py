"""The demo of a language model trains, measures and reports; on a tiny text, in seconds."""

from math import log
from pathlib import Path

import pytest

from examples.chargpt import text, train
from examples.chargpt.contenders import contenders
from tests.support.problems import single_threaded

one_thread = pytest.fixture(autouse=True, scope="module")(single_threaded)

STEPS = 30
# What AdamW, a perturbation and the curvature of all elements or of blocks add up to, and less than 1 for the rest.
BYTES = {
    "AdamW, lr 0.005": 8,
    "SAMAdamW, gradient": 12,
    "SAMAdamW, momentum": 12,
    "Sassha": 12,
    "Sassha, blocks of 32": 8 + 4 / 32,
    "MSassha": 12,
    "MSassha, blocks of 32, no backup": 4 + 4 / 32,
}


@pytest.fixture(scope="module")
def runs() -> dict[str, train.Run]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "BATCH", 2)
        patch.setattr(text, "VALIDATION_BATCHES", 2)
        return train.train(contenders(), text.of_string("in the beginning " * 100), STEPS, 0.02, 0, lambda: None)


@pytest.mark.parametrize("name", BYTES)
def test_every_optimizer_learns(runs: dict[str, train.Run], name: str) -> None:
    characters = len(set("in the beginning "))
    assert runs[name].final < 0.95 * log(characters)


@pytest.mark.parametrize("name", BYTES)
def test_the_state_is_as_large_as_the_readme_says(runs: dict[str, train.Run], name: str) -> None:
    state = runs[name].state_bytes / runs[name].parameters
    assert BYTES[name] <= state < BYTES[name] + 0.2


def test_the_rate_warms_up_and_falls_to_nothing() -> None:
    shares = [train.schedule(step, 100) for step in range(101)]
    assert shares[:11] == sorted(shares[:11]) and shares[10:] == sorted(shares[10:], reverse=True)
    assert shares[0] > 0 and max(shares) == 1 and shares[100] == pytest.approx(0)


def test_the_report_compares_with_the_best_adamw(tmp_path: Path) -> None:
    report = pytest.importorskip("examples.chargpt.report", exc_type=ImportError)

    def run(loss: float, seconds: float) -> train.Run:
        return train.Run(parameters=10, losses={1: 4.0, 2: loss}, seconds=seconds, state_bytes=80)

    both = {name: [run(1.8, 2.0), run(1.9, 2.0)] for name in contenders([0.005, 0.01])}
    both["AdamW, lr 0.01"] = [run(1.7, 2.0), run(1.8, 2.0)]
    both["MSassha"] = [run(1.6, 3.0), run(1.85, 3.0)]
    report.save(both, tmp_path)
    (row,) = [line for line in report.table(both).splitlines() if line.startswith("MSassha  ")]
    assert row.split() == ["MSassha", "1.600", "1.850", "1.725", "1.50", "8.0"]
    assert "MSassha ends below AdamW, lr 0.01 on 1 of 2 seeds: -0.100, +0.050" in report.verdict(both)
    assert len((tmp_path / "losses.csv").read_text().splitlines()) == 1 + 2 * 2 * len(both)
    assert (tmp_path / "losses.png").stat().st_size > 10_000

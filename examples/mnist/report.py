"""The comparison as a table, as CSV files and as a picture."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import matplotlib
import numpy as np

from examples.mnist.contenders import FUSED, LOOP
from examples.mnist.train import Run
from examples.tables import aligned, save_csv

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator

Runs = dict[str, list[Run]]  # of each optimizer, one run per seed

STYLES = {
    FUSED: {"color": "#0072b2", "linewidth": 2.6},
    LOOP: {"color": "#7cc4f0", "linewidth": 1.4, "linestyle": (0, (4, 2))},
    "AdamW": {"color": "#d55e00", "linewidth": 1.6},
    "SGD": {"color": "#009e73", "linewidth": 1.6},
}


def table(runs: Runs) -> str:
    header = ("", "test accuracy", "test loss", "optimizer, ms/step", "share of step", "whole step, ms", "state memory")
    return aligned([header, *(_row(name, of_seed) for name, of_seed in runs.items())])


def _row(name: str, runs: Sequence[Run]) -> tuple[str, ...]:
    accuracies = [100 * run.accuracies[-1] for run in runs]
    spread = f" ± {stdev(accuracies):.2f}" if len(runs) > 1 else ""
    own = mean(run.stopwatch.own for run in runs)
    whole = mean(run.stopwatch.whole for run in runs)
    state = runs[0].state_bytes
    return (
        name,
        f"{mean(accuracies):.2f}{spread} %",
        f"{mean(run.test_losses[-1] for run in runs):.3f}",
        f"{own:.3f}",
        f"{100 * own / whole:.1f} %",
        f"{whole:.1f}",
        f"{state / 1e6:.2f} MB ({state / runs[0].parameters:.1f} B/parameter)",
    )


def distance(first: Sequence[Run], second: Sequence[Run]) -> str:
    """How far runs from the same seeds are apart."""
    pairs = list(zip(first, second))
    weights = max((a.weights - b.weights).abs().max().item() for a, b in pairs)
    losses = max(abs(x - y) for a, b in pairs for x, y in zip(a.losses, b.losses))
    return (
        f"final weights {weights:.1e}, loss of any step {losses:.1e}" if weights or losses else "nothing, bit for bit"
    )


def save(runs: Runs, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    each = [(name, seed, run) for name, of_seed in runs.items() for seed, run in enumerate(of_seed)]
    save_csv(
        folder / "summary.csv",
        ("optimizer", "seed", "test_accuracy", "test_loss", "optimizer_ms", "step_ms", "state_bytes"),
        (
            (
                name,
                seed,
                run.accuracies[-1],
                run.test_losses[-1],
                run.stopwatch.own,
                run.stopwatch.whole,
                run.state_bytes,
            )
            for name, seed, run in each
        ),
    )
    save_csv(
        folder / "curves.csv",
        ("optimizer", "seed", "epoch", "train_loss", "test_loss", "test_accuracy"),
        (
            (name, seed, epoch, *values)
            for name, seed, run in each
            for epoch, values in enumerate(zip(run.train_losses, run.test_losses, run.accuracies), start=1)
        ),
    )
    _save_picture(runs, folder / "curves.png")


def _save_picture(runs: Runs, path: Path) -> None:
    plt.rcParams.update({"font.size": 10, "legend.fontsize": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (training, testing, accuracy) = plt.subplots(1, 3, figsize=(13, 4.8), layout="constrained")
    for name, of_seed in runs.items():
        _draw(training, name, [run.train_losses for run in of_seed])
        _draw(testing, name, [run.test_losses for run in of_seed])
        _draw(accuracy, name, [[100 * value for value in run.accuracies] for run in of_seed])

    for axes, title in ((training, "training loss"), (testing, "test loss"), (accuracy, "test accuracy, %")):
        axes.set(xlabel="epoch", title=title)
        axes.legend(title="at the end", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
    for axes in (training, testing):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    accuracy.set_yscale("function", functions=(_stretched, _unstretched))
    accuracy.set_yticks([10, 50, 80, 90, 95, 97, 98])
    for axes in (training, testing, accuracy):
        axes.grid(alpha=0.25)

    seeds = len(runs[FUSED])
    title = "A small ResNet on 1,000 MNIST digits, tested on 4,000"
    figure.suptitle(f"{title}: mean and range of {seeds} seeds" if seeds > 1 else title)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def _stretched(accuracy: np.ndarray) -> np.ndarray:
    """The logarithm of the distance to 100 %, or else the upper end would be one line."""
    return -np.log(100.5 - np.minimum(accuracy, 100))


def _unstretched(height: np.ndarray) -> np.ndarray:
    return 100.5 - np.exp(-height)


def _draw(axes: plt.Axes, name: str, of_seed: list[list[float]]) -> None:
    epochs = range(1, len(of_seed[0]) + 1)
    final = mean(values[-1] for values in of_seed)
    label = f"{name}: {final:.{4 if final < 10 else 2}f}"
    axes.plot(epochs, [mean(values) for values in zip(*of_seed)], label=label, **STYLES[name])
    if len(of_seed) > 1:
        lowest, highest = zip(*((min(values), max(values)) for values in zip(*of_seed)))
        axes.fill_between(epochs, lowest, highest, color=STYLES[name]["color"], alpha=0.12, linewidth=0)

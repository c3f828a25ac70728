"""The comparison as a table, as a CSV file and as a picture."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import matplotlib

from examples.chargpt.contenders import ADAMW, MSASSHA, SAM_ADAMW
from examples.chargpt.train import Run
from examples.tables import aligned, save_csv

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Runs = dict[str, list[Run]]  # of each optimizer, one run per seed


def loss(runs: Sequence[Run]) -> float:
    return mean(run.final for run in runs)


def seconds(runs: Sequence[Run]) -> float:
    return mean(run.seconds for run in runs)


def adamws(runs: Runs) -> list[str]:
    return [name for name in runs if name.startswith(ADAMW)]


def best_adamw(runs: Runs) -> str:
    return min(adamws(runs), key=lambda name: loss(runs[name]))


def times(runs: Runs) -> dict[str, float]:
    """Of each optimizer the time of its steps over that of AdamW's."""
    unit = mean(seconds(runs[name]) for name in adamws(runs))
    return {name: seconds(of_seed) / unit for name, of_seed in runs.items()}


def table(runs: Runs) -> str:
    seeds = range(len(runs[MSASSHA]))
    header = ("", *(f"loss, seed {seed}" for seed in seeds), "mean", "time / AdamW's", "state, bytes/parameter")
    relative = times(runs)
    rows = (
        (
            name,
            *(f"{run.final:.3f}" for run in of_seed),
            f"{loss(of_seed):.3f}",
            f"{relative[name]:.2f}",
            f"{of_seed[0].state_bytes / of_seed[0].parameters:.1f}",
        )
        for name, of_seed in runs.items()
    )
    return aligned([header, *rows])


def verdict(runs: Runs) -> str:
    """Whether the two that go along the momentum end below AdamW, and by how much."""
    rival = best_adamw(runs)
    lines = []
    for name in (SAM_ADAMW, MSASSHA):
        differences = [run.final - other.final for run, other in zip(runs[name], runs[rival])]
        below = sum(difference < 0 for difference in differences)
        by = ", ".join(f"{difference:+.3f}" for difference in differences)
        lines.append(f"{name} ends below {rival} on {below} of {len(differences)} seeds: {by}")
    return "\n".join(lines)


def save(runs: Runs, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_csv(
        folder / "losses.csv",
        ("optimizer", "seed", "step", "validation_loss", "seconds_in_all", "state_bytes"),
        (
            (name, seed, step, value, run.seconds, run.state_bytes)
            for name, of_seed in runs.items()
            for seed, run in enumerate(of_seed)
            for step, value in run.losses.items()
        ),
    )
    _save_picture(runs, folder / "losses.png")


def _save_picture(runs: Runs, path: Path) -> None:
    """Of AdamW's learning rates the best alone."""
    plt.rcParams.update({"font.size": 10, "legend.fontsize": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (by_steps, by_time) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained", sharey=True)
    relative = times(runs)
    steps = list(runs[MSASSHA][0].losses)
    shown = [name for name in runs if name not in adamws(runs) or name == best_adamw(runs)]
    for name in shown:
        curve = [mean(run.losses[step] for run in runs[name]) for step in steps]
        (line,) = by_steps.plot(steps, curve, marker=".", label=f"{name}: {curve[-1]:.3f}")
        by_time.plot([relative[name] * step / steps[-1] for step in steps], curve, marker=".", color=line.get_color())
    by_steps.set(xlabel="steps", ylabel="validation loss")
    by_time.set(xlabel="time, in that of AdamW's training")
    for axes in (by_steps, by_time):
        axes.grid(alpha=0.25)
    figure.legend(title="at the end", loc="outside lower center", ncols=3, frameon=False)
    seeds = len(runs[MSASSHA])
    figure.suptitle("A character GPT on the King James text" + (f": mean of {seeds} seeds" if seeds > 1 else ""))
    figure.savefig(path, dpi=160)
    plt.close(figure)

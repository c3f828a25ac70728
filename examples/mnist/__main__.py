"""Trains a small ResNet on MNIST digits with Sassha, fused and as a per-tensor loop, with AdamW and with SGD.

Run it from the root of the repository: `python -m examples.mnist`. It prints a table and saves a picture and CSV files.
"""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from examples.mnist import report
from examples.mnist.contenders import CONTENDERS, EAGER, FUSED, LOOP, eager, fused, loop
from examples.mnist.data import load
from examples.mnist.train import BATCH, Run, train

RESULTS = Path(__file__).parent / "results"
CHECK_EPOCHS = 3
THREADS = 1  # the network is small; and so the curves do not depend on the number of cores


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.mnist", description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=1, help="runs of each optimizer, from seeds 0, 1, ...")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the picture and the CSV files")
    arguments = parser.parse_args()

    torch.set_num_threads(THREADS)
    train_set, test_set = load()
    runs: report.Runs = {name: [] for name in CONTENDERS}
    checks = {
        (FUSED, "float32"): fused,
        (EAGER, "float32"): eager,
        (FUSED, "float64"): fused,
        (LOOP, "float64"): loop,
    }
    checked: list[list[Run]] = []
    with tqdm(total=len(runs) * arguments.seeds * arguments.epochs + len(checks) * CHECK_EPOCHS, unit="epoch") as bar:

        def epoch_done(run: Run) -> None:
            bar.set_postfix_str(f"accuracy {100 * run.accuracies[-1]:.1f} %", refresh=False)
            bar.update()

        for seed in range(arguments.seeds):
            for name, contender in CONTENDERS.items():
                bar.set_description(name)
                runs[name].append(train(contender, train_set, test_set, arguments.epochs, seed, epoch_done))
        for (name, dtype), contender in checks.items():
            bar.set_description(f"{name} in {dtype}")
            digits = train_set.to(getattr(torch, dtype))
            checked.append([train(contender, digits, digits, CHECK_EPOCHS, 0, epoch_done)])

    report.save(runs, arguments.output)
    print(
        f"""
{len(train_set.labels)} digits to train on, {len(test_set.labels)} to test, {runs[FUSED][0].parameters} parameters, \
{arguments.epochs} epochs in batches of {BATCH}, {THREADS} thread

{report.table(runs)}

From the same seed, {FUSED} is apart
  from {EAGER} in float32, {CHECK_EPOCHS} epochs, by {report.distance(*checked[:2])}
  from {LOOP} in float64, {CHECK_EPOCHS} epochs, by {report.distance(*checked[2:])}
  from {LOOP} in float32, {arguments.epochs} epochs, by {report.distance(runs[FUSED], runs[LOOP])}, \
as training amplifies the last bit, in which the loop rounds differently

Optimizer: outside forward, backward and Hessian products, averaged over lazy and Hessian steps, the first of several \
epochs left out.
State memory: the most during a step. Curves: {arguments.output / "curves.png"}; numbers: CSV files beside it."""
    )


if __name__ == "__main__":
    main()

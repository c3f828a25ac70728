"""Trains a small character GPT on the King James text with AdamW and with members of the family.

Run it from the root of the repository: `python -m examples.chargpt`. It prints a table and saves a picture and a CSV
file.
"""

import argparse
from pathlib import Path

from examples.chargpt import report
from examples.chargpt.contenders import ADAMW_LR, MSASSHA
from examples.chargpt.seeds import THREADS, train_seeds
from examples.chargpt.text import BATCH, CONTEXT, load

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.chargpt", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=2, help="runs of each optimizer, from seeds 0, 1, ...")
    parser.add_argument("--deviation", type=float, default=0.02, help="of the embeddings at the start; GPT-2's is .02")
    parser.add_argument("--adamw-lr", type=float, nargs="+", default=[ADAMW_LR], help="the best of them counts")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the picture and the CSV file")
    arguments = parser.parse_args()

    text = load()
    runs = train_seeds(arguments.steps, arguments.deviation, arguments.seeds, arguments.adamw_lr)
    report.save(runs, arguments.output)
    print(
        f"""
{len(text.train)} characters to train on, {text.characters} different ones; {runs[MSASSHA][0].parameters} parameters; \
{arguments.steps} steps of {BATCH} x {CONTEXT} characters; {THREADS} thread for each seed; embeddings \
start with a deviation of {arguments.deviation}

{report.table(runs)}

{report.verdict(runs)}

Time: of whole steps, forward and backward included. State: what the optimizer keeps.
Curves: {arguments.output / "losses.png"}; numbers: {arguments.output / "losses.csv"}"""
    )


if __name__ == "__main__":
    main()

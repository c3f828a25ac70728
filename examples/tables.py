"""Tables, printed and as CSV files."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows below a header: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def save_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])

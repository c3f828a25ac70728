"""CONTRIBUTING.md names every file: whoever looks for one finds its row, and whoever follows a row finds a file."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("sassha_fused", "triton_kernels", "csrc", "bench", "docs", "tests/support")


def named() -> set[str]:
    """The paths in the first columns of the tables of files; those of folders end with a slash."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text.split("\n## Where things are\n", 1)[1].split("\n## ", 1)[0]
    # Headings and rules name no path: a table's rows follow its rule.
    tables = re.findall(r"^\|[-|]+\|\n((?:\|.*\n)+)", section, flags=re.MULTILINE)
    cells = [row.split("|")[1] for table in tables for row in table.splitlines()]
    return {path for cell in cells for path in re.findall(r"`(.+?)`", cell)}


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """Files under version control, and those that have just been written and not yet added."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *FOLDERS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("not a checkout of the repository")
    files = [file for file in done.stdout.splitlines() if (ROOT / file).exists()]
    assert len(files) > len(FOLDERS)
    return files


def test_every_file_has_a_row_of_its_own_or_of_its_folder(tracked: list[str]) -> None:
    paths = named()
    folders = tuple(path for path in paths if path.endswith("/"))
    assert [file for file in tracked if file not in paths and not file.startswith(folders)] == []


def test_every_path_in_the_table_exists() -> None:
    paths = named()
    assert paths
    wrong = [path for path in paths if not (ROOT / path).exists() or (ROOT / path).is_dir() != path.endswith("/")]
    assert [path for path in wrong if not (ROOT / path).is_symlink()] == []


@pytest.mark.parametrize("folders, most", [(("sassha_fused", "triton_kernels"), 300), (("tests",), 500)], ids=str)
def test_a_file_fits_on_a_few_screens(folders: tuple[str, ...], most: int) -> None:
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    assert files
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in files}
    assert {file: length for file, length in lengths.items() if length > most} == {}

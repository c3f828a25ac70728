"""Faults planted in copies of the sources, which the tests of these must see (tests only)."""

from pathlib import Path

# What pytest returns where a test has failed; all above says that none was run.
FAILED = 1
# To write down why a test failed, as pytest does, takes longer than most of the tests.
UNEXPLAINED = "--tb=no"

# Names a folder with a copy of triton_kernels, for planted.py.
KERNELS_VARIABLE = "SASSHA_TEST_TRITON_KERNELS"


def plant(file: Path, right: str, wrong: str) -> None:
    """Puts what is wrong in the place of what is right, which stands in the file once."""
    text = file.read_text()
    assert text.count(right) == 1, f"{file.name} has not exactly one {right!r}"
    file.write_text(text.replace(right, wrong))

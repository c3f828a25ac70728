"""Every planted fault finds what it replaces: told in the quick tests, not only where each is compiled and run."""

import pytest

pytest.importorskip("triton")

from tests.machine import test_planted_faults, test_triton_faults
from tests.support.emulation import ROOT

PLACES = [
    *((ROOT / "csrc/cuda" / fault.file, fault.right) for fault in test_planted_faults.FAULTS.values()),
    *((ROOT / f"triton_kernels/{fault.file}.py", fault.right) for fault in test_triton_faults.FAULTS.values()),
]


def test_what_a_fault_replaces_stands_in_its_file_once() -> None:
    assert [(file.name, right) for file, right in PLACES if file.read_text().count(right) != 1] == []

"""Tests in processes of their own that have torch imported already: each is a fork of one that waits for work.

Only what is loaded after the fork may differ: a fork is for libraries and environments that the tests read when they
run. What has to be there from the start, as a preloaded library, takes a process (test_emulation.run_tests).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import IO, NoReturn, cast

ROOT = Path(__file__).resolve().parents[2]


class Forks:
    """A process that runs pytest in forks of itself, one at a time."""

    def __init__(self) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("COVERAGE_", "PYTEST_"))}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            cwd=ROOT,
            # In CI the examples are the same in every run, and none is kept. No thread may run before a fork. The
            # plugins that pytest would find installed take longer than a test.
            env=inherited | {"CI": "1", "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs pytest with arguments and environment variables; a negative code is the signal that ended it."""
        with tempfile.TemporaryDirectory() as folder:
            printed = Path(folder) / "printed"
            work = {"arguments": arguments, "variables": variables, "printed": str(printed)}
            to, back = cast(IO[str], self._process.stdin), cast(IO[str], self._process.stdout)
            to.write(json.dumps(work) + "\n")
            to.flush()
            answer = back.readline()
            assert answer, f"the process that forks has ended with code {self._process.wait()}"
            return subprocess.CompletedProcess(arguments, int(answer), printed.read_text(errors="replace"))

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate(timeout=60)


def _child(work: dict[str, object]) -> NoReturn:
    import pytest

    code = 70
    try:
        descriptor = os.open(str(work["printed"]), os.O_WRONLY | os.O_CREAT)
        for standard in (1, 2):
            os.dup2(descriptor, standard)
        os.environ.update(cast(dict[str, str], work["variables"]))
        code = int(pytest.main(cast(list[str], work["arguments"])))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Imports what tests import, then forks for every line of work; writes how each fork ended."""
    import hypothesis  # noqa: F401
    import numpy  # noqa: F401
    import pytest
    import torch

    from tests.support import garbage

    with suppress(ImportError):
        import triton.experimental.gluon  # noqa: F401  (as the first interpreted kernel does)

    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # the tests themselves
        pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "--capture=sys", "tests/operators"])
    garbage.keep()  # or each fork would look through all of torch as it ends
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _child(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


if __name__ == "__main__":
    main()

"""The commands a user types first: what they print, and that the self-test fails where a backend is wrong."""

import sys

import pytest
import torch

from sassha_fused import __main__, __version__, eager, ops, selftest

pytestmark = pytest.mark.slow


@pytest.fixture
def few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "SIZES", (0, 7, 1023))


@pytest.fixture
def few_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without those that are interpreted: of 70,001 elements they take most of a minute."""
    for name in set(ops.BACKENDS) - {"cpu", "eager"}:
        monkeypatch.delitem(ops.BACKENDS, name)


@pytest.fixture
def small(few_sizes: None, few_backends: None) -> None:
    pass


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["sassha_fused", *arguments])
    return __main__.main()


def test_the_bare_command_prints_versions_and_every_backend_with_its_reason(monkeypatch, capsys):
    monkeypatch.setattr(ops, "_EXTENSION_MISSING", "no compiler was found")
    assert run_command(monkeypatch) == 0
    printed = capsys.readouterr().out
    assert __version__ in printed and torch.__version__ in printed
    assert "cpu     not available: no compiler was found" in printed
    assert "eager   available" in printed


@pytest.mark.parametrize("few", ["few_sizes", "few_backends"])
def test_the_self_test_runs_every_operator_on_every_backend_here_and_passes(monkeypatch, capsys, request, few):
    request.getfixturevalue(few)
    assert run_command(monkeypatch, "selftest") == 0
    lines = capsys.readouterr().out.splitlines()
    serving = [backend for backend in ops.BACKENDS.values() if backend.serves(torch.device("cpu"))]
    present = [backend for backend in serving if backend.missing() is None]
    rows = [line for line in lines if "passed" in line and line.startswith("cpu ")]
    assert len(rows) == len(present) * 4 * len(selftest.CASES)
    assert lines[-1] == f"{len(rows)} passed, 0 failed"


@pytest.mark.parametrize("name", ops.NAMES)
def test_the_self_test_fails_where_an_operator_is_wrong(monkeypatch, capsys, small, name):
    right = getattr(eager, name)

    def wrong(*arguments):
        result = right(*arguments)
        if name == "grad_norm":
            return result * (1 + 1e-3)
        place = {"hutchinson_": 1, "block_average_": 2}.get(name)
        written = (arguments[0][4] if place is None else arguments[place]).view(-1)
        written[4:5] += 1e-4 * written[4:5].abs().clamp(min=1) if written.dtype != torch.bfloat16 else 1
        return None

    broken = type("Broken", (), {key: staticmethod(getattr(eager, key)) for key in ops.NAMES})
    setattr(broken, name, staticmethod(wrong))
    monkeypatch.setitem(ops.BACKENDS, "eager", ops.Backend(None, lambda: None, lambda: broken))
    assert run_command(monkeypatch, "selftest") == 1
    printed = capsys.readouterr().out
    failed = [line for line in printed.splitlines() if "FAILED" in line]
    # Those of its own, and those of members, and of steps by blocks, that it takes part in.
    rows = {line.split()[3] for line in failed}
    assert all("eager" in line for line in failed)
    assert name in rows and rows & set(ops.NAMES) <= {name, "block_average_"}


def test_a_backend_that_raises_is_a_failed_row_and_not_the_end_of_the_self_test(monkeypatch, capsys, small):
    def raises(*_):
        raise RuntimeError("no such kernel")

    broken = type("Broken", (), {key: staticmethod(raises) for key in ops.NAMES})
    monkeypatch.setitem(ops.BACKENDS, "eager", ops.Backend(None, lambda: None, lambda: broken))
    assert run_command(monkeypatch, "selftest") == 1
    assert "FAILED RuntimeError: no such kernel" in capsys.readouterr().out

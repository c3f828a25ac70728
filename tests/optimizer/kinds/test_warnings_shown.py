"""Warnings of the model are shown as Python shows them, once, and torch's of create_graph never."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import warnings

import pytest
from torch import Tensor

from tests.support.kinds import all_styles
from tests.support.problems import ALL_STYLES, Problem, single_threaded

pytestmark = pytest.mark.slow

one_thread = pytest.fixture(autouse=True)(single_threaded)


def warn() -> None:
    warnings.warn("the model's own", UserWarning, stacklevel=1)


@all_styles
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_warning_of_the_model_is_shown_once(where: str, style: str) -> None:
    problem = Problem(hessian_interval=1)

    def loss() -> Tensor:
        value = problem.loss()
        if where == "forward":
            warn()
        else:
            value.register_hook(lambda grad: warn())
        return value

    globals().pop("__warningregistry__", None)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        step = ALL_STYLES[style]
        if style in ("standard", "phase"):  # these silence torch by catch_warnings, after which Python shows anew
            step = {"standard": standard, "phase": by_hand}[style]
        for _ in range(20):
            step(problem.opt, loss)
            problem.steps += 1
    assert [str(warning.message) for warning in shown] == ["the model's own"]


def standard(opt, loss):
    def closure() -> Tensor:
        value = loss()
        value.backward(create_graph=opt.hessian_due)
        return value

    return opt.step(closure)


def by_hand(opt, loss):
    opt.zero_grad()
    loss().backward()
    opt.perturb()
    loss().backward(create_graph=opt.hessian_due)
    opt.step()


@pytest.mark.parametrize("action", ["always", "error"])
def test_torchs_warning_of_graphs_is_never_shown(action: str) -> None:
    # In a process of its own: torch shows it once in each.
    code = """
        import warnings
        import torch
        warnings.simplefilter({action!r})
        from torch import nn
        from sassha_fused import Sassha
        from tests.support.problems import Problem
        from tests.optimizer.kinds.test_warnings_shown import by_hand, standard
        problem = Problem(hessian_interval=1)
        for step in (lambda opt, loss: opt.step(loss), standard, by_hand):
            for _ in range(3):
                step(problem.opt, problem.loss)
        problem.opt.check_products(problem.loss)
    """
    code = textwrap.dedent(code).format(action=action)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "create_graph" not in done.stderr and "Warning" not in done.stderr, done.stderr

"""Handlers of signals find w, also where it is worked out from w', and the step goes on as if nothing had been."""

from __future__ import annotations

import signal
from types import FrameType

import pytest
import torch
from torch import Tensor

from tests.support.members import MEMBERS, each_member, trained
from tests.support.problems import assert_same, weights


@each_member
def test_a_handler_finds_w_and_the_step_goes_on_unchanged(member: str) -> None:
    problem, undisturbed = trained(member, 3), trained(member, 4)
    before, seen = weights(problem.params), []
    exact = MEMBERS[member][1].get("exact_restore", True)

    def handler(_: int, __: FrameType | None) -> None:
        assert not problem.opt.perturbed
        seen.append(weights(problem.params))

    def loss() -> Tensor:
        value = problem.loss()
        signal.raise_signal(signal.SIGUSR1)
        return value

    previous = signal.signal(signal.SIGUSR1, handler)
    try:
        problem.opt.zero_grad()
        problem.opt.step(loss)
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert seen
    for found in seen:
        for w, expected in zip(found, before, strict=True):
            torch.testing.assert_close(w, expected, rtol=0, atol=0 if exact else 1e-7)
    assert_same(problem.snapshot()["weights"], undisturbed.snapshot()["weights"])


@each_member
def test_ctrl_c_in_the_closure_leaves_w(member: str) -> None:
    problem = trained(member, 3)
    before = weights(problem.params)

    def loss() -> Tensor:
        value = problem.loss()
        signal.raise_signal(signal.SIGINT)
        return value

    problem.opt.zero_grad()
    with pytest.raises(KeyboardInterrupt):
        problem.opt.step(loss)
    for w, expected in zip(problem.params, before, strict=True):
        atol = 0 if MEMBERS[member][1].get("exact_restore", True) else 1e-7
        torch.testing.assert_close(w.detach(), expected, rtol=0, atol=atol)
    problem.step()

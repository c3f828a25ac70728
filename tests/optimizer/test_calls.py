"""What a lazy step costs on the host, counted in calls: time is for the benchmarks."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import sassha_fused
from sassha_fused import Sassha

PACKAGE = str(Path(sassha_fused.__file__).parent)


def calls_of(run: Callable[[], Any]) -> list[tuple[str, str]]:
    """The package's Python functions that are called, each as its caller's file and its own."""
    calls = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            caller = frame.f_back
            while caller is not None and not caller.f_code.co_filename.startswith(PACKAGE):
                caller = caller.f_back
            calls.append((caller.f_code.co_filename if caller else "", frame.f_code.co_filename))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return calls


def test_a_lazy_step_enters_another_file_of_the_package_fourteen_times_at_most() -> None:
    params = [nn.Parameter(torch.ones(8)) for _ in range(20)]
    opt = Sassha(params, hessian_interval=100)

    def loss() -> torch.Tensor:
        return torch.stack([(p**3).sum() for p in params]).sum()

    for _ in range(3):
        opt.step(loss)
    opt.zero_grad()
    loss().backward()
    calls = calls_of(opt.perturb)
    loss().backward()
    calls += calls_of(opt.step)
    entered = [(caller, callee) for caller, callee in calls if caller and caller != callee]
    assert len(entered) <= 14, entered
    assert len(calls) <= 90  # none of them for each parameter

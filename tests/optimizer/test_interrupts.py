"""Whatever breaks a step, the weights come back bit for bit, and training goes on as if the call had not been made."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sassha_fused
from sassha_fused import Sassha, eager
from sassha_fused.interrupts import uninterrupted
from tests.support.problems import (
    BACKENDS,
    Problem,
    assert_differ,
    assert_same,
    backward,
    continued,
    undisturbed,
    weights,
)

both_backends = pytest.mark.parametrize("backend", BACKENDS)
STEPS = pytest.mark.parametrize("steps", [0, 1, 3], ids=["first step", "lazy step", "Hessian step"])
ERRORS = (ValueError, MemoryError, KeyboardInterrupt)


def refused_step(opt: Sassha) -> None:
    """step() where the second gradients are missing, or somebody has given the step up."""
    with contextlib.suppress(ValueError):
        opt.step()


HEALERS: dict[str, Callable[[Sassha], Any]] = {
    "restore": Sassha.restore,
    "step": refused_step,
    "state_dict": Sassha.state_dict,
}


class Raises(torch.autograd.Function):
    """The identity, until its backward, or the backward of that, is run."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, error: BaseException, twice: bool) -> Tensor:
        ctx.error, ctx.twice = error, twice
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if not ctx.twice:
            raise ctx.error
        return Raises.apply(gradient, ctx.error, False), None, None


def in_forward(loss: Tensor, error: BaseException) -> Tensor:
    raise error


def in_backward(loss: Tensor, error: BaseException) -> Tensor:
    return Raises.apply(loss, error, False)


def in_double_backward(loss: Tensor, error: BaseException) -> Tensor:
    return Raises.apply(loss, error, True).square()


PLACES = {"forward": in_forward, "backward": in_backward}


# ---------------------------------------------------------------------------------------------------------------------
# Errors in the user's code


@both_backends
@STEPS
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("bad_pass", [0, 1])
@pytest.mark.parametrize("place", PLACES)
def test_an_error_in_a_closure_leaves_no_trace(
    backend: str, steps: int, error: type[BaseException], bad_pass: int, place: str
) -> None:
    problem = Problem(backend).train(steps)
    before = weights(problem.params)
    passes = iter(range(2))
    with pytest.raises(error):
        problem.opt.step(lambda: PLACES[place](problem.loss(), error()) if next(passes) == bad_pass else problem.loss())
    assert_same(weights(problem.params), before)
    assert not problem.opt.perturbed
    assert all(param.grad is None for param in problem.params)
    assert_same(problem.train(4).snapshot(), undisturbed(Problem, backend, steps + 4))


@both_backends
@STEPS
@pytest.mark.parametrize("heal", HEALERS)
@pytest.mark.parametrize("place", PLACES)
def test_an_error_in_a_hand_written_loop_is_healed_by_the_next_call(
    backend: str, steps: int, heal: str, place: str
) -> None:
    problem = Problem(backend).train(steps)
    before = weights(problem.params)
    problem.perturb()
    assert_differ(weights(problem.params), before)
    with pytest.raises(KeyboardInterrupt):
        PLACES[place](problem.loss(), KeyboardInterrupt()).backward(create_graph=problem.opt.hessian_due)
    HEALERS[heal](problem.opt)
    assert_same(weights(problem.params), before)
    assert_same(problem.train(4, "phase").snapshot(), undisturbed(Problem, backend, steps + 4))


@both_backends
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("samples", [1, 2])
def test_an_error_in_the_hessian_product_leaves_no_trace(
    backend: str, steps: int, error: type[BaseException], samples: int
) -> None:
    problem, plain = (Problem(backend, hessian_samples=samples).train(steps) for _ in range(2))
    before = weights(problem.params)
    with pytest.raises(error):
        problem.opt.step(lambda: in_double_backward(problem.loss(), error()))
    assert_same(weights(problem.params), before)
    assert_same(problem.train(4).snapshot(), plain.train(4).snapshot())


@both_backends
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("heal", HEALERS)
@pytest.mark.parametrize("first", ["step", "restore", "state_dict"])
def test_a_failed_hessian_product_in_a_hand_written_loop_is_healed_by_the_next_call(
    backend: str, steps: int, heal: str, first: str
) -> None:
    problem = Problem(backend).train(steps)
    before = weights(problem.params)
    problem.perturb()
    backward(in_double_backward(problem.loss(), MemoryError()), create_graph=True)
    with contextlib.suppress(MemoryError) if first != "step" else pytest.raises(MemoryError):
        HEALERS[first](problem.opt)
    if first != "step":
        assert_same(weights(problem.params), before)
    problem.opt.zero_grad()
    HEALERS[heal](problem.opt)
    assert_same(weights(problem.params), before)
    assert_same(problem.train(4, "phase").snapshot(), undisturbed(Problem, backend, steps + 4))


@both_backends
def test_a_state_dict_can_be_saved_right_after_a_hessian_product_ran_out_of_memory(backend: str) -> None:
    problem = Problem(backend).train(3)
    before = problem.snapshot()
    problem.perturb()
    backward(in_double_backward(problem.loss(), MemoryError()), create_graph=True)
    with pytest.raises(MemoryError):
        problem.opt.step()
    state = problem.opt.state_dict()
    assert_same(weights(problem.params), before["weights"])
    assert_same(state["state"], before["state"])


def test_a_function_without_double_backward_is_reported_and_leaves_no_trace() -> None:
    problem = Problem()
    before = weights(problem.params)

    def distances() -> Tensor:
        x = problem.loss() * torch.arange(6.0).reshape(3, 2)
        return torch.cdist(x, x + 1).sum()

    with pytest.raises(RuntimeError, match=r"derivative for .*cdist.* is not implemented"):
        problem.opt.step(distances)
    assert_same(weights(problem.params), before)
    assert_same(problem.train(4).snapshot(), undisturbed(Problem, "cpu", 4))


# ---------------------------------------------------------------------------------------------------------------------
# Errors in the operators


class Breakdown(Exception):
    """What a broken operator raises."""


@contextlib.contextmanager
def breaking(function: str, call: int, before: bool = True) -> Iterator[None]:
    """The function of the eager backend raises in its call-th call, before or after its work."""
    original = getattr(eager, function)
    calls = iter(range(1000))

    def broken(*args: Any) -> Any:
        now = next(calls) == call
        if now and before:
            raise Breakdown
        result = original(*args)
        if now:
            raise Breakdown
        return result

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Breakdown):
        patch.setattr(eager, function, broken)
        yield


# The problem has two buckets, and so two calls of each operator per pass.
BEFORE_ANY_UPDATE = [
    ("grad_norm", 0, True),
    ("grad_norm", 1, False),
    ("grad_norm", 2, False),
    ("perturb_", 0, True),
    ("perturb_", 1, True),
    ("rademacher_", 1, True),
    ("hutchinson_", 3, False),
    ("update_", 0, True),
]


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name, call, before", BEFORE_ANY_UPDATE)
def test_an_operator_that_breaks_leaves_no_trace(steps: int, name: str, call: int, before: bool) -> None:
    if steps == 1 and name in ("rademacher_", "hutchinson_"):
        return  # lazy steps do not call them
    problem, plain = (Problem("eager", hessian_samples=2).train(steps) for _ in range(2))
    start = weights(problem.params)
    with breaking(name, call, before):
        problem.step()
    assert_same(weights(problem.params), start)
    assert_same(problem.train(4).snapshot(), plain.train(4).snapshot())


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("heal", ["restore", "state_dict"])
@pytest.mark.parametrize("name, call, before", BEFORE_ANY_UPDATE[3:])
def test_an_operator_that_breaks_in_a_hand_written_loop_is_healed(
    steps: int, heal: str, name: str, call: int, before: bool
) -> None:
    if steps == 1 and name in ("rademacher_", "hutchinson_"):
        return  # lazy steps do not call them
    problem, plain = (Problem("eager", hessian_samples=2).train(steps) for _ in range(2))
    start = weights(problem.params)
    with breaking(name, call, before):
        problem.step("phase")
    with contextlib.suppress(RuntimeError):  # the product may be gone; the weights must not be
        HEALERS[heal](problem.opt)
    assert_same(weights(problem.params), start)
    assert_same(problem.train(4, "phase").snapshot(), plain.train(4, "phase").snapshot())


@pytest.mark.parametrize("style", ["closure", "phase"])
@pytest.mark.parametrize("steps", [1, 3])
def test_running_out_of_memory_anywhere_in_an_operator_leaves_the_weights_restored(style: str, steps: int) -> None:
    problem = Problem("eager").train(steps)
    start = weights(problem.params)
    parts = 4 + 3 * 4  # what eager works on: 4 backups in perturb_, and 3 views for each of 4 parameters in update_
    for call in range(parts):
        with breaking("view_of", call):
            problem.step(style)
        if style == "phase":
            problem.opt.restore()
        assert_same(weights(problem.params), start, f"call {call}")
    problem.step(style)
    assert_differ(weights(problem.params), start)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("call, before", [(0, False), (1, True)])
def test_a_break_between_two_updates_restores_the_weights_and_keeps_the_counts_in_step(
    steps: int, call: int, before: bool
) -> None:
    problem = Problem("eager").train(steps)
    start = weights(problem.params)
    with breaking("update_", call, before):
        problem.step()
    assert_same(weights(problem.params), start)
    # What is in the state is what the schedule follows: a restart from it goes the same way.
    restarted = continued(problem, problem.opt.state_dict(), backend="eager")
    assert_same(problem.train(4).snapshot()["state"], restarted.train(4).snapshot()["state"])
    assert_same(weights(problem.params), weights(restarted.params))


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("call, before", [(0, False), (1, True), (1, False)])
def test_a_break_between_two_updates_restores_weights_that_were_at_w(call: int, before: bool, restored: bool) -> None:
    problem = Problem("eager", rho=0.2 if restored else 0.0).train(1)
    start = weights(problem.params)
    problem.opt.zero_grad()
    problem.loss().backward()
    if restored:
        problem.opt.perturb()
        backward(problem.loss(), create_graph=problem.opt.hessian_due)
        problem.opt.restore()
    with breaking("update_", call, before):
        problem.opt.step()
    assert_same(weights(problem.params), start)
    state = problem.opt.state_dict()["state"]
    problem.opt.zero_grad()
    problem.train(1)
    assert [int(problem.opt.state[param]["step"]) for param in problem.params] == [
        int(s["step"]) + 1 for s in state.values()
    ]


@both_backends
@pytest.mark.parametrize("name, value", [("lr", None), ("weight_decay", "a"), ("betas", (0.9, None)), ("rho", None)])
def test_a_hyperparameter_spoilt_between_steps_is_named_before_anything_changes(
    backend: str, name: str, value: Any
) -> None:
    problem = Problem(backend).train(1)
    good, before = problem.opt.param_groups[1][name], problem.snapshot()
    problem.opt.param_groups[1][name] = value
    with pytest.raises((TypeError, ValueError), match=name):
        problem.step()
    problem.opt.param_groups[1][name] = good
    assert_same(problem.snapshot(), before)
    assert_same(problem.train(3).snapshot(), undisturbed(Problem, backend, 4))


@both_backends
def test_running_out_of_memory_for_the_state_can_be_mended(backend: str) -> None:
    for call in range(6):
        problem = Problem(backend)
        calls = iter(range(1000))
        original = torch.zeros

        def scarce(*args: Any, **options: Any) -> Tensor:
            if next(calls) == call:
                raise MemoryError
            return original(*args, **options)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(torch, "zeros", scarce)
            problem.step()
        assert_same(problem.train(4).snapshot(), undisturbed(Problem, backend, 4))


# ---------------------------------------------------------------------------------------------------------------------
# SIGINT


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]


class AtW:
    """Weights that never leave w."""

    perturbed = False

    def back_at_w(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


@contextlib.contextmanager
def handled(number: int, handler: Any) -> Iterator[None]:
    """The handler takes this signal; at the end it is the one that still does."""
    previous = signal.signal(number, handler)
    try:
        yield
        assert signal.getsignal(number) == handler
    finally:
        signal.signal(number, previous)


def test_a_block_that_must_not_be_interrupted_is_finished_first() -> None:
    done, weights = [], AtW()
    with pytest.raises(KeyboardInterrupt), uninterrupted(weights):
        signal.raise_signal(signal.SIGINT)
        done.append(True)
    assert done == [True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("number", SIGNALS)
def test_the_users_own_handler_gets_the_signal(number: int) -> None:
    caught, weights = [], AtW()
    with handled(number, lambda number, frame: caught.append(number)):
        with uninterrupted(weights):
            signal.raise_signal(number)
            assert not caught
        assert caught == [number]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_handlers_of_the_system_are_left_alone(handler: signal.Handlers, number: int) -> None:
    weights = AtW()
    with handled(number, handler):
        with uninterrupted(weights):
            assert signal.getsignal(number) is handler
        problem = Problem().train(1)
        problem.perturb()
        assert signal.getsignal(number) is handler
        problem.opt.restore()
        assert_same(problem.train(1).snapshot(), undisturbed(Problem, "cpu", 2))


def test_steps_run_in_other_threads_too() -> None:
    problem = Problem()
    thread = threading.Thread(target=problem.train, args=(4,))
    thread.start()
    thread.join()
    assert_same(problem.snapshot(), undisturbed(Problem, "cpu", 4))


PACKAGE = os.path.dirname(sassha_fused.__file__)
Line = tuple[str, int]


@contextlib.contextmanager
def tracing(visit: Callable[[Line], None]) -> Iterator[None]:
    """Calls visit before every line of the package that is run."""

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            visit((os.path.basename(frame.f_code.co_filename), frame.f_lineno))
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(previous)


def ctrl_c_at(line: Line, reached: list[Line]) -> Callable[[Line], None]:
    """Ctrl-C when this line is reached for the first time."""

    def visit(now: Line) -> None:
        if now == line and not reached:
            reached.append(now)
            signal.raise_signal(signal.SIGINT)

    return visit


class Alternating(Problem):
    """Every second step is a Hessian step."""

    def __init__(self, backend: str = "cpu") -> None:
        super().__init__(backend, hessian_interval=2)


@pytest.mark.parametrize("style, start", [("closure", 0), ("closure", 1), ("phase", 0)])
def test_ctrl_c_at_any_line_of_the_package_takes_a_whole_step_or_none(style: str, start: int) -> None:
    trajectory = [undisturbed(Alternating, "cpu", t)["weights"] for t in range(4)]
    lines: dict[Line, None] = {}
    with tracing(lines.setdefault):
        Alternating().train(3, style)
    bad: list[str] = []
    for line in lines:
        problem = Alternating().train(start, style)
        reached: list[Line] = []
        with contextlib.suppress(KeyboardInterrupt), tracing(ctrl_c_at(line, reached)):
            problem.train(3 - start, style)
        if not reached:
            continue
        try:
            problem.opt.restore()
            taken = [t for t, at in enumerate(trajectory) if torch.equal(problem.params[0], at[0])]
            assert len(taken) == 1, "the weights are of no whole number of steps"
            assert_same(weights(problem.params), trajectory[taken[0]])
            problem.steps = taken[0]
            assert_same(problem.train(4 - taken[0], style).snapshot(), undisturbed(Alternating, "cpu", 4))
        except Exception as error:
            bad.append(f"{line[0]}:{line[1]}: {str(error)[:120]!r}")
    assert len(lines) > 100
    assert not bad, "\n".join(bad)


def test_a_second_ctrl_c_while_the_first_is_handled_does_not_leave_the_weights_perturbed() -> None:
    start = undisturbed(Problem, "cpu", 1)["weights"]

    def interrupted_twice(visit: Callable[[Line], None]) -> Problem:
        """A step cut off in its second pass, and again where visit says."""
        problem = Problem().train(1)
        passes = iter(range(2))
        with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as stack:

            def loss() -> Tensor:
                if next(passes) == 0:
                    return problem.loss()
                stack.enter_context(tracing(visit))
                raise KeyboardInterrupt

            problem.opt.step(loss)
        problem.opt.restore()
        return problem

    lines: dict[Line, None] = {}
    assert_same(weights(interrupted_twice(lines.setdefault).params), start)
    assert lines
    for line in lines:
        reached: list[Line] = []
        problem = interrupted_twice(ctrl_c_at(line, reached))
        assert reached
        assert_same(weights(problem.params), start, str(line))


TRAINING = """
    import signal, sys
    import torch
    from tests.support.problems import Problem, assert_same
    torch.set_num_threads(1)
    # Both have taken a step before the first signal can come: before it, weights alone do not tell how many were taken.
    problem, shadow = Problem().train(1), Problem().train(1)
    print("ready", flush=True)
    for trial in range(int(sys.argv[1])):
        try:
            while True:
                problem.step()
        except KeyboardInterrupt:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        while not torch.equal(shadow.params[0], problem.params[0]):
            shadow.step()
            assert shadow.steps <= problem.steps + 1, "weights of no whole number of steps"
        problem.steps = shadow.steps
        assert_same(problem.snapshot(), shadow.snapshot())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        print(shadow.steps, flush=True)
"""


def test_a_real_ctrl_c_leaves_the_weights_of_a_whole_number_of_steps() -> None:
    trials = 20
    command = [sys.executable, "-c", textwrap.dedent(TRAINING), str(trials)]
    root = Path(__file__).parents[2]
    # An interrupt in the tracer of coverage would leave its lock taken for good.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, env=environment, text=True) as process:
        assert process.stdout is not None
        watchdog = threading.Timer(120, process.kill)  # a child that hangs must not hang the suite
        watchdog.start()
        answers = [process.stdout.readline()]
        for _ in range(trials):
            if not answers[-1]:
                break
            time.sleep(random.uniform(0.005, 0.05))
            process.send_signal(signal.SIGINT)
            answers.append(process.stdout.readline())
        assert process.wait() == 0
        watchdog.cancel()
    assert answers[0] == "ready\n"
    assert int(answers[-1]) > trials


def test_an_optimizer_in_trouble_can_be_dropped() -> None:
    w = nn.Parameter(torch.ones(3))
    opt = Sassha([w])
    (w**3).sum().backward()
    opt.perturb()
    del opt
    other = Sassha([w])
    other.step(lambda: (w**3).sum())
    assert other.state[w]["step"] == 1

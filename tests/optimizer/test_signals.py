"""Signals: a step is taken whole or not at all, and handlers, which may save a checkpoint, see w and never w'."""

import contextlib
import copy
import gc
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

from sassha_fused.interrupts import uninterrupted
from tests.support.kinds import assert_clean
from tests.support.lines import Line, signal_at, tracing
from tests.support.problems import STYLES, Problem, assert_differ, assert_same, backward, undisturbed, weights

pytestmark = pytest.mark.slow  # at every line of the package, in every style
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


# ---------------------------------------------------------------------------------------------------------------------
# At every line


class Alternating(Problem):
    """Every second step is a Hessian step."""

    def __init__(self, backend: str = "cpu", **options: Any) -> None:
        super().__init__(backend, hessian_interval=2, **options)


class OnePass(Alternating):
    """One gradient is enough."""

    def __init__(self, backend: str = "cpu") -> None:
        super().__init__(backend, rho=0.0)


def restored(problem: Problem) -> None:
    """A step whose weights go back to w early."""
    problem.perturb()
    backward(problem.loss(), create_graph=problem.opt.hessian_due)
    problem.opt.restore()
    problem.opt.step()
    problem.steps += 1


def given_up(problem: Problem) -> None:
    """A step after one that was given up by who asked for the state."""
    problem.perturb()
    with problem.opt.hessian_pass():
        problem.loss().backward()
    problem.opt.state_dict()
    with contextlib.suppress(ValueError):
        problem.opt.step()
    problem.step("phase")


# Each way of taking two steps: the problem, its steps before, and one step. The first two go through every line that
# they run, once on a Hessian step that makes the state and once on a lazy step; the others through what they add.
Way = tuple[type[Problem], int, Callable[[Problem], Any]]
WAYS: dict[str, Way] = {
    "closure": (Alternating, 0, Problem.step),
    "phase": (Alternating, 1, lambda problem: problem.step("phase")),
    "one pass": (OnePass, 0, Problem.step),
    "restored": (Alternating, 1, restored),
    "given up": (Alternating, 1, given_up),
}


def lines_of(name: str) -> list[Line]:
    """The lines that a way runs and that, but for the first two, none before it does."""
    found: dict[Line, None] = {}
    kind, start, step = WAYS[name]
    problem = kind().train(start)
    with tracing(lambda line: found.setdefault(line)):
        step(problem), step(problem)
    if name not in ("closure", "phase"):
        for other in ("closure", "phase"):
            for line in lines_of(other):
                found.pop(line, None)
    assert len(found) > (100 if name in ("closure", "phase") else 5)
    return list(found)


def disturbed_at_every_line(name: str, number: int, check: Callable[[Problem, list[Any]], None]) -> None:
    """Two steps with a signal at each line in turn; check is given the problem and all snapshots of the usual run."""
    kind, start, step = WAYS[name]
    trajectory = [undisturbed(kind, "cpu", t) for t in range(4)]
    handlers = [signal.getsignal(other) for other in SIGNALS]
    bad: list[str] = []
    for line in lines_of(name):
        problem = kind().train(start)
        reached: list[Line] = []
        try:
            with contextlib.suppress(KeyboardInterrupt, Stop), tracing(signal_at(line, reached, number)):
                while problem.steps < start + 2:
                    step(problem)
            check(problem, trajectory)
            assert [signal.getsignal(other) for other in SIGNALS] == handlers, "handlers are others than before"
            kind().train(1)  # a Hessian step, which undoes what the one that was cut off has left
            assert_clean(())
        except Exception as error:
            bad.append(f"{line[0]}:{line[1]}: {str(error)[:120]!r}")
    assert not bad, "\n".join(bad)


def steps_taken(params: list[Tensor], trajectory: list[Any]) -> int:
    """Of how many steps these are the weights."""
    taken = [t for t, then in enumerate(trajectory) if torch.equal(params[0], then["weights"][0])]
    assert len(taken) == 1, "the weights are of no whole number of steps"
    assert_same(weights(params), trajectory[taken[0]]["weights"])
    return taken[0]


def goes_on(problem: Problem, trajectory: list[Any]) -> None:
    """The weights are of a whole number of steps, and what follows is as usual."""
    problem.steps = steps_taken(problem.params, trajectory)
    style = "phase" if type(problem) is Alternating else "closure"
    if problem.steps < 3:
        problem.opt.zero_grad()
        problem.step(style)
    after = problem.snapshot()
    assert_same(after, trajectory[problem.steps])


class Stop(Exception):
    """What a handler raises."""


@pytest.mark.parametrize("way", ["closure", "phase", "one pass"])
def test_ctrl_c_at_any_line_of_the_package_takes_a_whole_step_or_none(way: str) -> None:
    def check(problem: Problem, trajectory: list[Any]) -> None:
        problem.opt.restore()
        goes_on(problem, trajectory)

    disturbed_at_every_line(way, signal.SIGINT, check)


def every_visit(folder: str, run: Callable[[Problem], Any]) -> Iterator[Callable[[Line], None]]:
    """Ctrl-C at each line of a folder that run comes to, as often as it does."""
    lines: list[Line] = []
    problem = Alternating()
    with tracing(lines.append, folder):
        run(problem)
    assert len(lines) > 10
    for last in range(len(lines)):
        left = iter(range(last, -1, -1))
        yield lambda line, left=left: signal.raise_signal(signal.SIGINT) if next(left, 1) == 0 else None


def test_ctrl_c_as_torch_switches_attention_is_not_lost_and_leaves_it_switched_back() -> None:
    folder = os.path.dirname(torch.nn.attention.__file__)
    for visit in every_visit(folder, lambda problem: problem.train(1)):
        problem = Alternating()
        with pytest.raises(KeyboardInterrupt), tracing(visit, folder):
            problem.train(1)
        assert_clean(())


@pytest.mark.parametrize("style", ["closure", "phase"])
def test_ctrl_c_as_torch_switches_gradients_on_or_off_takes_a_whole_step_or_none(style: str) -> None:
    file = torch.autograd.grad_mode.__file__
    trajectory = [undisturbed(Alternating, "cpu", t) for t in range(4)]
    for visit in every_visit(file, lambda problem: problem.train(2, style)):
        problem = Alternating()
        try:
            with pytest.raises(KeyboardInterrupt), tracing(visit, file):
                problem.train(2, style)
        finally:
            torch.set_grad_enabled(True)  # torch's own switch may stay where it was just put
        problem.opt.restore()
        steps_taken(problem.params, trajectory)


@pytest.mark.parametrize("way", ["phase", "restored", "given up"])
def test_a_handler_that_raises_at_any_line_leaves_w(way: str) -> None:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Stop

    with handled(signal.SIGTERM, stop):
        disturbed_at_every_line(way, signal.SIGTERM, goes_on)


@pytest.mark.parametrize("way", WAYS)
def test_a_handler_that_saves_at_every_line_sees_whole_numbers_of_steps_and_disturbs_nothing(way: str) -> None:
    kind, start, step = WAYS[way]
    problem, trajectory = kind().train(start), [undisturbed(kind, "cpu", t) for t in range(4)]
    saved: dict[Line, list[Any]] = {}
    last: list[Line] = []
    visits: Counter[Line] = Counter()
    saving: list[bool] = []  # it runs lines of the package itself

    def save(number: int, frame: FrameType | None) -> None:
        saving.append(True)
        model, state = copy.deepcopy((problem.model.state_dict(), problem.opt.state_dict()))
        saved.setdefault(last[0], []).append((list(model.values()), state))
        saving.clear()

    def visit(line: Line) -> None:
        if not saving and visits[line] < 2:
            visits[line] += 1
            last[:] = [line]
            signal.raise_signal(signal.SIGUSR1)

    with handled(signal.SIGUSR1, save), tracing(visit):
        step(problem), step(problem)
    assert_same(problem.snapshot(), trajectory[start + 2])
    assert len(saved) > 100
    bad = []
    for line, found in saved.items():
        for params, state in found:
            try:
                taken = steps_taken(params, trajectory)
                expected = trajectory[taken]
                if taken == 0 and state["state"]:  # made already, and all of it 0
                    assert not any(value.any() for of_one in state["state"].values() for value in of_one.values())
                else:
                    assert_same(state["state"], expected["state"])
                assert_same(state["param_groups"], expected["param_groups"])
            except AssertionError as error:
                bad.append(f"{line[0]}:{line[1]}: {str(error)[:120]!r}")
    assert not bad, "\n".join(bad)


# ---------------------------------------------------------------------------------------------------------------------
# Between the passes


class Saves:
    """A handler that saves the weights of these."""

    def __init__(self, *problems: Problem) -> None:
        self.problems, self.saved = problems, []

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.saved.append([weights(problem.params) for problem in self.problems])


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("style", ["closure", "standard", "phase"])
@pytest.mark.parametrize("steps", [1, 2], ids=["lazy step", "Hessian step"])
def test_a_handler_called_in_the_second_forward_pass_sees_w(number: int, style: str, steps: int) -> None:
    problem = Alternating().train(steps)
    handler = Saves(problem)

    def loss() -> Tensor:
        value = problem.loss()
        at = weights(problem.params)
        signal.raise_signal(number)
        assert_same(weights(problem.params), at)  # and it does not show in the graph
        return value

    with handled(number, handler):
        STYLES[style](problem.opt, loss)
    problem.steps += 1
    assert_same(handler.saved, [[undisturbed(Alternating, "cpu", steps)["weights"]]] * 2)
    assert_same(problem.train(1).snapshot(), undisturbed(Alternating, "cpu", steps + 2))


def test_of_two_optimizers_that_are_away_a_handler_sees_both_at_w() -> None:
    problems = [Alternating().train(1), Alternating().train(2)]
    handler = Saves(*problems)
    start = [weights(problem.params) for problem in problems]
    with handled(signal.SIGTERM, handler):
        for problem in problems:
            problem.perturb()
            signal.raise_signal(signal.SIGTERM)
        for problem in problems:
            assert_differ(weights(problem.params), start[problems.index(problem)])
            backward(problem.loss(), create_graph=problem.opt.hessian_due)
        problems[0].opt.step()
        signal.raise_signal(signal.SIGTERM)
        problems[1].opt.step()
        assert signal.getsignal(signal.SIGTERM) is handler
    first = undisturbed(Alternating, "cpu", 2)["weights"]
    assert_same(handler.saved, [start, start, [first, start[1]]])
    for problem, steps in zip(problems, (2, 3)):
        assert_same(problem.snapshot(), undisturbed(Alternating, "cpu", steps))


def refused_step(problem: Problem) -> None:
    with pytest.raises(ValueError, match="second backward is missing"):
        problem.opt.step()


ENDINGS: dict[str, Callable[[Problem], Any]] = {
    "restore": lambda problem: problem.opt.restore(),
    "state_dict": lambda problem: problem.opt.state_dict(),
    "a closure": lambda problem: problem.step(),
    "an error": refused_step,
    "a load": lambda problem: problem.opt.load_state_dict(Alternating().train(1).opt.state_dict()),
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("number", SIGNALS)
def test_handlers_are_what_they_were_after_a_step_that_was_abandoned(ending: str, number: int) -> None:
    problem = Alternating().train(1)
    with handled(number, Saves(problem)):
        problem.perturb()
        ENDINGS[ending](problem)


def test_a_step_that_is_dropped_at_w_prime_gives_the_handler_back_with_the_next() -> None:
    problem, other = Alternating().train(1), Alternating().train(1)
    handler = Saves(other)
    with handled(signal.SIGTERM, handler):
        problem.perturb()
        del problem
        gc.collect()
        signal.raise_signal(signal.SIGTERM)
        assert len(handler.saved) == 1
        other.step()
        assert signal.getsignal(signal.SIGTERM) is handler


def test_a_handler_that_is_set_between_the_passes_stays() -> None:
    problem = Alternating().train(1)
    first, second = Saves(problem), Saves(problem)
    before = weights(problem.params)
    with handled(signal.SIGTERM, first):
        problem.perturb()
        signal.signal(signal.SIGTERM, second)
        backward(problem.loss())
        problem.opt.step()
        assert signal.getsignal(signal.SIGTERM) is second
        signal.signal(signal.SIGTERM, first)
    assert_differ(weights(problem.params), before)
    assert_same(problem.snapshot(), undisturbed(Alternating, "cpu", 2))


def test_a_step_in_another_thread_leaves_handlers_alone() -> None:
    problem, other = Alternating().train(1), Alternating()
    handler = Saves(problem)
    with handled(signal.SIGTERM, handler):
        problem.perturb()
        thread = threading.Thread(target=other.train, args=(2,))
        thread.start()
        thread.join()
        signal.raise_signal(signal.SIGTERM)
        backward(problem.loss())
        problem.opt.step()
    assert_same(handler.saved, [[undisturbed(Alternating, "cpu", 1)["weights"]]])
    assert_same(problem.snapshot(), undisturbed(Alternating, "cpu", 2))
    assert_same(other.snapshot(), undisturbed(Alternating, "cpu", 2))


# ---------------------------------------------------------------------------------------------------------------------
# Ctrl-C twice, and from outside


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
        problem = interrupted_twice(signal_at(line, reached))
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

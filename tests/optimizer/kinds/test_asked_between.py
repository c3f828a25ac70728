"""State saved or copied between the passes, or inside one: the weights are w, and the step says it was given up."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sassha_fused import Sassha
from tests.support.kinds import Net, assert_clean, assert_goes_on, refused
from tests.support.members import MEMBERS, OfMember, assert_at_w
from tests.support.problems import Problem, assert_same, single_threaded, weights

one_thread = pytest.fixture(autouse=True)(single_threaded)


def saved_to_file(opt: Sassha) -> Any:
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    return file


ASKING: dict[str, Callable[[Sassha], Any]] = {
    "state_dict()": lambda opt: opt.state_dict(),
    "state_dict() ": saved_to_file,
    "a copy of the optimizer": copy.deepcopy,
    "a copy of the optimizer ": pickle.dumps,
    "load_state_dict()": lambda opt: opt.load_state_dict(opt.state_dict()),
}
asking = pytest.mark.parametrize("asked", ASKING)
each_step = pytest.mark.parametrize("steps", [0, 1, 3], ids=["first", "lazy", "Hessian"])


@asking
@each_step
@pytest.mark.parametrize("second_pass", [False, True], ids=["before the second pass", "after it"])
def test_in_phase_style_the_next_step_says_so(asked: str, steps: int, second_pass: bool) -> None:
    problem = Problem().train(steps)
    before = weights(problem.params)
    said = "state_dict()" if asked.startswith("load") else asked.strip()
    with refused(problem, f"given up, its weights put back to w, by {said}".replace("(", r"\(").replace(")", r"\)")):
        problem.perturb()
        if second_pass:
            problem.loss().backward(create_graph=problem.opt.hessian_due)
        ASKING[asked](problem.opt)
        assert not problem.opt.perturbed
        assert_same(weights(problem.params), before)
        problem.loss().backward(create_graph=True)
        problem.opt.step()
    assert_goes_on(problem)


@asking
def test_said_once_and_a_new_perturb_begins_a_step_that_counts(asked: str) -> None:
    problem = Problem().train(1)
    problem.perturb()
    ASKING[asked](problem.opt)
    problem.step("phase")
    assert_same(problem.snapshot(), Problem().train(2).snapshot())


@asking
@each_step
@pytest.mark.parametrize("at", [0, 1], ids=["first pass", "second pass"])
@pytest.mark.parametrize("standard", [False, True], ids=["closure", "standard"])
def test_inside_a_closure_at_w_prime_it_is_refused(asked: str, steps: int, at: int, standard: bool) -> None:
    problem = Problem().train(steps)
    calls: list[None] = []

    def closure() -> Tensor:
        loss = problem.loss()
        if len(calls) == at and asked != "load_state_dict()":
            ASKING[asked](problem.opt)
        calls.append(None)
        if standard:
            loss.backward()
        return loss

    if at == 0 or asked == "load_state_dict()":  # at w, where state may be had
        problem.opt.step(closure)
        problem.steps += 1
        assert_same(problem.snapshot(), Problem().train(steps + 1).snapshot())
    else:
        with refused(problem, "the step under way was given up, its weights put back to w, by"):
            problem.opt.step(closure)
    assert_goes_on(problem)


@asking
def test_between_steps_it_changes_nothing(asked: str) -> None:
    problem = Problem()
    for _ in range(5):
        problem.step()
        problem.opt.zero_grad()
        ASKING[asked](problem.opt)
    assert_same(problem.snapshot(), Problem().train(5).snapshot())


@each_step
@pytest.mark.parametrize("perturbed", [False, True])
def test_a_copy_of_model_and_optimizer_goes_on_alone(steps: int, perturbed: bool) -> None:
    problem = Problem().train(steps)
    if perturbed:
        problem.perturb()
        problem.opt.state_dict()  # a copy of the model alone would be one of w'
        problem.opt.zero_grad()
    model, opt = copy.deepcopy((problem.model, problem.opt))
    other = copy.copy(problem)
    other.model, other.opt, other.params = model, opt, [*model.parameters()]
    assert all(a is not b for a, b in zip(other.params, problem.params))
    assert [id(p) for g in opt.param_groups for p in g["params"]] == [id(p) for p in other.params]
    expected = Problem().train(steps + 4).snapshot()
    assert_same(other.train(4).snapshot(), expected)
    assert_same(problem.train(4).snapshot(), expected)
    assert opt.hessian_due == problem.opt.hessian_due and opt.skipped_steps == problem.opt.skipped_steps


def test_a_copy_of_model_and_optimizer_taken_at_w_prime_is_of_w() -> None:
    problem = Problem().train(1)
    before = weights(problem.params)
    problem.perturb()
    opt, model = copy.deepcopy((problem.opt, problem.model))
    assert_same(weights(model.parameters()), before)
    assert_same(weights(problem.params), before)
    assert not opt.perturbed and not problem.opt.perturbed


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["model first", "optimizer first"])
def test_a_pickle_of_both_is_of_one_moment_or_refused(order: tuple[int, int]) -> None:
    problem = Problem().train(1)
    problem.perturb()
    both = (problem.model, problem.opt)
    file = pickle.dumps([both[i] for i in order])
    loaded = pickle.loads(file)
    before = weights(problem.params)
    assert not problem.opt.perturbed
    # Where the optimizer comes second, the model was written at w' already: no optimizer can know of that.
    if order == (1, 0):
        assert_same(weights(loaded[1].parameters()), before)


def test_nothing_stays_on_the_parameters() -> None:
    for asked, ask in ASKING.items():
        net = Net()
        opt = Sassha(net.parameters(), backend="cpu")
        net.loss().backward()
        opt.perturb()
        net.loss().backward(create_graph=opt.hessian_due)
        ask(opt)
        opt.zero_grad()
        assert_clean(net.parameters()), asked


# ---------------------------------------------------------------------------------------------------------------------
# Weights that somebody writes at w'


def written_in_place(problem: Problem) -> None:
    with torch.no_grad():
        problem.params[0].add_(1)


def model_loaded(problem: Problem) -> None:
    problem.model.load_state_dict(Problem().model.state_dict())


def clipped(problem: Problem) -> None:
    with torch.no_grad():
        for param in problem.params:
            param.clamp_(-0.1, 0.1)


@each_step
@pytest.mark.parametrize("second_pass", [False, True])
@pytest.mark.parametrize("write", [written_in_place, model_loaded, clipped], ids=lambda write: write.__name__)
def test_weights_written_between_the_passes_are_refused(write: Any, second_pass: bool, steps: int) -> None:
    problem = Problem().train(steps)
    with refused(problem, r"the weights were written between perturb\(\) and step\(\): load or change"):
        problem.perturb()
        if second_pass:
            problem.loss().backward(create_graph=problem.opt.hessian_due)
        write(problem)
        if not second_pass:
            problem.loss().backward(create_graph=problem.opt.hessian_due)
        problem.opt.step()
    assert_goes_on(problem)


@pytest.mark.parametrize("which", range(4))
def test_any_one_of_them_is_noticed(which: int) -> None:
    problem = Problem().train(1)
    with refused(problem, "the weights were written"):
        problem.perturb()
        problem.loss().backward()
        with torch.no_grad():
            problem.params[which].mul_(2)
        problem.opt.step()


def test_a_closure_that_writes_weights_is_refused() -> None:
    problem = Problem().train(1)

    def closure() -> Tensor:
        loss = problem.loss()
        loss.backward()
        if problem.opt.perturbed:
            written_in_place(problem)
        return loss

    with refused(problem, "the weights were written"):
        problem.opt.step(closure)
    assert_goes_on(problem)


@pytest.mark.parametrize("second_pass", [False, True])
def test_a_checkpoint_loaded_at_w_prime_stays(second_pass: bool) -> None:
    source = Problem().train(5)
    problem = Problem(backend="cpu").train(2)
    problem.perturb()
    if second_pass:
        problem.loss().backward(create_graph=problem.opt.hessian_due)
    problem.model.load_state_dict(source.model.state_dict())
    problem.opt.load_state_dict(source.opt.state_dict())
    assert not problem.opt.perturbed
    problem.opt.zero_grad()
    problem.steps = 5
    assert_same(problem.train(3).snapshot(), source.train(3).snapshot())


def test_a_checkpoint_loaded_optimizer_first_stays_too() -> None:
    source = Problem().train(5)
    problem = Problem().train(2)
    problem.perturb()
    problem.opt.load_state_dict(source.opt.state_dict())
    problem.model.load_state_dict(source.model.state_dict())
    problem.steps = 5
    assert_same(problem.train(3).snapshot(), source.train(3).snapshot())


# ---------------------------------------------------------------------------------------------------------------------
# Between micro-batches


def squared_error(problem: OfMember, batch: int) -> Tensor:
    return (problem.model(problem.inputs[batch]) - problem.targets[batch]).square().mean()


@pytest.mark.parametrize("member", MEMBERS)
def test_between_micro_batches_the_weights_are_w_and_a_checkpoint_ends_nothing(member: str) -> None:
    def trained(save: bool) -> OfMember:
        problem = OfMember(member)
        for _ in range(4):
            problem.opt.zero_grad()
            before = weights(problem.params)
            for batch in range(3):
                closure = functools.partial(squared_error, problem, problem.steps + batch)
                (problem.opt.accumulate if batch < 2 else problem.opt.step)(closure)
                if save and batch < 2:
                    assert_at_w(problem, before)
                    assert not problem.opt.perturbed
                    saved_to_file(problem.opt)
            problem.steps += 3
        return problem

    assert_same(trained(save=True).snapshot(), trained(save=False).snapshot())

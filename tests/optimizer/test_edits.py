"""What somebody edits in the groups is noticed, whatever it is, and counts or is refused; an interrupt loses none."""

from __future__ import annotations

import io
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sassha_fused import Sassha
from tests.support.lines import Line, signal_at, tracing
from tests.support.problems import BACKENDS, ManyGroups, assert_same, single_threaded

one_thread = pytest.fixture(autouse=True)(single_threaded)
both_backends = pytest.mark.parametrize("backend", BACKENDS)
Groups = list[dict[str, Any]]

# ---------------------------------------------------------------------------------------------------------------------
# Interrupted


def edit_all(name: str, value: Any) -> Callable[[Groups], None]:
    def edit(groups: Groups) -> None:
        for group in groups:
            group[name] = value

    return edit


def rate_others(groups: Groups) -> None:
    groups[0]["lr"], groups[2]["lr"] = 0.01, torch.tensor(0.5)


EDITS: dict[str, Callable[[Groups], None]] = {
    "a learning rate": lambda groups: groups[1].update(lr=0.3),
    "other learning rates in tensors": rate_others,
    "rho 0": edit_all("rho", 0.0),
    "a weight decay": lambda groups: groups[1].update(weight_decay=0.3),
    "eps of one group": lambda groups: groups[1].update(eps=0.3),
    "betas": edit_all("betas", (0.5, 0.9)),
}
# Where the groups are looked at and taken in.
FILES = ("accepted_groups.py", "bucket.py", "checks.py", "flat.py", "row_table.py", "run.py", "settings.py", "step.py")


def edited(name: str) -> ManyGroups:
    problem = ManyGroups([{"lr": torch.tensor(0.01)}, {}, {}]).train(2)
    problem.opt.zero_grad()
    EDITS[name](problem.opt.param_groups)
    return problem


def steps_of(problem: ManyGroups) -> int:
    steps: int = problem.opt.state_dict()["param_groups"][0]["steps"]
    return steps


@pytest.mark.slow
@pytest.mark.untraced  # it traces lines itself
@pytest.mark.parametrize("name", EDITS)
def test_ctrl_c_at_any_line_that_takes_in_an_edit_does_not_lose_it(name: str) -> None:
    lines: list[Line] = []
    expected = edited(name)
    with tracing(lines.append):
        expected.opt.step(expected.loss)
    expected.train(1)
    visited = dict.fromkeys(line for line in lines if line[0] in FILES)
    assert {line[0] for line in visited} == set(FILES)
    for line in visited:
        problem, reached = edited(name), list[Line]()
        with pytest.raises(KeyboardInterrupt), tracing(signal_at(line, reached, signal.SIGINT)):
            problem.opt.step(problem.loss)
        problem.train(4 - steps_of(problem))
        assert_same(problem.everything(), expected.everything())


@both_backends
def test_running_out_of_memory_for_other_learning_rates_in_tensors_loses_none(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, expected = (ManyGroups([{"lr": torch.tensor(0.01)}, {}, {}], backend).train(1) for _ in range(2))
    for each in (problem, expected):
        rate_others(each.opt.param_groups)
    original = torch.tensor

    def exhausted(*arguments: Any, **options: Any) -> Tensor:
        if options.get("dtype") == torch.int64:
            raise torch.OutOfMemoryError("no memory")
        return original(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch, "tensor", exhausted)
        problem.train(1)
    assert_same(problem.train(2).everything(), expected.train(2).everything())


# ---------------------------------------------------------------------------------------------------------------------
# Noticed


@both_backends
def test_a_learning_rate_in_another_tensor_counts_though_it_is_equal_at_first(backend: str) -> None:
    problem, expected = (ManyGroups([{"lr": torch.tensor(0.03125)}, {}], backend).train(2) for _ in range(2))
    other = problem.opt.param_groups[0]["lr"] = torch.tensor(0.03125)
    problem.train(1)
    expected.train(1)
    other.fill_(0.5)
    expected.opt.param_groups[0]["lr"].fill_(0.5)
    assert_same(problem.train(2).everything(), expected.train(2).everything())


@pytest.mark.parametrize(
    "name, value",
    [("hessian_samples", 1.0), ("seed", 0.0), ("weight_decay", torch.tensor(0.0)), ("maximize", 0), ("eps", True)],
    ids=str,
)
def test_what_equals_a_number_and_is_none_is_named_by_the_next_step(name: str, value: Any) -> None:
    problem = ManyGroups([{}, {}], eps=1.0).train(1)
    edit_all(name, value)(problem.opt.param_groups)
    with pytest.raises(TypeError, match=f"^{name}"):
        problem.train(1)


@pytest.mark.parametrize("name, value", [("hessian_samples", 2.0), ("seed", 3.0)])
def test_between_the_passes_of_a_hessian_step_it_is_the_number(name: str, value: float) -> None:
    problem, expected = (ManyGroups([{}, {}], hessian_interval=1, **{name: int(value)}).train(1) for _ in range(2))
    for each in (problem, expected):
        each.opt.zero_grad()
        each.loss().backward()
        each.opt.perturb()
        if each is problem:
            edit_all(name, value)(each.opt.param_groups)
        with each.opt.hessian_pass():
            each.loss().backward()
        each.opt.step()
    assert_same(list(problem.params), list(expected.params))


class Unequal:
    """What cannot be compared."""

    def __eq__(self, other: object) -> bool:
        raise TypeError("not comparable")

    __hash__ = None  # type: ignore[assignment]


def test_entries_of_the_users_own_may_be_anything() -> None:
    problem, expected = (ManyGroups([{}, {}]).train(1) for _ in range(2))
    for _ in range(3):
        problem.opt.param_groups[0]["note"] = Unequal()
        problem.train(1)
    assert_same(list(problem.params), list(expected.train(3).params))


@pytest.mark.parametrize("name", ["lr", "rho", "betas", "seed"])
def test_a_missing_entry_is_named(name: str) -> None:
    problem = ManyGroups([{}, {}]).train(1)
    kept = problem.opt.param_groups[1].pop(name)
    with pytest.raises(ValueError, match=f"^{name} is missing in a parameter group"):
        problem.train(1)
    problem.opt.state_dict()  # may still be saved
    problem.opt.param_groups[1][name] = kept
    assert_same(problem.train(1).everything(), ManyGroups([{}, {}]).train(2).everything())


def test_a_value_that_was_loaded_gives_way_to_the_one_of_before() -> None:
    problem, expected = (ManyGroups([{}, {}]).train(2) for _ in range(2))
    saved = problem.opt.state_dict()
    rate = problem.opt.param_groups[0]["lr"]
    saved["param_groups"][0]["lr"] = 0.0
    problem.opt.load_state_dict(saved)
    problem.opt.param_groups[0]["lr"] = rate
    assert_same(problem.train(1).everything(), expected.train(1).everything())


@pytest.mark.parametrize(
    "edit",
    [
        lambda groups: groups[0].update(lr=np.cos(0.1)),
        lambda groups: groups[0].update(weight_decay=np.float64(0.0)),
        edit_all("hessian_warmup", np.int64(0)),
        lambda groups: groups[0].update(betas=[np.float64(0.9), np.float32(0.5)]),
    ],
)
@pytest.mark.parametrize("steps", [0, 1], ids=["not yet accepted", "accepted"])
def test_numbers_of_numpy_are_saved_as_numbers(edit: Callable[[Groups], None], steps: int) -> None:
    problem = ManyGroups([{}, {}]).train(2)
    edit(problem.opt.param_groups)
    problem.train(steps)
    file = io.BytesIO()
    torch.save(problem.opt.state_dict(), file)
    file.seek(0)
    resumed = ManyGroups([{}, {}])
    with torch.no_grad():
        for param, other in zip(resumed.params, problem.params):
            param.copy_(other)
    resumed.opt.load_state_dict(torch.load(file, weights_only=True))
    assert_same(resumed.train(3).everything(), problem.train(3).everything())


# ---------------------------------------------------------------------------------------------------------------------
# The bias correction, by which the state was counted


def two_corrections(**options: Any) -> ManyGroups:
    return ManyGroups([{}, {"bias_correction": "update"}, {}], **options).train(2)


@pytest.mark.parametrize(
    "edit", [lambda groups: groups.reverse(), lambda groups: groups.insert(0, groups.pop())], ids=["reversed", "moved"]
)
def test_groups_with_different_corrections_may_come_in_another_order(edit: Callable[[Groups], Any]) -> None:
    problem, expected = two_corrections(), two_corrections()
    edit(problem.opt.param_groups)
    for mine, theirs in zip(problem.train(1).params, expected.train(1).params):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)  # a lazy step, but for the sum of the norm


def test_a_group_before_one_with_another_correction_may_go() -> None:
    problem = two_corrections()
    problem.opt.param_groups.pop(0)
    before = [param.detach().clone() for param in problem.params]
    problem.train(1)
    assert [torch.equal(one, other) for one, other in zip(before, problem.params)] == [True, False, False]


@both_backends
def test_a_correction_of_parameters_that_have_state_cannot_change(backend: str) -> None:
    problem = two_corrections(backend=backend)
    expected = two_corrections(backend=backend)
    group = problem.opt.param_groups[0]
    group["bias_correction"] = "none"
    for _ in range(2):
        with pytest.raises(ValueError, match="bias_correction cannot change from 'step' to 'none'"):
            problem.train(1)
    group["bias_correction"] = "step"
    assert_same(problem.train(2).everything(), expected.train(2).everything())


def test_a_parameter_with_state_cannot_move_to_a_group_with_another_correction() -> None:
    problem = two_corrections()
    groups = problem.opt.param_groups
    groups[1]["params"].append(groups[0]["params"].pop())
    with pytest.raises(ValueError, match="bias_correction cannot change from 'step' to 'update'"):
        problem.train(1)


def test_without_state_there_is_nothing_to_count() -> None:
    problem = two_corrections()
    problem.opt.state.clear()
    edit_all("bias_correction", "none")(problem.opt.param_groups)
    problem.train(1)
    assert {bucket.settings.bias_correction for bucket in problem.buckets} == {2.0}


def test_a_checkpoint_brings_its_correction_along() -> None:
    problem, other = ManyGroups([{}, {}]).train(2), ManyGroups([{}, {}], bias_correction="update").train(2)
    with torch.no_grad():
        for param, source in zip(problem.params, other.params):
            param.copy_(source)
    problem.opt.load_state_dict(other.opt.state_dict())
    assert_same(problem.train(3).everything(), other.train(3).everything())


# ---------------------------------------------------------------------------------------------------------------------
# What it costs


class Counted(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the operations of torch that write something."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


VIEWS = {"detach", "select", "reshape", "view", "_unsafe_view", "alias"}


@pytest.mark.parametrize(
    "rates, most",
    [([torch.tensor(0.01)] * 3, 3), ([torch.tensor(0.01), torch.tensor(0.02), torch.tensor(0.03)], 6)],
    ids=["the same tensor", "tensors of their own"],
)
def test_learning_rates_in_tensors_take_few_launches_however_many_parameters(rates: list[Tensor], most: int) -> None:
    params = [nn.Parameter(torch.ones(2)) for _ in range(60)]
    groups = [{"params": params[20 * i : 20 * i + 20], "lr": rate} for i, rate in enumerate(rates)]
    opt = Sassha(groups, hessian_interval=100)
    opt.step(lambda: torch.cat(params).square().sum())
    (bucket,) = opt._run.flat.buckets
    with Counted() as counted:
        bucket.table.take_in_rates()
    assert len([name for name in counted.called if name not in VIEWS]) <= most, counted.called


def test_a_number_that_changes_is_one_copy() -> None:
    problem = ManyGroups([{}] * 5).train(1)
    table = problem.buckets[0].table
    for i, group in enumerate(problem.opt.param_groups):
        group["lr"] = 0.01 * (1 + i)
    with Counted() as counted:
        table.write()
        assert counted.called.count("copy_") == 1
        counted.called.clear()
        table.write()
        assert counted.called == []

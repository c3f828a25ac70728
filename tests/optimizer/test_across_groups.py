"""State lies flat across groups: what they share, what each parameter has of its own, and edits of either."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sassha_fused import flat
from tests.support.kinds import assert_goes_on
from tests.support.problems import ALL_STYLES, BACKENDS, ManyGroups, Problem, assert_same, single_threaded, weights

one_thread = pytest.fixture(autouse=True)(single_threaded)
both_backends = pytest.mark.parametrize("backend", BACKENDS)
each_style = pytest.mark.parametrize("style", ALL_STYLES)

# What a table has a column for, or what no kernel knows of.
OWN: list[dict[str, Any]] = [
    {"lr": 0.01},
    {"lr": torch.tensor(0.01)},
    {"weight_decay": 0.3},
    {"rho": 0.0},
    {"rho": 1.0},
]
SHARED: list[dict[str, Any]] = [
    {"betas": (0.5, 0.9)},
    {"eps": 0.1},
    {"hessian_power": 1.0},
    {"adaptive": True},
    {"maximize": True},
    {"bias_correction": "update"},
]


def in_buckets_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has every group lie by itself."""
    original = flat.FlatState._members

    def apart(*arguments: Any) -> list[Any]:
        return [[member] for members in original(*arguments) for member in members]

    monkeypatch.setattr(flat.FlatState, "_members", apart)


@pytest.mark.parametrize("own", OWN, ids=str)
def test_what_each_parameter_has_of_its_own_takes_no_more_buckets(own: dict[str, Any]) -> None:
    assert len(ManyGroups([{}, own, {}, own]).train(1).buckets) == 1


@pytest.mark.parametrize("option", SHARED, ids=str)
def test_groups_that_differ_in_more_lie_by_themselves_across_the_groups_between(option: dict[str, Any]) -> None:
    assert [len(b.params) for b in ManyGroups([{}, option, {}, option, {}]).train(1).buckets] == [3, 2]


@both_backends
@each_style
def test_groups_together_take_the_steps_of_groups_by_themselves(
    backend: str, style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [{}, *OWN, *OWN[::-1]]
    together = ManyGroups(options, backend).train(5, style)
    assert len(together.buckets) == 1
    in_buckets_of_their_own(monkeypatch)
    # The norm is summed bucket by bucket then: equal up to its last bits, which float32 weights do not show.
    alone = ManyGroups(options, backend).train(5, style)
    assert len(alone.buckets) == len(options)
    assert_same(together.everything(), alone.everything())


@both_backends
def test_a_scheduler_of_what_groups_share_moves_no_state(backend: str) -> None:
    problem = ManyGroups([{}, {"lr": 0.01}], backend).train(1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        problem.opt, max_lr=[0.1, 0.03], total_steps=20, cycle_momentum=True, base_momentum=0.8, max_momentum=0.95
    )
    kept = problem.buckets[0]
    betas = set()
    for _ in range(6):
        problem.train(1)
        betas.add(problem.opt.param_groups[0]["betas"])
        assert kept.settings.beta1 == problem.opt.param_groups[0]["betas"][0]
        assert [row[0] for row in kept.table.values.tolist()] == [g["lr"] for g in problem.opt.param_groups]
        scheduler.step()
    assert len(betas) == 6 and problem.buckets == [kept]


@both_backends
@pytest.mark.parametrize("option", SHARED[:-1], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_groups_that_come_to_differ_take_their_state_along(
    backend: str, steps: int, option: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(apart: bool) -> list[Any]:
        with pytest.MonkeyPatch.context() as patch:
            if apart:
                in_buckets_of_their_own(patch)
            problem = ManyGroups([{}, {"lr": 0.01}, {}], backend).train(steps)
            problem.opt.param_groups[1].update(option)
            problem.train(4)
            assert len(problem.buckets) == (3 if apart else 2)
            return problem.everything()

    assert_same(run(False), run(True))


@each_style
@pytest.mark.parametrize("option", SHARED[:-1], ids=str)
def test_an_edit_between_the_passes_that_would_part_groups_is_refused(style: str, option: dict[str, Any]) -> None:
    problem = Problem().train(1)
    expected = Problem().train(1).snapshot()
    kept = dict(problem.opt.param_groups[1])

    def edited() -> Tensor:
        if problem.opt.perturbed:
            problem.opt.param_groups[1].update(option)
        return problem.loss()

    problem.opt.zero_grad()
    with pytest.raises(ValueError, match="between perturb\\(\\) and step\\(\\): edit groups before perturb"):
        ALL_STYLES[style](problem.opt, edited)
    problem.opt.param_groups[1].update(kept)
    assert_same(problem.snapshot()["weights"], expected["weights"])
    problem.opt.zero_grad()
    assert_goes_on(problem, 3)


@both_backends
def test_an_edit_of_all_groups_between_the_passes_counts(backend: str) -> None:
    problem, other = (Problem(backend).train(1) for _ in range(2))
    for each in (problem, other):
        if each is other:
            for group in each.opt.param_groups:
                group["betas"] = (0.5, 0.9)
        each.perturb()
        if each is problem:
            for group in each.opt.param_groups:
                group["betas"] = (0.5, 0.9)
        each.loss().backward()
        each.opt.step()
    assert_same(problem.params, other.params)


@both_backends
@pytest.mark.parametrize("between", [False, True])
def test_a_learning_rate_edited_at_any_time_is_that_of_the_next_update(backend: str, between: bool) -> None:
    problem, expected = (ManyGroups([{}, {}], backend).train(1) for _ in range(2))
    state = expected.opt.state_dict()
    state["param_groups"][1]["lr"] = 0.01
    expected.opt.load_state_dict(state)  # lays the state and the table out anew
    for each in (problem, expected):
        each.opt.zero_grad()
        each.loss().backward()
        if each is problem and not between:
            each.opt.param_groups[1]["lr"] = 0.01
        each.opt.perturb()
        if each is problem and between:
            each.opt.param_groups[1]["lr"] = 0.01
        each.loss().backward()
        each.opt.step()
    assert_same(problem.everything(), expected.everything())


@both_backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_learning_rates_in_tensors_count_as_they_are_when_the_step_is_taken(backend: str, dtype: torch.dtype) -> None:
    rates = [torch.tensor(0.03125), torch.tensor([0.0625], dtype=dtype), torch.tensor(0.125, dtype=torch.float64)]
    options: list[dict[str, Any]] = [{"lr": rates[0]}, {}, {"lr": rates[1]}, {"lr": 0.015625}, {"lr": rates[2]}]
    in_tensors = ManyGroups(options, backend)
    as_numbers = ManyGroups([{"lr": float(own.get("lr", 0.03))} for own in options], backend)
    for _ in range(4):
        in_tensors.train(1)
        as_numbers.train(1)
        for rate in rates:
            rate.mul_(0.5)
        for group, i in zip(as_numbers.opt.param_groups, (0, None, 1, None, 2)):
            group["lr"] = float(rates[i]) if i is not None else group["lr"]
    assert_same(in_tensors.everything(), as_numbers.everything())


@both_backends
@pytest.mark.parametrize("number", [0.0, 0.02])
def test_a_number_in_the_place_of_a_tensor_counts_from_then_on(backend: str, number: float) -> None:
    given: list[dict[str, Any]] = [{"lr": torch.tensor(0.03125)}, {}]
    problem, expected = ManyGroups(given, backend), ManyGroups([{"lr": 0.03125}, {}], backend)
    for each in (problem, expected):
        each.train(2).opt.param_groups[0]["lr"] = number
        each.train(2).opt.param_groups[0]["lr"] = torch.tensor(0.0625) if each is problem else 0.0625
        each.train(2)
    assert_same(problem.everything(), expected.everything())


def test_groups_replaced_between_the_passes_are_refused() -> None:
    problem, expected = Problem().train(1), Problem().train(1)
    problem.perturb()
    problem.loss().backward()
    kept = problem.opt.param_groups[1]
    problem.opt.param_groups[1] = {**kept, "lr": 0.5}
    with pytest.raises(ValueError, match="param_groups was replaced between"):
        problem.opt.step()
    problem.opt.param_groups[1] = kept
    assert_same(weights(problem.params), weights(expected.params))
    problem.opt.zero_grad()
    assert_goes_on(problem, 3)


@both_backends
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -0.01])
@pytest.mark.parametrize("others", [{}, {"eps": 0.01}, {"lr": torch.tensor(0.02)}], ids=str)
def test_one_bad_learning_rate_skips_the_step_of_all_groups(backend: str, bad: float, others: dict[str, Any]) -> None:
    rate = torch.tensor(0.01)
    problem = ManyGroups([others, {"lr": rate}, others], backend).train(2)
    before = problem.everything()
    problem.opt.zero_grad()
    problem.loss().backward()
    problem.opt.perturb()
    rate.fill_(bad)  # in place, where no check of the groups looks again
    problem.loss().backward()
    problem.opt.step()
    assert problem.opt.skipped_steps == 1
    assert_same(problem.everything(), before)


def test_the_lists_of_a_pass_are_kept_while_the_same_parameters_take_part() -> None:
    problem = ManyGroups([{}] * 6)
    for param in problem.params[1::2]:
        param.requires_grad_(False)
    problem.train(1)
    for param in problem.params[1::2]:
        param.requires_grad_(True)
    problem.train(1)
    for param in problem.params[1::2]:
        param.requires_grad_(False)
    problem.train(1)
    run = problem.opt._run

    def selected() -> Any:
        problem.opt.zero_grad()
        problem.loss().backward()
        (selection,) = run.flat.select(problem.opt.param_groups, run.states, run.counts.catch_up)
        return selection

    first, second = selected(), selected()
    assert first.rows == [0, 2, 4] and first.layouts is second.layouts and first.rows is second.rows
    problem.params[1].requires_grad_(True)
    third = selected()
    assert third.rows == [0, 1, 2, 4] and len(third.layouts) == 4


@both_backends
def test_without_a_perturbation_no_backup_is_ever_made(backend: str) -> None:
    problem = ManyGroups([{}, {"lr": 0.01}], backend, rho=0.0).train(4)
    assert "backup" not in vars(problem.buckets[0])
    problem.opt.param_groups[0]["rho"] = 0.1
    problem.train(1)
    assert "backup" in vars(problem.buckets[0])


@both_backends
def test_a_load_between_two_equal_edits_leaves_no_old_value(backend: str) -> None:
    problem = ManyGroups([{}, {}], backend).train(1)
    group = problem.opt.param_groups[0]
    rate, group["lr"] = group["lr"], 0.0
    problem.opt.load_state_dict(problem.opt.state_dict())
    problem.opt.param_groups[0]["lr"] = rate
    expected = ManyGroups([{}, {}], backend).train(2)
    assert_same(problem.train(1).everything(), expected.everything())


@both_backends
def test_groups_that_agree_again_come_together(backend: str) -> None:
    problem = ManyGroups([{}, {}], backend).train(1)
    problem.opt.param_groups[1]["eps"] = 0.1
    assert len(problem.train(1).buckets) == 2
    problem.opt.param_groups[1]["eps"] = problem.opt.param_groups[0]["eps"]
    assert len(problem.train(1).buckets) == 1


def test_a_list_of_groups_put_in_between_the_passes_is_refused() -> None:
    problem = Problem().train(1)
    problem.perturb()
    problem.loss().backward()
    kept = problem.opt.param_groups
    problem.opt.param_groups = [{**group, "lr": 0.0} for group in kept]
    with pytest.raises(ValueError, match="param_groups was replaced between"):
        problem.opt.step()
    problem.opt.param_groups = kept
    problem.opt.zero_grad()
    assert_goes_on(problem, 3)


def test_the_default_device_is_not_asked() -> None:
    problem = ManyGroups([{"lr": torch.tensor(0.03125)}, {}])
    with torch.device("meta"):
        problem.opt.step(problem.loss)
    assert problem.buckets[0].table.values.device.type == "cpu"
    assert_same(problem.everything(), ManyGroups([{"lr": 0.03125}, {}]).train(1).everything())


def test_the_tables_of_a_graph_stay_where_they_are() -> None:
    problem = ManyGroups([{"lr": torch.tensor(0.03)}, {}, {"lr": torch.tensor(0.01)}]).train(1)
    table = problem.buckets[0].table
    places = [table.values.data_ptr(), table._rows, table._rate_of_row]
    problem.opt.param_groups[1]["lr"] = 0.5
    problem.train(1)
    assert places[0] == table.values.data_ptr() and places[1] is table._rows and places[2] is table._rate_of_row

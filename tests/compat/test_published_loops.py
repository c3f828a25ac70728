"""The loops of the published code, run by sassha_fused.compat, take the steps of the method: every weight and state."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sassha_fused.compat import SASSHA
from tests.support.kinds import assert_states_close
from tests.support.problems import BACKENDS, assert_same, backward, naming, parameter, single_threaded, weights
from tests.support.published import INTERVAL, Schedule, Training, gpt2_step, image_step, reference_step
from tests.support.reference import ReferenceSassha

one_thread = pytest.fixture(autouse=True)(single_threaded)
both_backends = pytest.mark.parametrize("backend", BACKENDS)

# Sums of micro-batches and of batches differ in rounding, which twelve steps magnify.
RTOL = 1e-9


def power(t: int) -> float:
    """A linear schedule."""
    return 0.5 + t / 40


def gpt2_power(t: int) -> float:
    """The schedule that GPT-2 was trained with."""
    return 1.0 if t <= 4 else 0.8


def image(training: Training, backend: str = "cpu", **options: Any) -> SASSHA:
    return SASSHA(training.groups, lr=0.05, rho=0.1, lazy_hessian=INTERVAL, seed=3, backend=backend, **options)


def gpt2(training: Training, backend: str = "cpu", **options: Any) -> SASSHA:
    options = {"lr": 0.02, "betas": (0.965, 0.99), "lazy_hessian": INTERVAL, "seed": 3, "backend": backend, **options}
    opt = SASSHA(training.groups, **options)
    opt.hessian_power_scheduler, opt.rho_scheduler = Schedule(gpt2_power), Schedule(lambda t: 0.05)
    return opt


def micro_batches(training: Training, t: int, count: int = 4) -> list[Any]:
    size = 16 // count
    return [lambda i=i: training.loss(t, slice(i * size, (i + 1) * size)) for i in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# Trajectories


@both_backends
@pytest.mark.parametrize("adaptive, samples", [(False, 1), (True, 1), (False, 2)])
def test_the_loop_for_images_takes_the_steps_of_the_method(backend: str, adaptive: bool, samples: int) -> None:
    mine, theirs = Training(), Training()
    opt = image(mine, backend, adaptive=adaptive, n_samples=samples)
    opt.hessian_power_scheduler = Schedule(power)
    options = {"hessian_interval": INTERVAL, "hessian_samples": samples, "seed": 3}
    reference = ReferenceSassha(theirs.groups, lr=0.05, rho=0.1, adaptive=adaptive, **options)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=12) for o in (opt, reference)]
    for t in range(12):
        image_step(mine, opt, t)
        for group in reference.param_groups:
            group["hessian_power"] = power(t)
        reference.step(lambda t=t: theirs.loss(t))
        for scheduler in schedulers:
            scheduler.step()
        assert_states_close(mine.params, opt, theirs.params, reference, RTOL)
        assert opt.hessian_power_t == power(t)
    assert opt.param_groups[0]["lr"] < 1e-12


@both_backends
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("batches", [1, 4])
def test_the_loop_for_gpt2_takes_the_steps_of_the_method(backend: str, samples: int, batches: int) -> None:
    mine, theirs, warmup = Training(1), Training(1), 4
    opt = gpt2(mine, backend, n_samples=samples)
    options = {"hessian_interval": INTERVAL, "hessian_samples": samples, "seed": 3, "bias_correction": "none"}
    reference = ReferenceSassha(theirs.groups, lr=0.02, betas=(0.965, 0.99), **options)
    for t in range(12):
        for group in opt.param_groups:
            group["lr"] = 0.02 * min(t / warmup, 1)
        gpt2_step(micro_batches(mine, t, batches), opt, t, warmup, mine.params)
        for group in reference.param_groups:
            group.update(hessian_power=gpt2_power(t), rho=0.05 if t > warmup else 0.0, lr=0.02 * min(t / warmup, 1))
        reference_step(reference, lambda t=t: theirs.loss(t), theirs.params, perturbed=t > warmup)
        assert_states_close(mine.params, opt, theirs.params, reference, RTOL)
    assert opt.rho_t == 0.05 and opt.param_groups[0]["bias_correction"] == "none"
    assert opt._run.counts.catch_up() == 12


def test_a_single_batch_needs_no_set_hessian() -> None:
    mine, theirs = Training(), Training()
    opt = SASSHA(mine.groups, lr=0.02, lazy_hessian=INTERVAL)
    options = {"hessian_interval": INTERVAL, "rho": 0.0, "bias_correction": "none"}
    reference = ReferenceSassha(theirs.groups, lr=0.02, **options)
    for t in range(5):
        backward(mine.loss(t), create_graph=True)
        opt.step(t)
        opt.zero_grad()
        reference.step(lambda t=t: theirs.loss(t))
        assert_states_close(mine.params, opt, theirs.params, reference, RTOL)


@pytest.mark.parametrize("warmup", [-1, 100])
def test_micro_batches_may_miss_parameters_and_parameters_may_enter_linearly(warmup: int) -> None:
    """Of experts each is in one micro-batch alone, and an offset has no curvature; at w as at w'."""

    def problem() -> tuple[list[nn.Parameter], list[Any]]:
        experts = [parameter(0.3, -0.5, dtype=torch.float64), parameter(0.7, 0.2, dtype=torch.float64)]
        shared, offset = parameter(1.0, -2.0, dtype=torch.float64), parameter(0.5, 0.5, dtype=torch.float64)
        losses = [lambda e=e: ((e * shared).sin() + offset).sum() for e in experts]
        return [*experts, shared, offset], losses

    (mine, losses), (theirs, their_losses) = problem(), problem()
    opt = SASSHA(mine, lr=0.02, lazy_hessian=INTERVAL, hessian_power=1.0)
    opt.rho_scheduler = Schedule(lambda t: 0.05)
    rho = 0.05 if warmup < 0 else 0.0
    options = {"hessian_interval": INTERVAL, "hessian_power": 1.0, "rho": rho, "bias_correction": "none"}
    reference = ReferenceSassha(theirs, lr=0.02, **options)
    for t in range(7):
        gpt2_step(losses, opt, t, warmup, mine)
        both = lambda: (their_losses[0]() + their_losses[1]()) / 2  # noqa: E731
        reference_step(reference, both, theirs, perturbed=warmup < 0)
        assert_states_close(mine, opt, theirs, reference, RTOL)
    assert not opt.state[mine[-1]]["exp_hessian"].any() and opt.state[mine[0]]["exp_hessian"].all()


def test_after_a_skipped_step_the_schedule_follows_the_loops_own_count() -> None:
    training = Training()
    opt = gpt2(training)
    for t in range(5):
        gpt2_step(micro_batches(training, t), opt, t, -1, training.params)
    before = weights(training.params)
    training.inputs[5, 0, 0] = torch.inf
    gpt2_step(micro_batches(training, 5), opt, 5, -1, training.params)
    assert_same(weights(training.params), before)
    for t in range(6, 10):  # 6 and 9 are Hessian steps to the loop, which builds no graph in others
        gpt2_step(micro_batches(training, t), opt, t, -1, training.params)
    state = opt.state[training.params[0]]
    assert (opt.skipped_steps, int(state["step"]), int(state["hessian_step"])) == (1, 9, 4)


def test_without_perturbation_and_without_schedules_the_defaults_train() -> None:
    mine, theirs = Training(), Training()
    opt, reference = SASSHA(mine.params), ReferenceSassha(theirs.params, rho=0.0)
    assert (opt.rho_t, opt.hessian_power_t) == (0.0, 0.5)
    for t in range(4):
        backward(mine.loss(t), create_graph=True)
        opt.step()
        opt.zero_grad()
        reference.step(lambda t=t: theirs.loss(t))
        assert_states_close(mine.params, opt, theirs.params, reference, RTOL)


@pytest.mark.parametrize("keyword", [False, True])
def test_a_closure_may_stand_where_either_version_has_it(keyword: bool) -> None:
    mine, theirs = Training(), Training()
    opt = image(mine)
    reference = ReferenceSassha(theirs.groups, lr=0.05, rho=0.1, hessian_interval=INTERVAL, seed=3)
    for t in range(4):
        closure = lambda t=t: mine.loss(t)  # noqa: E731
        loss = opt.step(closure=closure) if keyword else opt.step(closure)
        torch.testing.assert_close(loss, reference.step(lambda t=t: theirs.loss(t)), rtol=RTOL, atol=0)
    assert_states_close(mine.params, opt, theirs.params, reference, RTOL)


def test_a_bias_correction_that_was_asked_for_stays_in_the_loop_for_gpt2() -> None:
    training = Training()
    opt = gpt2(training, bias_correction="update")
    gpt2_step(micro_batches(training, 0), opt, 0, 4, training.params)
    assert {group["bias_correction"] for group in opt.param_groups} == {"update"}


# ---------------------------------------------------------------------------------------------------------------------
# Arguments and mistakes


def test_arguments_have_the_published_names_places_and_defaults() -> None:
    arguments = list(inspect.signature(SASSHA).parameters.values())
    published = {
        "hessian_power_scheduler": None,
        "lr": 0.15,
        "betas": (0.9, 0.999),
        "weight_decay": 0.0,
        "rho": 0.0,
        "lazy_hessian": 10,
        "n_samples": 1,
        "perturb_eps": 1e-12,
        "eps": 1e-4,
        "adaptive": False,
        "grad_reduce": "mean",
        "seed": 0,
    }
    assert {a.name: a.default for a in arguments[1:13]} == published
    assert [a.name for a in arguments[1:13]] == list(published) and arguments[0].name == "params"
    assert inspect.signature(SASSHA).parameters["rho_scheduler"].default is None


@pytest.mark.parametrize(
    "name, value",
    [("perturb_eps", 1e-8), ("grad_reduce", "max"), ("lazy_hessian", 0), ("n_samples", 0), ("rho", Schedule(power))],
)
def test_an_argument_that_has_no_meaning_here_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=naming(name, value)):
        SASSHA([parameter(1.0)], **{name: value})


def test_an_unknown_argument_is_not_swallowed() -> None:
    with pytest.raises(TypeError, match="clip_threshold"):
        SASSHA([parameter(1.0)], clip_threshold=0.1)


def test_gradients_of_the_first_pass_are_not_added_to_those_of_the_second() -> None:
    training = Training()
    opt, before = image(training), weights(training.params)
    backward(training.loss(0))
    with pytest.raises(ValueError, match="zero_grad must be True, got False"):
        opt.perturb_weights(zero_grad=False)
    assert_same(weights(training.params), before)


@pytest.mark.parametrize("warmup", [-1, 100])
@pytest.mark.parametrize("last", [0, 1])
def test_a_micro_batch_without_a_graph_is_refused(warmup: int, last: int) -> None:
    training = Training()
    opt, before = gpt2(training), weights(training.params)
    opt.zero_hessian()
    if warmup < 0:
        backward(training.loss(0))
        opt.perturb_weights()
    losses = micro_batches(training, 0)
    for loss in losses[:last]:
        backward(loss(), create_graph=True)
        opt.set_hessian()
    backward(losses[last]())
    with pytest.raises(ValueError, match="create_graph"):
        opt.set_hessian()
    opt.restore()
    assert_same(weights(training.params), before)


def test_a_second_backward_without_a_graph_is_refused_at_w() -> None:
    training = Training()
    opt, before = image(training), weights(training.params)
    backward(training.loss(0))
    opt.perturb_weights()
    backward(training.loss(0))
    with pytest.raises(ValueError, match="this is a Hessian step, and the gradients carry no graph"):
        opt.unperturb()
    assert_same(weights(training.params), before)
    opt.zero_grad()
    backward(training.loss(0))
    opt.perturb_weights()
    opt.unperturb()  # gives the step up, as for an evaluation
    assert_same(weights(training.params), before)
    assert all(not param._backward_hooks for param in training.params)


def test_a_gradient_that_was_detached_is_not_taken_for_zero_curvature() -> None:
    training = Training()
    opt = gpt2(training)
    opt.zero_hessian()
    backward(training.loss(0), create_graph=True)
    training.params[2].grad = training.params[2].grad.detach()
    with pytest.raises(ValueError, match=r"parameter 0 of group 1, .* has lost its graph"):
        opt.set_hessian()


def test_zero_hessian_forgets_what_was_added() -> None:
    def trained(twice: bool) -> list[Tensor]:
        training = Training()
        opt = gpt2(training)
        for _ in range(1 + twice):
            opt.zero_hessian()
            training.model.zero_grad()
            backward(training.loss(0), create_graph=True)
            opt.set_hessian()
        opt.step(0)
        return [state["exp_hessian"] for state in opt.state_dict()["state"].values()]

    assert_same(trained(True), trained(False))


def test_products_at_w_are_refused_where_the_steps_are_perturbed() -> None:
    training = Training()
    opt, before = image(training), weights(training.params)
    backward(training.loss(0), create_graph=True)
    with pytest.raises(ValueError, match=r"without perturb\(\), though rho is 0.1"):
        opt.set_hessian()
    assert_same(weights(training.params), before)


def test_several_processes_are_refused_before_anything_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training()
    opt, before = gpt2(training), weights(training.params)
    backward(training.loss(0), create_graph=True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"one of 2 processes.*data_parallel"):
        opt.step(0)
    assert_same(weights(training.params), before)
    assert opt.hessian_power_scheduler.t == 0


# ---------------------------------------------------------------------------------------------------------------------
# Copies and checkpoints


def by_copy(opt: SASSHA, training: Training) -> tuple[SASSHA, Training]:
    return copy.deepcopy((opt, training))


def by_pickle(opt: SASSHA, training: Training) -> tuple[SASSHA, Training]:
    return pickle.loads(pickle.dumps((opt, training)))


def by_checkpoint(opt: SASSHA, training: Training) -> tuple[SASSHA, Training]:
    """As the script for images resumes: it sets its own count of steps to 0, and the schedulers go on."""
    saved, other = io.BytesIO(), copy.deepcopy(training)
    torch.save(opt.state_dict(), saved)
    saved.seek(0)
    again = image(other)
    again.load_state_dict(torch.load(saved, weights_only=True))
    for param in again.get_params():
        again.state[param]["hessian step"] = 0
    again.hessian_power_scheduler = copy.deepcopy(opt.hessian_power_scheduler)
    again.load_state_dict(again.state_dict())
    return again, other


@pytest.mark.parametrize("again", [by_copy, by_pickle, by_checkpoint])
@pytest.mark.parametrize("steps", [2, 3])
def test_a_copy_goes_on_bit_for_bit_with_the_schedule(again: Any, steps: int) -> None:
    training = Training()
    opt = image(training)
    opt.hessian_power_scheduler = Schedule(power)
    for t in range(steps):
        image_step(training, opt, t)
    other, copied = again(opt, training)
    for t in range(steps, steps + 5):
        image_step(training, opt, t)
        image_step(copied, other, t)
    assert_same(weights(copied.params), weights(training.params))
    assert other.hessian_power_t == opt.hessian_power_t == power(steps + 4)


def test_state_that_is_made_for_a_checkpoint_asks_no_scheduler() -> None:
    training = Training()
    opt = image(training)
    opt.hessian_power_scheduler = Schedule(power)
    for param in training.params:
        param.grad = torch.zeros_like(param)
    for group in opt.param_groups:
        group["lr"] = 0.0
    opt.step(closure=None)
    assert len(opt.state) == 4 and opt.hessian_power_scheduler.t == 0


def test_state_dict_has_the_second_average_by_its_published_name_too() -> None:
    training = Training()
    opt = image(training)
    image_step(training, opt, 0)
    saved = opt.state_dict()
    for state in saved["state"].values():
        assert state["exp_hessian_diag"] is state["exp_hessian"]
    other = image(Training())
    other.load_state_dict(saved)
    assert all("exp_hessian_diag" not in state for state in other.state.values())

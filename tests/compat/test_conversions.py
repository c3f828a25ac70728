"""State of the published code, of torch's optimizers and of this package's first layout loads, and goes on right."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sassha_fused import SAMSGD, AdaHessian, MSassha, SAMAdamW, Sassha, SophiaH
from sassha_fused.compat import SASSHA
from sassha_fused.convert import from_published, warm_start
from tests.support.kinds import assert_states_close
from tests.support.problems import BACKENDS, assert_same, backward, parameter, single_threaded, weights
from tests.support.published import INTERVAL, Schedule, Training, gpt2_step, image_step
from tests.support.reference import ReferenceSassha
from tests.support.reference_family import ReferenceMember

one_thread = pytest.fixture(autouse=True)(single_threaded)
both_backends = pytest.mark.parametrize("backend", BACKENDS)
RTOL = 1e-9
FIRST_LAYOUT = Path(__file__).with_name("first_layout.json")


def saved_and_loaded(state_dict: dict[str, Any]) -> dict[str, Any]:
    """As torch.load reads it back."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---------------------------------------------------------------------------------------------------------------------
# The published code


def published_state(reference: ReferenceSassha, for_images: bool) -> dict[str, Any]:
    """The reference's state as the published code would have saved it."""
    saved = copy.deepcopy(reference.state_dict())
    states = {}
    for key, state in saved["state"].items():
        steps = state["step"]
        own = {"exp_avg": state["exp_avg"], "exp_hessian_diag": state["exp_hessian"], "step": steps}
        own["e_w"] = torch.randn_like(own["exp_avg"])
        if for_images:
            own["hessian step"] = steps
            own["bias_correction2"] = (1 - 0.999 ** state["hessian_step"]) ** 0.5
        else:
            own["hessian step"] = 4 * reference.hessian_evaluations
        states[key] = own
    names = ("lr", "betas", "weight_decay", "eps", "params", *(["rho"] if for_images else []))
    groups = [{**{n: group[n] for n in names}, "perturb_eps": 1e-12} for group in saved["param_groups"]]
    return {"state": states, "param_groups": groups}


def by_reference(steps: int, **options: Any) -> tuple[Training, ReferenceSassha]:
    training = Training(2)
    reference = ReferenceSassha(training.groups, lr=0.05, hessian_interval=INTERVAL, seed=3, **options)
    for t in range(steps):
        reference.step(lambda t=t: training.loss(t))
    return training, reference


@both_backends
@pytest.mark.parametrize("kind", [Sassha, SASSHA])
@pytest.mark.parametrize("steps", [1, 3, 5, 6])
def test_a_run_of_the_version_for_images_goes_on(backend: str, kind: Any, steps: int) -> None:
    theirs, reference = by_reference(steps, rho=0.1)
    mine = copy.deepcopy(theirs)
    interval = {"lazy_hessian" if kind is SASSHA else "hessian_interval": INTERVAL}
    opt = kind(mine.groups, lr=0.3, seed=3, backend=backend, **interval)
    saved = saved_and_loaded(published_state(reference, True))
    opt.load_state_dict(saved if kind is SASSHA else from_published(saved, opt))
    assert_states_close(mine.params, opt, theirs.params, reference, 0.0)
    for t in range(steps, steps + 7):
        image_step(mine, opt, t) if kind is SASSHA else opt.step(lambda t=t: mine.loss(t))
        reference.step(lambda t=t: theirs.loss(t))
        assert_states_close(mine.params, opt, theirs.params, reference, RTOL)


@both_backends
@pytest.mark.parametrize("steps", [1, 5, 6])
def test_a_run_of_the_version_for_gpt2_goes_on(backend: str, steps: int) -> None:
    theirs, reference = by_reference(steps, rho=0.1, bias_correction="none")
    mine = copy.deepcopy(theirs)
    opt = SASSHA(mine.groups, lazy_hessian=INTERVAL, seed=3, backend=backend)
    opt.rho_scheduler = Schedule(lambda t: 0.1)
    opt.load_state_dict(saved_and_loaded(published_state(reference, False)))
    assert_states_close(mine.params, opt, theirs.params, reference, 0.0)
    for t in range(steps, steps + 7):
        gpt2_step([lambda t=t: mine.loss(t)], opt, t, -1, mine.params, clip=torch.inf)
        reference.step(lambda t=t: theirs.loss(t))
        assert_states_close(mine.params, opt, theirs.params, reference, RTOL)


@pytest.mark.parametrize("since_reset, last_hessian", [(1, 5), (2, 4), (3, 3), (4, 5)])
def test_the_bias_correction_is_that_of_the_last_hessian_step_also_after_a_script_has_set_the_count_to_0(
    since_reset: int, last_hessian: int
) -> None:
    training, reference = by_reference(5, rho=0.1)
    saved = published_state(reference, True)
    for state in saved["state"].values():
        state["hessian step"] = since_reset
    opt = Sassha(training.groups, hessian_interval=INTERVAL)
    converted = from_published(saved, opt)
    assert {int(state["hessian_step"]) for state in converted["state"].values()} == {last_hessian}


def test_parameters_that_had_taken_no_step_start_anew() -> None:
    training, reference = by_reference(2, rho=0.1)
    saved = published_state(reference, True)
    saved["state"][3] = {"hessian step": 0}
    training.model.zero_grad()
    opt = Sassha(training.groups, hessian_interval=INTERVAL)
    opt.load_state_dict(from_published(saved, opt))
    assert [param in opt.state for param in training.params] == [True, True, True, False]


def test_state_that_is_not_the_published_ones_is_refused_by_name() -> None:
    training, reference = by_reference(2, rho=0.1)
    saved = published_state(reference, True)
    adahessian = AdaHessian(training.params)
    with pytest.raises(ValueError, match="optimizer must be a Sassha or an MSassha, got AdaHessian"):
        from_published(saved, adahessian)
    opt = Sassha(training.groups)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match="no state has exp_hessian_diag"):
        from_published(opt.state_dict(), opt)
    del saved["state"][2]["exp_avg"]
    with pytest.raises(ValueError, match="parameter 2 has no exp_avg"):
        from_published(saved, opt)
    assert_same(opt.state_dict(), before)


# ---------------------------------------------------------------------------------------------------------------------
# torch's optimizers


def by_torch(kind: type[torch.optim.Optimizer], steps: int, **options: Any) -> tuple[Training, torch.optim.Optimizer]:
    training = Training(4)
    groups = [{"params": training.params[:2], "lr": 0.02}, {"params": training.params[2:]}]
    opt = kind(groups, **{"lr": 0.01, **options})
    for t in range(steps):
        train(opt, training, t)
    return training, opt


def train(opt: torch.optim.Optimizer, training: Training, t: int) -> None:
    opt.zero_grad()
    backward(training.loss(t))
    opt.step()


@both_backends
@pytest.mark.parametrize(
    "kind, options, target",
    [
        (torch.optim.AdamW, {"weight_decay": 0.1, "betas": (0.8, 0.95)}, SAMAdamW),
        (torch.optim.SGD, {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1}, SAMSGD),
        (torch.optim.SGD, {"momentum": 0.8, "nesterov": True, "maximize": True}, SAMSGD),
    ],
)
def test_the_optimizer_of_the_same_arithmetic_goes_on_with_everything(
    backend: str, kind: Any, options: dict[str, Any], target: Any
) -> None:
    theirs, torchs = by_torch(kind, 3, **options)
    mine = copy.deepcopy(theirs)
    opt = target([{"params": mine.params[:2]}, {"params": mine.params[2:]}], rho=0.0, backend=backend)
    steps = 3 if kind is torch.optim.SGD else None
    opt.load_state_dict(warm_start(saved_and_loaded(torchs.state_dict()), opt, steps))
    assert [group["lr"] for group in opt.param_groups] == [0.02, 0.01]
    for t in range(3, 9):
        train(torchs, theirs, t)
        train(opt, mine, t)
        for param, other in zip(mine.params, theirs.params, strict=True):
            torch.testing.assert_close(param, other, rtol=1e-12, atol=1e-14)
    assert {int(state["step"]) for state in opt.state_dict()["state"].values()} == {9}


@pytest.mark.parametrize("beta1", [0.9, 0.6])
@pytest.mark.parametrize("target, member", [(Sassha, "Sassha"), (MSassha, "MSassha"), (AdaHessian, "AdaHessian")])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_a_second_order_optimizer_goes_on_from_the_average_of_the_gradients(
    kind: Any, target: Any, member: str, beta1: float
) -> None:
    theirs, torchs = by_torch(kind, 4, **({"momentum": 0.9, "dampening": 0.2} if kind is torch.optim.SGD else {}))
    mine = copy.deepcopy(theirs)
    options = {"lr": 0.03, "betas": (beta1, 0.99), "hessian_interval": INTERVAL, "bias_correction": "update"}
    opt = target([{"params": mine.params[:2]}, {"params": mine.params[2:]}], **options)
    opt.load_state_dict(warm_start(saved_and_loaded(torchs.state_dict()), opt, 4 if kind is torch.optim.SGD else None))

    reference = ReferenceMember([{"params": theirs.params[:2]}, {"params": theirs.params[2:]}], member, **options)
    for param in theirs.params:
        state = torchs.state[param]
        average = state["exp_avg"] if "exp_avg" in state else 0.1 / 0.8 * state["momentum_buffer"]
        average = average / (1 - 0.9**4) * (1 - beta1**4)
        second = "exp_hessian_sq" if member == "AdaHessian" else "exp_hessian"
        reference.state[param] = {"step": 4, "hessian_step": 0, "exp_avg": average, second: torch.zeros_like(average)}
    reference.steps_taken = 4
    for t in range(4, 11):
        opt.step(lambda t=t: mine.loss(t))
        reference.step(lambda t=t: theirs.loss(t))
        for param, other in zip(mine.params, theirs.params, strict=True):
            torch.testing.assert_close(param, other, rtol=RTOL, atol=RTOL)
            for name, value in reference.state[other].items():
                torch.testing.assert_close(
                    opt.state[param][name], torch.as_tensor(value), rtol=RTOL, atol=RTOL, check_dtype=False
                )
    assert {group["lr"] for group in opt.param_groups} == {0.03}


def test_sophia_goes_on_from_the_average_as_it_is() -> None:
    theirs, torchs = by_torch(torch.optim.AdamW, 2)
    opt = SophiaH(theirs.params, lr=0.01)
    one_group = {**torchs.state_dict(), "param_groups": [{**torchs.state_dict()["param_groups"][0]}]}
    one_group["param_groups"][0]["params"] = [0, 1, 2, 3]
    opt.load_state_dict(warm_start(one_group, opt))
    for param in theirs.params:
        assert_same(opt.state[param]["exp_avg"], torchs.state[param]["exp_avg"])
    before = weights(theirs.params)
    opt.zero_grad()
    opt.step(lambda: theirs.loss(2))
    for param, was in zip(theirs.params, before, strict=True):
        assert 0 < float((param.detach() - was * (1 - 0.01 * 0.2)).abs().max()) <= 0.01 * (1 + 1e-12)


@pytest.mark.parametrize(
    "kind, options, target, arguments, steps, match",
    [
        (torch.optim.AdamW, {}, Sassha, {}, None, "bias_correction must be 'update' for a warm start, got 'step'"),
        (torch.optim.AdamW, {}, MSassha, {"bias_correction": "none"}, None, "bias_correction must be .* got 'none'"),
        (torch.optim.AdamW, {}, Sassha, {"bias_correction": "update", "maximize": True}, None, "maximize .* got True"),
        (torch.optim.AdamW, {}, SAMSGD, {}, None, "SAMSGD has no use for the averages exp_avg, exp_avg_sq"),
        (torch.optim.SGD, {"momentum": 0.9}, SAMAdamW, {}, 2, "SAMAdamW has no use for the averages momentum_buffer"),
        (torch.optim.SGD, {"momentum": 0.9}, SAMSGD, {}, None, "steps must be an int >= 1.* got None"),
        (torch.optim.SGD, {"momentum": 0.9}, SAMSGD, {}, 0, "steps must be an int >= 1.* got 0"),
        (torch.optim.SGD, {}, SAMSGD, {}, 2, "no state has exp_avg_sq"),
        (torch.optim.RMSprop, {}, Sassha, {}, None, "no state has exp_avg_sq"),
    ],
)
def test_a_warm_start_that_would_go_wrong_is_refused_by_name(
    kind: Any, options: dict[str, Any], target: Any, arguments: dict[str, Any], steps: Any, match: str
) -> None:
    training, torchs = by_torch(kind, 2, **options)
    opt = target([{"params": training.params[:2]}, {"params": training.params[2:]}], **arguments)
    with pytest.raises((TypeError, ValueError), match=match):
        warm_start(torchs.state_dict(), opt, steps)


def test_a_warm_start_of_other_groups_is_refused() -> None:
    training, torchs = by_torch(torch.optim.AdamW, 2)
    opt = Sassha(training.params, bias_correction="update")
    with pytest.raises(ValueError, match="parameter groups are not those of the optimizer"):
        warm_start(torchs.state_dict(), opt)


def test_a_message_names_the_shape_that_does_not_fit() -> None:
    training, torchs = by_torch(torch.optim.AdamW, 2)
    other = [parameter(1.0, 2.0, dtype=torch.float64) for _ in training.params]
    opt = Sassha([{"params": other[:2]}, {"params": other[2:]}], bias_correction="update")
    with pytest.raises(ValueError, match=r"exp_avg of parameter 0 has shape \(8, 6\)"):
        opt.load_state_dict(warm_start(torchs.state_dict(), opt))


# ---------------------------------------------------------------------------------------------------------------------
# The first layout of this package's state


def read(values: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def loss_of(model: nn.Module, inputs: Tensor) -> Tensor:
    return (model(inputs).sin() - 1).square().mean()


@both_backends
def test_a_checkpoint_of_the_first_layout_goes_on_as_it_did_then_and_as_the_method_says(backend: str) -> None:
    """Groups had no count of the optimizer's steps, and none of the hyperparameters that came later."""
    file = json.loads(FIRST_LAYOUT.read_text())
    saved = copy.deepcopy(file["state_dict"])
    saved["state"] = {
        int(key): {n: read(v, torch.int64 if isinstance(v, int) else torch.float64) for n, v in state.items()}
        for key, state in saved["state"].items()
    }
    assert "steps" not in saved["param_groups"][0] and "hessian_block" not in saved["param_groups"][0]

    def at_checkpoint() -> nn.Module:
        model = nn.Linear(3, 2).double()
        model.load_state_dict({name: read(value) for name, value in file["weights"].items()})
        return model

    model, other = at_checkpoint(), at_checkpoint()
    opt = Sassha(model.parameters(), backend=backend)
    opt.load_state_dict(saved_and_loaded(saved))
    group = opt.param_groups[0]
    options = {name: group[name] for name in ("lr", "rho", "weight_decay", "hessian_interval", "seed")}
    reference = ReferenceSassha(other.parameters(), **options)
    for param, state in zip(other.parameters(), saved["state"].values(), strict=True):
        reference.state[param] = {n: int(v) if n.endswith("step") else v.clone() for n, v in state.items()}
    reference.steps_taken, reference.hessian_evaluations = 4, 2
    for inputs in map(read, file["batches"]):
        opt.step(lambda x=inputs: loss_of(model, x))
        reference.step(lambda x=inputs: loss_of(other, x))
        assert_states_close(list(model.parameters()), opt, list(other.parameters()), reference, 1e-11)
    for name, value in file["weights_later"].items():
        torch.testing.assert_close(model.get_parameter(name).detach(), read(value), rtol=1e-11, atol=1e-12)

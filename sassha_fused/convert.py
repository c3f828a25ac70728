"""State of other optimizers in the form that load_state_dict of this package's takes: the published code's, torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .optimizer import FusedOptimizer

StateDict = dict[str, Any]
AverageOf = Callable[[dict[str, Any], dict[str, Any]], tuple[Tensor, float]]

# The published code's name of what is exp_hessian here.
SECOND_AVERAGE = "exp_hessian_diag"


def is_published(state_dict: StateDict) -> bool:
    """Whether the authors' code has saved this: its second average is there, and ours is not."""
    states = state_dict["state"].values()
    return any(SECOND_AVERAGE in state and "exp_hessian" not in state for state in states)


def from_published(state_dict: StateDict, optimizer: FusedOptimizer) -> StateDict:
    r"""A state_dict of the authors' SASSHA, that for images or that for GPT-2, as an optimizer here loads it.

    Averages and counts are kept, and so are the hyperparameters that both have. The version for images,
    which keeps a correction of D with each state, becomes ``bias_correction="step"``, that for GPT-2 ``"none"``.

    Args:
        state_dict: what ``SASSHA.state_dict()`` of the authors' code returned.
        optimizer: a :class:`Sassha` or :class:`MSassha`, which is to load the result, with the ``hessian_interval`` of
            the run that saved it. It stays as it is.

    Raises:
        ValueError: the state is none of theirs, or the optimizer keeps other averages.
    """
    method = optimizer._run.flat.method
    if method.averages != ("exp_avg", "exp_hessian"):
        raise ValueError(f"optimizer must be a Sassha or an MSassha, got {type(optimizer).__name__}")
    if not is_published(state_dict):
        raise ValueError(f"state_dict: no state has {SECOND_AVERAGE}: is it that of the published SASSHA?")
    interval = int(optimizer.param_groups[0]["hessian_interval"])
    started = {key: state for key, state in state_dict["state"].items() if "step" in state}
    for key, state in started.items():
        if missing := [name for name in ("exp_avg", SECOND_AVERAGE) if name not in state]:
            raise ValueError(f"state_dict: the state of parameter {key!r} has no {', '.join(missing)}")
    for_images = any("bias_correction2" in state for state in started.values())
    states = {}
    for key, state in started.items():
        step = int(state["step"])
        # Theirs counts on from where a script may have set it to 0.
        since = (int(state.get("hessian step") or step) - 1) % interval
        states[key] = {
            "step": torch.tensor(step),
            "hessian_step": torch.tensor(step - since if for_images else -(-step // interval)),
            "exp_avg": state["exp_avg"],
            "exp_hessian": state[SECOND_AVERAGE],
        }
    steps = max(int(state["step"]) for state in states.values())
    own = {
        "hessian_interval": interval,
        "bias_correction": "step" if for_images else "none",
        **_counts(steps, -(-steps // interval)),
    }
    groups = [
        {**{name: value for name, value in group.items() if name != "perturb_eps"}, **own}
        for group in state_dict["param_groups"]
    ]
    return {"state": states, "param_groups": groups}


def warm_start(state_dict: StateDict, optimizer: FusedOptimizer, steps: int | None = None) -> StateDict:
    r"""A state_dict of torch's Adam, AdamW or SGD as an optimizer here loads it, to go on from there.

    Into the optimizer of the same arithmetic, AdamW's into :class:`SAMAdamW` and SGD's into :class:`SAMSGD`,
    everything is kept, hyperparameters too. Into one with a Hessian the average of the gradients is kept and the number
    of steps that are in it; the Hessian's average starts anew in the next step, and hyperparameters are those of the
    optimizer. Where the two have other :math:`\beta_1`, what is kept is the average corrected for its bias. Of SGD's
    buffer b the average is :math:`(1 - \mu) b / (1 - d)`.

    Args:
        state_dict: what ``state_dict()`` of torch's optimizer returned.
        optimizer: which is to load the result. It stays as it is.
        steps: how many steps SGD has taken, which it does not count.

    Raises:
        TypeError, ValueError: the state is of neither, or has no average; or the optimizer has no use for it.
    """
    averages = {name for state in state_dict["state"].values() for name in state}
    method, name = optimizer._run.flat.method, type(optimizer).__name__
    if "exp_avg_sq" in averages:
        if method.second_average == "gradient":
            return state_dict
        average_of: AverageOf = _average_of_adam
    elif "momentum_buffer" in averages:
        if steps is None or isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be an int >= 1, the number of steps that SGD has taken, got {steps!r}")
        state_dict = {
            **state_dict,
            "state": {key: {**state, "step": torch.tensor(steps)} for key, state in state_dict["state"].items()},
        }
        if method.direction == "plain":
            return state_dict
        average_of = _average_of_sgd
    else:
        raise ValueError(
            "state_dict: no state has exp_avg_sq, as Adam's has, or momentum_buffer, as SGD's with momentum"
        )
    if not method.takes_hessian:
        raise ValueError(f"optimizer: {name} has no use for the averages {', '.join(sorted(averages - {'step'}))}")
    return _started_anew(state_dict, optimizer, average_of)


def _started_anew(state_dict: StateDict, optimizer: FusedOptimizer, average_of: AverageOf) -> StateDict:
    """The average of the gradients, beside an average of the Hessian in which there is nothing yet."""
    method, own = optimizer._run.flat.method, optimizer.state_dict()["param_groups"]
    theirs = state_dict["param_groups"]
    if [len(group["params"]) for group in theirs] != [len(group["params"]) for group in own]:
        raise ValueError("state_dict: its parameter groups are not those of the optimizer, in number or in size")
    states = {}
    for their_group, group in zip(theirs, own, strict=True):
        correction = group.get("bias_correction", method.bias_correction)
        if method.direction == "scaled" and correction != "update":
            raise ValueError(
                f"bias_correction must be 'update' for a warm start, got {correction!r}: a Hessian average that has "
                "just begun would be taken for one of as many steps as the gradients'"
            )
        if bool(their_group.get("maximize", False)) != group["maximize"]:
            raise ValueError(f"maximize must be as in state_dict, got {group['maximize']!r}")
        for key in their_group["params"]:
            if not (state := state_dict["state"].get(key)):
                continue
            average, beta1 = average_of(state, their_group)
            step = int(state["step"])
            if correction != "none":
                average = average * ((1 - group["betas"][0] ** step) / (1 - beta1**step))
            states[key] = {
                "step": torch.tensor(step),
                "hessian_step": torch.tensor(0),
                method.averages[0]: average,
                method.averages[1]: torch.zeros_like(average),
            }
    counts = _counts(max((int(state["step"]) for state in states.values()), default=0), 0)
    places = [group["params"] for group in theirs]
    groups = [{**group, **counts, "params": keys} for group, keys in zip(own, places, strict=True)]
    return {"state": states, "param_groups": groups}


def _average_of_adam(state: dict[str, Any], group: dict[str, Any]) -> tuple[Tensor, float]:
    """The average of the gradients, and its decay."""
    return state["exp_avg"], group["betas"][0]


def _average_of_sgd(state: dict[str, Any], group: dict[str, Any]) -> tuple[Tensor, float]:
    return state["momentum_buffer"] * ((1 - group["momentum"]) / (1 - group["dampening"])), group["momentum"]


def _counts(steps: int, evaluations: int) -> dict[str, int]:
    """The optimizer's own counts, as a group has them."""
    return {"steps": steps, "hessian_evaluations": evaluations, "skipped_steps": 0}

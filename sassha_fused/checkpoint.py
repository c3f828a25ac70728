"""What load_state_dict is given: checked against the parameters, and carried past torch's casts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

from .accepted_groups import in_own_types
from .checks import check_groups, foreign_names
from .counts import Counts
from .flat import FlatState
from .method import Method
from .parameter_state import States

# How state is kept here, as the backend is: what a checkpoint says of them stays out.
_OWN = ("hessian_block", "exact_restore")


class AsSaved:
    """Carries one parameter's state through Optimizer.load_state_dict, which would cast it to the parameter's dtype."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state


def check_and_protect(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Refuses a state that is of another kind or of other parameters; wraps each against a change of dtype."""
    method: Method = optimizer._run.flat.method  # type: ignore[attr-defined]
    saved = [dict(group) for group in state_dict["param_groups"]]
    for group, own in zip(saved, optimizer.param_groups, strict=False):
        other_adam = group.get("amsgrad") or group.get("decoupled_weight_decay") is False
        if method.second_average == "gradient" and other_adam:
            raise ValueError("state_dict: that of an Adam with amsgrad or with coupled weight decay is not supported")
        for name in foreign_names(group, method):
            del group[name]
        group.update({name: own[name] for name in _OWN if name in own})
    check_groups([{**optimizer.defaults, **group} for group in saved], method)
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    shapes = {key: param.shape for key, param in zip(keys, params, strict=False)}
    # Under other keys lies what others have put there; empty is what somebody leaves who only asks for it.
    own = {key: state for key, state in state_dict["state"].items() if key in shapes and state}
    for key, state in own.items():
        missing = [name for name in method.states if name not in state]
        if missing:
            raise ValueError(
                f"state_dict: the state of parameter {key!r} has no {', '.join(missing)}: is it that of "
                f"{type(optimizer).__name__}?"
            )
        for name in method.averages:
            if state[name].shape != shapes[key]:
                raise ValueError(
                    f"state_dict: {name} of parameter {key!r} has shape {tuple(state[name].shape)}, the parameter "
                    f"{tuple(shapes[key])}"
                )
    protected = {key: AsSaved(state) for key, state in own.items()}
    return {**state_dict, "state": {**state_dict["state"], **protected}, "param_groups": saved}


def take_in_saved(states: States, groups: list[dict[str, Any]], defaults: dict[str, Any]) -> None:
    """Unwraps what load_state_dict has carried past torch's casts; a group gets the defaults that it lacks."""
    for param, saved in states.items():
        if isinstance(saved, AsSaved):
            states[param] = dict(saved.state)
    for group in groups:
        for name, value in defaults.items():
            if name != "differentiable":  # torch's own addition
                group.setdefault(name, value)


def with_plain_states(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The states as dicts of Python's own, which note no edits and which torch.load reads with weights_only.

    Averages have a number for each element.
    """
    flat: FlatState = optimizer._run.flat  # type: ignore[attr-defined]
    params = dict(enumerate(param for group in optimizer.param_groups for param in group["params"]))
    return {**state_dict, "state": flat.written_out(state_dict["state"], lambda key: params.get(key, key))}


def publish_counts(groups: list[dict[str, Any]], counts: Counts) -> None:
    """Writes the optimizer's own counts into the groups, where torch's state_dict has a place for them.

    Hyperparameters that somebody has edited and no step has accepted become numbers that torch.load reads.
    """
    counts.catch_up()
    for group in groups:
        in_own_types(group)
        group["steps"] = counts.steps
        group["hessian_evaluations"] = counts.evaluations
        group["skipped_steps"] = counts.skipped


def counts_of(groups: list[dict[str, Any]], states: dict[Tensor, dict[str, Any]]) -> tuple[int, int, int]:
    """The optimizer's counts as a state_dict has them; of an older one, which lacks steps, those of its parameters."""
    steps = [group["steps"] for group in groups if "steps" in group]
    steps = steps or [int(states[p]["step"]) for p in states if isinstance(p, Tensor) and "step" in states[p]]
    return (
        max(steps, default=0),
        max((group.get("hessian_evaluations", 0) for group in groups), default=0),
        max((group.get("skipped_steps", 0) for group in groups), default=0),
    )


def initialises_state(
    groups: list[dict[str, Any]], states: dict[Tensor, dict[str, Any]], grads: Sequence[Tensor]
) -> bool:
    """Whether torch.distributed.checkpoint has state made: by a step with lr 0 on gradients of 0."""
    return (
        len(grads) > 0
        and not states
        and not any(grad.requires_grad for grad in grads)
        and all(float(group["lr"]) == 0 for group in groups)
        and not any(bool(grad.any()) for grad in grads)
    )

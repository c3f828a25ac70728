"""What the parameter groups said when they were last checked; what was edited since is checked before it counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral, Real
from operator import itemgetter
from typing import Any

from .checks import check_groups, is_single
from .method import Method

_NUMBERS = ("lr", "eps", "weight_decay", "rho", "hessian_power", "momentum", "dampening", "clip_threshold")
_INTEGERS = ("hessian_interval", "hessian_warmup", "hessian_samples", "hessian_batches", "seed", "hessian_block")
lr_of = itemgetter(0)  # of Method.values_of


def ascents_of(groups: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What the groups say of the way to w', by which w may have to be worked out."""
    return [tuple(map(group.get, ("rho", "ascent", "exact_restore"))) for group in groups]


def refuse_other_ascents(before: list[tuple[Any, ...]], groups: Sequence[dict[str, Any]]) -> None:
    """ValueError where groups say otherwise now."""
    if before != ascents_of(groups):
        raise ValueError(
            "rho, ascent or exact_restore was edited between perturb() and step(), where exact_restore is False and "
            "they tell the way back to w: edit groups before perturb() or after step()"
        )


class AcceptedGroups:
    """The groups as they were accepted.

    Attributes:
        groups: copies of them.
        method: whose groups they are.
        values: the hyperparameters of each; whoever edits a group, a scheduler for one, puts another object there.
        single: whether a step has but one pass.
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self.single = False
        self.forget()

    def forget(self) -> None:
        """The groups count as edited."""
        self.values: list[tuple[Any, ...]] = []
        self.groups: list[dict[str, Any]] = []

    def accept(self, groups: Sequence[dict[str, Any]]) -> None:
        """Accepts the groups as they are.

        Raises:
            TypeError, ValueError: one is wrong; none is accepted.
        """
        check_groups(groups, self.method, wait=False, accepted=self.groups)
        for group in groups:
            in_own_types(group)
        self.single = is_single(groups)
        self.groups = list(map(dict, groups))
        self.values = list(map(self.method.values_of, groups))


def in_own_types(group: dict[str, Any]) -> None:
    """Numbers and sequences of whatever library become Python's own, which torch.load reads with weights_only.

    What is none of these, and so not accepted, stays; what is missing too.
    """
    for names, kind, own in ((_NUMBERS, Real, float), (_INTEGERS, Integral, int)):
        for name in group.keys() & names:
            group[name] = _own(group[name], kind, own)
    betas = group.get("betas")
    if isinstance(betas, Sequence) and not (type(betas) is tuple and all(type(beta) is float for beta in betas)):
        group["betas"] = tuple(_own(beta, Real, float) for beta in betas)


def _own(value: Any, kind: type, own: Callable[[Any], Any]) -> Any:
    return value if type(value) in (int, float, bool) or not isinstance(value, kind) else own(value)

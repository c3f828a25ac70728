"""The published optimizer's interface over this package's: its training scripts run with another import."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.amp import GradScaler

from .checkpoint import initialises_state
from .checks import check_choice, check_integer, is_single, refuse_unperturbed
from .convert import SECOND_AVERAGE, from_published, is_published
from .curvature.taking import take_part
from .family import Sassha
from .gradients import detach, grads_of, of_groups
from .hessian_pass import NO_GRAPH
from .step import Step

# What the kernels add to the norm by which they divide the gradient.
PERTURB_EPS = 1e-12

# What state may hold for those who read or write it by its published names; nothing here reads it.
THEIRS = (SECOND_AVERAGE, "hessian step")


class Scheduler(Protocol):
    """What gives a hyperparameter its value, step after step: the published ones, or any of your own."""

    def step(self) -> float:
        """The value of the coming step."""


class SASSHA(Sassha):
    r""":class:`sassha_fused.Sassha` with the constructor and the methods of the authors' code, in both its versions.

    That for images::

        from sassha_fused.compat import SASSHA

        criterion(model(x), y).backward()
        optimizer.perturb_weights(zero_grad=True)
        criterion(model(x), y).backward(create_graph=True)
        optimizer.unperturb()
        optimizer.step()
        optimizer.zero_grad()

    That for GPT-2, with micro-batches, schedules of :math:`\rho` and :math:`\alpha`, and no bias correction. It is told
    by its calls: ``rho_scheduler``, ``set_hessian()``, ``step(iter_num)``. A Hessian step, of which others leave out
    ``zero_hessian``, ``create_graph`` and ``set_hessian``, is::

        optimizer.zero_hessian()
        for x, y in micro_batches:
            (criterion(model(x), y) / len(micro_batches)).backward()
        optimizer.perturb_weights()
        for x, y in micro_batches:
            (criterion(model(x), y) / len(micro_batches)).backward(create_graph=True)
            optimizer.set_hessian()
        optimizer.unperturb()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(iter_num)
        optimizer.zero_grad()

    The equation is that of :class:`sassha_fused.Sassha`. So Hessian products are taken at :math:`w'`, by
    ``unperturb()`` at the latest; a power that changes holds for the bias correction too, at once; a step that is not
    finite is skipped; and a run that is resumed goes on bit for bit. ``load_state_dict`` also takes what the authors'
    code saved.

    Args:
        params: parameters or dicts of parameter groups.
        hessian_power_scheduler: gives :math:`\alpha` before each step; may be set later, as an attribute.
        lr, betas, weight_decay, rho, eps, adaptive, seed: as in :class:`sassha_fused.Sassha`.
        lazy_hessian: k, its ``hessian_interval``.
        n_samples: S, its ``hessian_samples``.
        perturb_eps: :math:`10^{-12}`; others are refused.
        grad_reduce: "mean" over processes, with :func:`sassha_fused.data_parallel`; "sum" in one process alone.
        rho_scheduler: gives :math:`\rho` before each perturbation; may be set later, as an attribute.
        options: other arguments of :class:`sassha_fused.Sassha`: ``hessian_power``, ``bias_correction``, ``backend``...

    Raises:
        TypeError, ValueError: naming the argument and its value, before anything has changed.

    References:
        Shin, Lee, Chung, Lee: Sassha: Sharpness-aware Adaptive Second-order Optimization with Stable Hessian
        Approximation. ICML 2025, arXiv 2502.18153; code: github.com/LOG-postech/Sassha.
    """

    def __init__(
        self,
        params: Iterable[Any],
        hessian_power_scheduler: Scheduler | None = None,
        lr: float | Tensor = 0.15,
        betas: Sequence[float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        rho: float = 0.0,
        lazy_hessian: int = 10,
        n_samples: int = 1,
        perturb_eps: float = PERTURB_EPS,
        eps: float = 1e-4,
        adaptive: bool = False,
        grad_reduce: str = "mean",
        seed: int = 0,
        *,
        rho_scheduler: Scheduler | None = None,
        **options: Any,
    ) -> None:
        check_integer("lazy_hessian", lazy_hessian, smallest=1)
        check_integer("n_samples", n_samples, smallest=1, bits=32)
        check_choice("grad_reduce", grad_reduce, ("mean", "sum"))
        self._grad_reduce = grad_reduce
        if perturb_eps != PERTURB_EPS:
            raise ValueError(f"perturb_eps must be {PERTURB_EPS}, the kernels' own, got {perturb_eps!r}")
        self.hessian_power_scheduler, self.rho_scheduler = hessian_power_scheduler, rho_scheduler
        self._chosen_bias_correction = "bias_correction" in options
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            rho=rho,
            adaptive=adaptive,
            hessian_interval=lazy_hessian,
            hessian_samples=n_samples,
            seed=seed,
            **options,
        )

    @torch.no_grad()
    def perturb_weights(self, zero_grad: bool = True) -> None:
        """Takes the weights to w' by the gradients in ``.grad``, and clears these.

        Raises:
            ValueError: zero_grad is False: the gradients at w would be added to those at w'.
        """
        if not zero_grad:
            raise ValueError(
                "zero_grad must be True, got False: the second backward would add its gradients to those of the first, "
                "which have served"
            )
        self.update_rho_t()
        self._run.forget_watch()  # that of a first pass within hessian_pass()
        self.perturb()

    def unperturb(self) -> None:
        """Takes the weights back to w, once the Hessian products that are due have been taken at w'.

        Raises:
            ValueError: they are due, and the gradients of the second backward have no graph. The weights are then at w.
        """
        step = self._run.step
        self._end_micro_batches()
        self.restore()
        if step is not None and self._run.step is None and grads_of(of_groups(self.param_groups)):
            raise ValueError(NO_GRAPH)

    def _end_micro_batches(self) -> None:
        """What set_hessian() has added is the step's Hessian."""
        step = self._run.step
        if step is not None and step.curvature is not None and step.curvature.parts:
            step.curvature.conclude()

    @torch.no_grad()
    def zero_hessian(self) -> None:
        """Before the first micro-batch of a step: forgets the products of set_hessian() that no step has used."""
        run = self._run
        if run.step is not None and run.step.curvature is not None:
            run.step.curvature.forget_parts()
        elif run.step is None and self.hessian_due and is_single(self.param_groups):
            with run.only_pass(self.param_groups):
                pass  # whose watch stays, and sees the gradients of the first micro-batch arrive

    @torch.no_grad()
    def set_hessian(self) -> None:
        """After each micro-batch's ``backward(create_graph=True)``: adds its Hessian product, and frees its graph.

        On a lazy step it frees the graph alone.

        Raises:
            ValueError: rho is not 0, and the weights are at w; or a gradient has no graph.
        """
        run, groups = self._run, self.param_groups
        if run.step is None:
            self._begin_unperturbed()
        step: Step = run.step  # type: ignore[assignment]
        if step.curvature is not None:
            step.micro_batches.count = step.micro_batches.count + 1 if step.curvature.parts else 1
        if step.awaits_products:
            take_part(step, is_last=False)
        detach(of_groups(groups))  # on a lazy step, or after as many as hessian_batches says

    def _begin_unperturbed(self) -> None:
        """Makes the step whose only pass is at w, and of whose gradients the first are there."""
        run, groups = self._run, self.param_groups
        if not is_single(groups):
            refuse_unperturbed(groups, along_momentum=False)
        self._follow_gpt2()
        step = Step(run, groups)
        selections = run.flat.select(groups, run.states, run.counts.catch_up)
        if run.counts.next_is_scheduled(groups[0]) or any(selection.lacks_hessian() for selection in selections):
            step.make_curvature()

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        iter_num: Any = None,
        closure: Callable[[], Any] | Sequence[Callable[[], Any]] | None = None,
        *,
        scaler: GradScaler | None = None,
    ) -> Tensor | None:
        """The rest of the step, from the gradients in ``.grad``; or with a closure the whole of it.

        Args:
            iter_num: GPT-2's: the number of this step, from 0, by which the Hessian's schedule goes: also where steps
                were skipped, which it counts. A closure may stand in its place.
            closure, scaler: as in :class:`sassha_fused.Sassha`.
        """
        self._sync_gradient()
        self._end_micro_batches()
        if callable(iter_num) or isinstance(iter_num, (list, tuple)):
            iter_num, closure = None, iter_num
        if iter_num is not None:
            check_integer("iter_num", iter_num, smallest=0)
            self._follow_gpt2()
        if not initialises_state(self.param_groups, self._run.states, grads_of(of_groups(self.param_groups))):
            self.update_hessian_power()
        loss = super().step(closure, scaler=scaler)
        if iter_num is not None:
            counts = self._run.counts
            counts.catch_up()
            counts.set(int(iter_num) + 1, counts.evaluations, counts.skipped)
        return loss

    @property
    def hessian_power_t(self) -> float:
        """The power of the last step, or of the first."""
        return float(self.param_groups[0]["hessian_power"])

    @property
    def rho_t(self) -> float:
        """The radius of the last perturbation, or of the first."""
        return float(self.param_groups[0]["rho"])

    def update_hessian_power(self) -> float:
        """Asks the scheduler, where there is one, for the power of the coming step; step() calls it."""
        if self.hessian_power_scheduler is not None:
            self._set("hessian_power", self.hessian_power_scheduler.step())
        return self.hessian_power_t

    def update_rho_t(self) -> float:
        """Asks the scheduler, where there is one, for the radius of the coming step; perturb_weights() calls it."""
        if self.rho_scheduler is not None:
            self._follow_gpt2()
            self._set("rho", self.rho_scheduler.step())
        return self.rho_t

    def _set(self, name: str, value: Any) -> None:
        for group in self.param_groups:
            group[name] = value

    def _follow_gpt2(self) -> None:
        """The version for GPT-2 corrects no bias; who has asked for a correction gets it all the same."""
        if not self._chosen_bias_correction:
            self._set("bias_correction", "none")

    def get_params(self) -> Iterator[Tensor]:
        """The parameters that are trained."""
        return (param for param in of_groups(self.param_groups) if param.requires_grad)

    def _sync_gradient(self) -> None:
        """Refuses several processes whose gradients and products nobody would bring together."""
        distributed = torch.distributed
        world = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
        if world > 1 and (self._run.processes is None or self._grad_reduce == "sum"):
            raise ValueError(
                f"one of {world} processes, with grad_reduce {self._grad_reduce!r}: wrap the model in "
                "DistributedDataParallel, and call sassha_fused.data_parallel(model, optimizer) once, with 'mean'"
            )

    def state_dict(self) -> dict[str, Any]:
        """That of :class:`sassha_fused.Sassha`, with the second average by its published name too."""
        saved = super().state_dict()
        for state in saved["state"].values():
            if "exp_hessian" in state:
                state[SECOND_AVERAGE] = state["exp_hessian"]
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict of this class, of :class:`sassha_fused.Sassha`, or of the authors' code."""
        if is_published(state_dict):
            state_dict = from_published(state_dict, self)
        states = state_dict["state"].items()
        plain = {key: {n: v for n, v in state.items() if n not in THEIRS} for key, state in states}
        super().load_state_dict({**state_dict, "state": plain})

    def __getstate__(self) -> dict[str, Any]:
        names = ("hessian_power_scheduler", "rho_scheduler", "_chosen_bias_correction", "_grad_reduce")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}

"""Sassha: the schedule of the passes over the parameters. What a pass computes stands in the operators (eager.py)."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from . import hvp as hessian_products
from .flag import Flag
from .interrupts import uninterrupted
from .ops import check_backend
from .saved import AsSaved, check_and_protect
from .state import Bucket, Buckets, Selection
from .validation import (
    BIAS_CORRECTIONS,
    DTYPES,
    check_choice,
    check_gradients,
    check_hyperparameters,
    check_parameter,
)

_REQUIRES_GRAD = attrgetter("requires_grad")

# One value for all groups: they belong to the random stream, which the parameters share.
_SHARED = ("hessian_samples", "seed")

_Result = TypeVar("_Result")

# A selection, and its Hessian estimates where this is a Hessian step for it.
Part = tuple[Selection, Sequence[Tensor]]


@dataclass
class _Perturbation:
    """What perturb() leaves for the rest of the step."""

    selections: list[Selection]
    norm: Tensor
    due: bool = False  # a Hessian step
    active: bool = True  # the weights are at w'
    parts: list[Part] | None = None  # set when restore() ran before step()


@dataclass
class StepTaken:
    """What a step does to the host's counts, unless the device skipped it."""

    skipped: Tensor
    selections: list[Selection]
    evaluated: bool  # a Hessian step


class Sassha(Optimizer):
    r"""Sharpness-aware adaptive second-order optimizer with a stable, lazily refreshed Hessian diagonal.

    At step :math:`t = 1, 2, \dots` with :math:`g = \nabla f(w)` and one norm :math:`N = \|g\|_2` over all parameters:

    .. math::
        w' &= w + \rho g / (N + 10^{-12}), \qquad \tilde g = \nabla f(w') \\
        H &= \tfrac1S \textstyle\sum_s z_s \cdot \nabla \langle \tilde g, z_s \rangle (w'), \quad
        D \leftarrow \beta_2 D + (1 - \beta_2) |H|, \quad c_2 = 1 - \beta_2^t
        \qquad \text{every } k \text{ steps} \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) \tilde g, \qquad c_1 = 1 - \beta_1^t \\
        w &\leftarrow w (1 - \eta \lambda) - \frac{\eta}{c_1} \frac{m}{(D / c_2)^\alpha + \epsilon}

    Closure style, where the closure returns the loss and the optimizer runs every backward (a closure that also calls
    ``loss.backward(create_graph=opt.hessian_due)`` works as well)::

        loss = opt.step(lambda: criterion(model(x), y))

    Phase style::

        criterion(model(x), y).backward()
        opt.perturb()
        criterion(model(x), y).backward(create_graph=opt.hessian_due)
        opt.step(); opt.zero_grad()

    A step whose loss, gradients or Hessian products are not finite leaves no trace but in :attr:`skipped_steps`. A
    parameter without a gradient in either pass is not touched, and its counts stand still.

    Args:
        params: parameters or dicts of parameter groups; float64, float32, bfloat16 or float16, dense, real. State is
            float64 for float64 parameters, else float32.
        lr: learning rate :math:`\eta`, a float or a tensor of one element.
        betas: :math:`\beta_1, \beta_2` of the gradient's and the Hessian's running averages.
        eps: :math:`\epsilon`, added outside the power. With 0, weights whose Hessian is 0 are divided by 0.
        weight_decay: decoupled weight decay :math:`\lambda`.
        rho: radius of the perturbation.
        adaptive: scale the perturbation by the weights (ASAM): :math:`N = \| |w| g \|_2`,
            :math:`w' = w + \rho w^2 g / N`.
        hessian_interval: k, steps from one Hessian evaluation to the next.
        hessian_warmup: every step up to this one is a Hessian step.
        hessian_samples: S, probes per evaluation.
        hessian_power: :math:`\alpha` in (0, 1].
        hvp: source of the Hessian products: ``"autograd"``, exact, by double backward.
        bias_correction: ``"step"`` as above, as published; ``"update"``: :math:`c_2 = 1 - \beta_2^n`, n counting the
            Hessian updates.
        maximize: maximise the objective.
        seed: of the random signs, which depend on nothing else: not on device, backend or the global generators.
        backend: ``"auto"`` or a name from :func:`sassha_fused.available_backends`.

    Raises:
        TypeError, ValueError: naming the argument and its value, before anything has changed.

    References:
        Shin, Lee, Chung, Lee: Sassha: Sharpness-aware Adaptive Second-order Optimization with Stable Hessian
        Approximation. ICML 2025, arXiv 2502.18153.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        *,
        rho: float = 0.2,
        adaptive: bool = False,
        hessian_interval: int = 10,
        hessian_warmup: int = 0,
        hessian_samples: int = 1,
        hessian_power: float = 0.5,
        hvp: str = "autograd",
        bias_correction: str = "step",
        maximize: bool = False,
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        check_choice("hvp", hvp, tuple(hessian_products.SOURCES))
        check_backend(backend)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rho": rho,
            "adaptive": adaptive,
            "hessian_interval": hessian_interval,
            "hessian_warmup": hessian_warmup,
            "hessian_samples": hessian_samples,
            "hessian_power": hessian_power,
            "bias_correction": bias_correction,
            "maximize": maximize,
            "seed": seed,
        }
        check_hyperparameters(defaults)
        self._hvp, self._backend = hvp, backend
        self._evaluations = 0
        self._skipped_steps = 0
        self._reset()
        super().__init__(params, defaults)

    def _reset(self) -> None:
        """Forgets what is not state: buckets are made from state again when they are needed."""
        self._buckets = Buckets(self._backend)
        self._perturbation: _Perturbation | None = None
        self._watch: hessian_products.GraphWatch | None = None
        self._verdict: tuple[Flag, StepTaken] | None = None
        self._used: tuple[weakref.ref[Tensor], int] | None = None
        self._first_pass = False
        # While graphs.py records a step into a CUDA graph nothing runs, and nothing is counted.
        self.capturing = False
        self.captured: StepTaken | None = None

    # ---------------------------------------------------------------- the passes

    @property
    def perturbed(self) -> bool:
        """Whether the weights are at w'."""
        return self._perturbation is not None and self._perturbation.active

    @property
    def hessian_due(self) -> bool:
        """Whether the second pass of this step, or of the next if none is under way, needs a graph of its gradients."""
        if self._perturbation is not None:
            return self._perturbation.due
        if self._first_pass:
            return False
        due = any(self.due_rows()) or self._buckets.stale
        if due:
            self._watch_for_graph()
        return due

    def buckets(self) -> list[Bucket]:
        """Where the state lies now; nowhere, if the next step will lay it out anew."""
        if self._buckets.outdated(self.param_groups, self.state):
            return []
        return [bucket for bucket, _ in self._buckets]

    def due_rows(self) -> list[list[int]]:
        """The parameters for which the next step is a Hessian step, as rows of each bucket."""
        self._settle()
        return [Selection.all_of(*pair).due() for pair in self._buckets]

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped because something in them was not finite."""
        self._settle()
        return self._skipped_steps

    @torch.no_grad()
    def perturb(self) -> None:
        """Takes the weights to w' by the gradients in ``.grad``, and clears these.

        Raises:
            ValueError: the weights are at w' already, or a gradient is sparse or of another shape, dtype or device.
        """
        if self.perturbed:
            raise ValueError("perturb() called twice: call step(), or restore() to give the step up")
        self._close()
        self._with_selections(self._perturb_all)

    @torch.no_grad()
    def restore(self) -> None:
        """Takes the weights back to w, bit for bit, before step() does; does nothing where they are there already.

        Hessian products that are due are taken first, at w', and kept for step().
        """
        perturbation = self._perturbation
        if perturbation is None or not perturbation.active:
            return
        parts: list[Part] = []
        try:
            selections = self._participants(perturbation)
            if self._may_measure(selections) or not any(selection.due() for selection in selections):
                parts = self._measure(selections)
        finally:
            with uninterrupted():
                self._put_back(perturbation.selections)
                perturbation.active = False
                perturbation.parts = parts
                if not parts:
                    self._close()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Performs one step.

        Args:
            closure: computes and returns the loss; called twice, at w and at w'. Without it, the rest of the step after
                perturb() and the second backward; or, without perturb(), a step with w' = w.

        Returns:
            The loss of the first pass, detached; None without a closure.

        Raises:
            TypeError, ValueError: the closure is not callable or returns no scalar tensor; a gradient is sparse or of
                another shape, dtype or device; a Hessian step whose gradients carry no graph; gradients used already.
        """
        if closure is not None and not callable(closure):
            raise TypeError(f"closure must be callable, got {closure!r}")
        try:
            if closure is None:
                self._finish_step([])
                return None
            self.restore()
            self._close()
            self._first_pass = True
            first_loss = self._run(closure, create_graph=False)
            self.perturb()
            self._first_pass = False
            if self._perturbation is not None and self._perturbation.selections:
                second_loss = self._run(closure, create_graph=self.hessian_due)
                self._finish_step([first_loss, second_loss])
            else:
                self._close()
        except BaseException:
            self._give_up()
            if closure is not None:
                self.zero_grad()  # lets go of a graph that the interrupted pass may have left
            raise
        return first_loss

    def _run(self, closure: Callable[[], Tensor], create_graph: bool) -> Tensor:
        """One pass: the closure, and backward unless the closure has run it; returns the loss, detached."""
        params = [param for group in self.param_groups for param in group["params"]]
        for param in params:
            param.grad = None
        with torch.enable_grad():
            loss = closure()
            if not isinstance(loss, Tensor):
                raise TypeError(f"closure must return the loss as a tensor, got {loss!r}")
            if loss.numel() != 1:
                raise ValueError(f"closure must return a scalar loss, got a tensor of shape {tuple(loss.shape)}")
            if all(param.grad is None for param in params):
                trainable = any(map(_REQUIRES_GRAD, params))
                if trainable and not loss.requires_grad:
                    raise ValueError(
                        "closure must return a loss that requires grad, or call loss.backward() itself; got one "
                        "that was detached or computed under torch.no_grad()"
                    )
                try:
                    if loss.requires_grad:
                        _backward(loss, create_graph)
                except RuntimeError as error:
                    # Where all is frozen, a closure that runs backward itself leaves nothing to know it by.
                    if trainable or "backward through the graph a second time" not in str(error):
                        raise
        return loss.detach()

    def _finish_step(self, losses: Sequence[Tensor]) -> None:
        """From the second gradients to the new weights: Hessian products, checks, and the update of each bucket."""
        self._settle()
        perturbation = self._perturbation
        if perturbation is None:
            selections, norm = self._with_selections(lambda chosen: (chosen, self._norm(chosen)))
            self._refuse_used_gradients(selections)
            parts = self._measure(selections)
        else:
            norm = perturbation.norm
            parts = perturbation.parts or self._measure(self._participants(perturbation))
        if not parts:
            with uninterrupted():
                if perturbation is not None and perturbation.active:
                    self._put_back(perturbation.selections)
                self._close()
            return
        # Of several parts none may be written before all are known to be finite; one alone, update_ itself looks at.
        alone = perturbation is not None and len(parts) == 1
        guards = [norm, *map(_guard, losses), *self._lr_tensors()]
        if not alone:
            if perturbation is not None:
                guards.append(self._norm([selection for selection, _ in parts]))
            guards += [selection.bucket.operators.grad_norm(found, (), False) for selection, found in parts if found]
        self._update_all(parts, guards, guard_grads=alone)
        if perturbation is not None:
            first = parts[0][0].grads[0]
            self._used = (weakref.ref(first), first._version)

    def _perturb_all(self, selections: list[Selection]) -> None:
        alone = len(selections) == 1
        if alone:
            norm = torch.empty((), dtype=torch.float64, device=selections[0].bucket.device)
        else:
            norm = self._norm(selections)
        self._perturbation = perturbation = _Perturbation([], norm)
        try:
            with uninterrupted(), _explained(selections):
                for selection in selections:
                    self._perturb(selection, norm, measure=alone)
                    perturbation.selections.append(selection)
            # Only now: the device has this step's first pass to work on while the host waits for the step before.
            self._settle()
            perturbation.due = any(selection.due() for selection in selections)
            if perturbation.due:
                self._watch_for_graph()
        except BaseException:
            self._give_up()
            raise
        for selection in selections:
            selection.grads = ()
            for param in selection.params:
                param.grad = None

    def _perturb(self, selection: Selection, norm: Tensor, measure: bool) -> None:
        group, bucket = selection.group, selection.bucket
        bucket.operators.perturb_(
            selection.params,
            selection.grads,
            bucket.backup,
            selection.offsets,
            norm.to(bucket.device, non_blocking=True),
            measure,
            group["rho"],
            group["adaptive"],
            group["maximize"],
        )
        selection.wrote_params()

    def _update_all(self, parts: Sequence[Part], guards: Sequence[Tensor], guard_grads: bool) -> None:
        """From w' to the new weights; where an update fails, back to w."""
        perturbation = self._perturbation
        with uninterrupted(), _explained([selection for selection, _ in parts]):
            passes = [self._update_pass(*part, guards, guard_grads) for part in parts]
            if perturbation is None or not perturbation.active:
                for selection, _ in parts:
                    torch._foreach_copy_(selection.backups(), list(selection.params))
            else:
                self._put_back_bystanders(perturbation, parts)
            try:
                for update in passes:
                    update()
            except BaseException:
                if not self.capturing:
                    self._put_back([selection for selection, _ in parts])
                # Should one bucket's update have gone through before another's failed, its state knows its counts.
                self._buckets = Buckets(self._backend)
                raise
            selections = [selection.holding(()) for selection, _ in parts]
            taken = StepTaken(selections[0].bucket.skipped, selections, any(products for _, products in parts))
            if self.capturing:
                self.captured = taken
            else:
                self.await_verdict(taken)
            self._close()

    def _update_pass(
        self, selection: Selection, products: Sequence[Tensor], guards: Sequence[Tensor], guard_grads: bool
    ) -> Callable[[], None]:
        """The update of one bucket, ready to run: what is wrong with its scalars is found before any bucket's has."""
        group, bucket, lr = selection.group, selection.bucket, selection.group["lr"]
        is_tensor = isinstance(lr, Tensor)
        beta1, beta2 = group["betas"]
        arguments = (
            selection.params,
            selection.grads,
            products,
            bucket.backup,
            bucket.exp_avg,
            bucket.exp_hessian,
            bucket.counts,
            bucket.skipped,
            selection.offsets,
            selection.rows,
            [guard.to(bucket.device, non_blocking=True) for guard in guards],
            guard_grads,
            lr.to(bucket.device, non_blocking=True) if is_tensor else None,
            0.0 if is_tensor else float(lr),
            float(beta1),
            float(beta2),
            float(group["eps"]),
            float(group["weight_decay"]),
            float(group["hessian_power"]),
            BIAS_CORRECTIONS.index(group["bias_correction"]),
            bool(group["maximize"]),
        )

        def run() -> None:
            bucket.operators.update_(*arguments)
            selection.wrote_params()

        return run

    def _lr_tensors(self) -> list[Tensor]:
        return [_guard(group["lr"]) for group in self.param_groups if isinstance(group["lr"], Tensor)]

    # ---------------------------------------------------------------- parts of a pass

    def _with_selections(self, act: Callable[[list[Selection]], _Result]) -> _Result:
        """What act makes of the parameters that have a gradient."""
        selections = self._buckets.select(self.param_groups, self.state, self._settle)
        try:
            return act(selections)
        except (RuntimeError, TypeError, ValueError):
            if self._buckets.are_current():
                raise
        # A part of the model has moved to another device or dtype, and its state moves along.
        self._buckets.stale = True
        return act(self._buckets.select(self.param_groups, self.state, self._settle))

    def _participants(self, perturbation: _Perturbation) -> list[Selection]:
        """Those perturbed parameters that have a gradient in the second pass too."""
        selections = (selection.with_gradients() for selection in perturbation.selections)
        return [selection for selection in selections if selection.params]

    def _norm(self, selections: Sequence[Selection]) -> Tensor:
        """The norm of the gradients over all selections, a 0-d float64 tensor."""
        # A pass over a single selection checks it itself; of several, all are checked before one is written.
        several = len(selections) > 1
        with _explained(selections):
            norms = [
                selection.bucket.operators.grad_norm(
                    selection.grads,
                    selection.params if several or selection.group["adaptive"] else (),
                    selection.group["adaptive"],
                )
                for selection in selections
            ]
        if len(norms) == 1:
            return norms[0]
        if not norms:
            return torch.zeros((), dtype=torch.float64)
        return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))

    def _may_measure(self, selections: Sequence[Selection]) -> bool:
        """Whether what is needed to take Hessian products is there."""
        return (
            not hessian_products.SOURCES[self._hvp].needs_graph
            or (self._watch is not None and self._watch.built)
            or any(grad.requires_grad for selection in selections for grad in selection.grads)
        )

    def _measure(self, selections: Sequence[Selection]) -> list[Part]:
        """Splits the selections into those due, with their Hessian estimates, and the others; frees the graphs."""
        due, lazy = [], []
        for selection in selections:
            positions = selection.due()
            if positions:
                due.append(selection.at(positions))
            if len(positions) < len(selection.params):
                lazy.append(selection.but(positions))
        if due and not self._may_measure(selections):
            raise ValueError(hessian_products.NO_GRAPH)
        estimates: list[list[Tensor]] = []
        if due:
            first = self.param_groups[0]
            source = hessian_products.SOURCES[self._hvp]
            if not self.capturing:
                self.number_evaluation()
            with _explained(due):
                estimates = hessian_products.estimate(source, due, first["hessian_samples"], first["seed"])
        if due or any(any(map(_REQUIRES_GRAD, selection.grads)) for selection in lazy):
            self._detach_gradients([*due, *lazy])
        return [*zip(due, estimates, strict=True), *((selection, ()) for selection in lazy)]

    def number_evaluation(self) -> None:
        """Tells the devices the index of this Hessian evaluation, on which the random signs depend."""
        for bucket, _ in self._buckets:
            bucket.evaluation.fill_(self._evaluations)

    def _detach_gradients(self, selections: Sequence[Selection]) -> None:
        """Lets go of the graph: gradients made with create_graph=True form cycles with their parameters."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None and param.grad.requires_grad:
                    param.grad = param.grad.detach()
        for selection in selections:
            selection.grads = [param.grad for param in selection.params if param.grad is not None]

    def _put_back(self, selections: Sequence[Selection]) -> None:
        for selection in selections:
            if selection.params:
                torch._foreach_copy_(list(selection.params), selection.backups())

    def _put_back_bystanders(self, perturbation: _Perturbation, parts: Sequence[Part]) -> None:
        """Restores what was perturbed but has no second gradient; the update restores the others itself."""
        updated = sum(len(selection.params) for selection, _ in parts)
        if updated == sum(len(selection.params) for selection in perturbation.selections):
            return
        moving = {param for selection, _ in parts for param in selection.params}
        for selection in perturbation.selections:
            self._put_back([selection.at([i for i, param in enumerate(selection.params) if param not in moving])])

    def _close(self) -> None:
        """Ends the step that is under way, if any."""
        if self._watch is not None:
            self._watch.remove()
        self._watch = self._perturbation = None

    def _watch_for_graph(self) -> None:
        if self._watch is None and hessian_products.SOURCES[self._hvp].needs_graph:
            params = [param for group in self.param_groups for param in group["params"] if param.requires_grad]
            self._watch = hessian_products.GraphWatch(params) if params else None

    def _give_up(self) -> None:
        """After an exception in a step: the weights go back to w, and the step is over."""
        self._first_pass = False
        with uninterrupted():
            try:
                # What was captured has not run: the weights have not moved, and the backup is that of a step before.
                if self.perturbed and not self.capturing:
                    self._put_back(self._perturbation.selections)  # type: ignore[union-attr]
            finally:
                self._close()

    def _refuse_used_gradients(self, selections: Sequence[Selection]) -> None:
        if self._used is None or not selections:
            return
        gradient, version = self._used
        if any(grad is gradient() and grad._version == version for selection in selections for grad in selection.grads):
            raise ValueError("step() called twice after one perturb(): these gradients were used by the step before")

    def await_verdict(self, taken: StepTaken) -> None:
        """Counts a step as soon as the counts are needed, when it is known whether the device skipped it."""
        self._verdict = Flag(taken.skipped), taken

    def _settle(self) -> None:
        """Brings the host's counts up to date with what the device did in the last step."""
        if self._verdict is None:
            return
        with uninterrupted():
            (skipped, taken), self._verdict = self._verdict, None
            if skipped.read():
                self._skipped_steps += 1
                return
            for selection in taken.selections:
                selection.count_step()
            self._evaluations += taken.evaluated

    # ---------------------------------------------------------------- groups and state

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group, at any time; its parameters come last in the order of the random signs."""
        self.restore()
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_hyperparameters(group)
            for param in group["params"]:
                check_parameter(param)
            for name in _SHARED:
                if group[name] != self.param_groups[0][name]:
                    raise ValueError(f"{name} must be the same in all groups, got {group[name]!r}")
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._settle()
        self._buckets.stale = True

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """The state in torch's usual form, with the weights restored if they were at w'."""
        self._publish()
        return super().state_dict()

    def _publish(self) -> None:
        """Writes the optimizer's own counts into the groups, where torch's state_dict has a place for them."""
        self.restore()
        self._settle()
        for group in self.param_groups:
            group["hessian_evaluations"] = self._evaluations
            group["skipped_steps"] = self._skipped_steps

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict, each state in its own dtype and on its parameter's device.

        Raises:
            ValueError: the groups do not match, or the state is not Sassha's.
        """
        self.restore()
        # Registered last, so that it sees what the user's hooks made of the state_dict.
        handle = self.register_load_state_dict_pre_hook(check_and_protect)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        self._publish()
        return {**super().__getstate__(), "_hvp": self._hvp, "_backend": self._backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for param, saved in self.state.items():
            if isinstance(saved, AsSaved):
                self.state[param] = dict(saved.state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                if name != "differentiable":  # torch's own addition
                    group.setdefault(name, value)
        self._evaluations = max(group.get("hessian_evaluations", 0) for group in self.param_groups)
        self._skipped_steps = max(group.get("skipped_steps", 0) for group in self.param_groups)
        self._reset()
        with torch.no_grad():
            self._buckets.pack(self.param_groups, self.state)


def _guard(scalar: Tensor) -> Tensor:
    """A scalar as update_ takes it; a closure that runs backward itself may return a loss of any dtype."""
    return (scalar if scalar.dtype in DTYPES else scalar.double()).reshape(())


def _backward(loss: Tensor, create_graph: bool) -> None:
    with warnings.catch_warnings():
        # The cycle it warns of is broken as soon as the products are taken.
        warnings.filterwarnings("ignore", message="Using backward.. with create_graph=True")
        loss.backward(create_graph=create_graph)


@contextmanager
def _explained(selections: Sequence[Selection]) -> Iterator[None]:
    """Where an operator refuses its arguments, says which hyperparameter or gradient it was, and why."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError):
        for selection in selections:
            check_hyperparameters(selection.group)
            check_gradients(selection.params, selection.grads)
            selection.check_fit()
        raise

"""A soak: an optimizer and the reference beside it walk through a random schedule of whatever happens in training."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import random
from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler

from sassha_fused.checks import SCHEDULE as SHARED
from tests.support.events import ADDITIONS, STEPS, Batch, Event, Fault, Network, Planned
from tests.support.members import MEMBERS
from tests.support.memory import live_tensors
from tests.support.reference import memory_order
from tests.support.reference_family import BY_GROUP, ReferenceOfBatches

# Of a tensor's largest element. In 2,000 steps of any member the two were never more than 5e-14 apart, by the last bits
# of float64 in other orders of summation; how far training carries these along depends on the machine.
TOLERANCE = 1e-10
GROWTH_INTERVAL = 30


class Soak:
    """The optimizer under test and its reference, each with a network.

    Attributes:
        log: what has happened, in words.
        steps: how many steps were taken or skipped.
        apart: the largest difference so far.
    """

    def __init__(self, member: str, **options: Any) -> None:
        self.kind, defaults = MEMBERS[member]
        # With denominators that are not next to 0 training is smooth, so that the last bits do not grow.
        smooth = {"eps": 0.1, "clip_threshold": 1.0}
        known = {name: value for name, value in smooth.items() if name in signature(self.kind).parameters}
        self.options = {**defaults, **known, **options}
        self.network, self.model = Network(), Network()
        self.opt = self._optimizer(self.network)
        self.hessian_batches = self.options.get("hessian_batches")
        plain = {k: v for k, v in self.options.items() if k not in ("exact_restore", "hessian_batches", "backend")}
        self.reference = ReferenceOfBatches(self._groups(self.model), self.kind.__name__, **plain)
        first = self.reference.param_groups[0]
        self.by_group = {name: first[name] for name in BY_GROUP if name in first}
        self.added = 0
        self.scaler = GradScaler("cpu", init_scale=256.0, growth_interval=GROWTH_INTERVAL)
        self.log: list[str] = []
        self.steps, self.apart = 0, 0.0
        self.calls, self.batches = 0, list[Batch]()
        self.fault: Fault | None = None
        self.cleared = self.told = False
        self.scale, self.skipped_before = 1.0, 0
        self.memory: tuple[int, int] | None = None

    @staticmethod
    def _groups(network: Network) -> list[dict[str, Any]]:
        layers = list(network.layers)
        return [{"params": layers[:2]}, {"params": [*layers[2:], network.sometimes], "lr": 0.03, "weight_decay": 0.1}]

    def _optimizer(self, network: Network) -> Any:
        return self.kind(self._groups(network), **self.options)

    @property
    def single(self) -> bool:
        return all(group["rho"] == 0 for group in self.reference.param_groups)

    @property
    def along_momentum(self) -> bool:
        return self.reference.momentum_ascent

    @property
    def _perturbs(self) -> bool:
        """Whether a hand-written loop calls perturb()."""
        return "rho" in self.opt.defaults and (self.along_momentum or not self.single)

    @property
    def both(self) -> list[tuple[Any, Any]]:
        """Pairs of groups."""
        return list(zip(self.opt.param_groups, self.reference.param_groups, strict=True))

    def run(self, events: Sequence[Event]) -> None:
        for event in events:
            self.take(event)

    def take(self, event: Event) -> None:
        """Has an event happen, and compares."""
        draw = random.Random(event.number)
        self.log.append(f"step {self.steps}: {event.kind}")
        if event.kind in STEPS:
            self._step(event.kind, draw)
        else:
            getattr(self, "_" + event.kind.replace(" ", "_"))(draw)
        self.compare(draw)

    def say(self, *words: Any) -> None:
        self.log[-1] += "".join(f", {word}" for word in words if word)

    # -----------------------------------------------------------------------------------------------------------------
    # Between the steps

    def _freeze(self, draw: random.Random) -> None:
        """Some layers are frozen, all others thawed."""
        frozen = draw.sample(range(5), draw.choice((0, 0, 1, 2, 3)))
        self.say(frozen)
        for network in (self.network, self.model):
            for i, param in enumerate([*network.layers, network.sometimes]):
                param.requires_grad_(i not in frozen)
                param.grad = None

    def _add_a_group(self, draw: random.Random) -> None:
        if self.added == len(self.network.later):
            return
        choices: list[dict[str, Any]] = [{}, {"lr": 0.01}, {"weight_decay": 0.2}, {"rho": 0.02}]
        own = {name: value for name, value in draw.choice(choices).items() if name in self.opt.defaults}
        self.say(own)
        shared = {name: self.opt.param_groups[0][name] for name in SHARED if name in self.opt.param_groups[0]}
        both = ((self.opt, self.network, shared), (self.reference, self.model, self.by_group))
        for opt, network, more in both:
            param = network.later[self.added]
            param.grad = None
            opt.add_param_group({"params": [param], **own, **more})
        self.added += 1

    def _edit(self, draw: random.Random) -> None:
        """A hyperparameter of a group, or one of all."""
        names = {
            "lr": (0.003, 0.01, 0.02),
            "weight_decay": (0.0, 0.05, 0.2),
            "eps": (0.1, 0.03),
            "betas": ((0.9, 0.99), (0.5, 0.9)),
            "momentum": (0.9, 0.5),
            "rho": (0.0, 0.0, 0.05, 0.1),
            "hessian_interval": (1, 2, 5),
            "hessian_samples": (1, 2),
        }
        name = draw.choice([name for name in names if name in self.opt.param_groups[0]])
        value: Any = draw.choice(names[name])
        pairs = self.both if name.startswith("hessian") or draw.random() < 0.5 else [draw.choice(self.both)]
        as_tensor = name == "lr" and draw.random() < 0.3
        self.say(name, value, "as a tensor" if as_tensor else "", f"{len(pairs)} groups")
        for mine, other in pairs:
            mine[name] = torch.tensor(value, dtype=torch.float64) if as_tensor else value
            if name.startswith("hessian"):
                setattr(self.reference, name, value)
            else:
                other[name] = value

    def _look(self, draw: random.Random) -> None:
        """Somebody reads what an optimizer says of itself."""
        assert self.opt.skipped_steps == self.reference.skipped_steps
        assert not self.opt.perturbed and not self.opt.second_pass
        assert isinstance(self.opt.hessian_due, bool)

    def _abandon(self, draw: random.Random) -> None:
        """A step is begun and given up."""
        self.batches, self.fault = [self._batch(draw)], None
        first, way = draw.choice(("accumulate", "perturb")), draw.choice(("restore", "save", "state_dict"))
        self.say(first, way)
        self.opt.zero_grad()
        if first == "accumulate":
            self.opt.accumulate(lambda: self.batches[0].loss(self.network))
        else:
            if not self.along_momentum:
                self.batches[0].loss(self.network).backward()
            if self._perturbs:
                self.opt.perturb()
        if way == "restore":
            self.opt.restore()
        elif way == "save":
            self._save(draw)
        else:
            self.opt.state_dict()
            self.opt.restore()
        self.opt.zero_grad()

    def _save(self, draw: random.Random) -> None:
        """Another process goes on from a checkpoint, or this one from its own."""
        file = io.BytesIO()
        torch.save(self.opt.state_dict(), file)
        file.seek(0)
        into = draw.choice(("another", "the same"))
        self.say("loaded into", into)
        if into == "another":
            for param in self.network.parameters():
                param.grad = None
            self.network = copy.deepcopy(self.network)
            self.opt = self._optimizer(self.network)
            for param in self.network.later[: self.added]:
                self.opt.add_param_group({"params": [param]})
        self.opt.load_state_dict(torch.load(file, weights_only=True))

    def _copy(self, draw: random.Random) -> None:
        self.network.zero_grad()
        if draw.random() < 0.5:
            self.say("pickled")
            self.network, self.opt = pickle.loads(pickle.dumps((self.network, self.opt)))
        else:
            self.network, self.opt = copy.deepcopy((self.network, self.opt))

    # -----------------------------------------------------------------------------------------------------------------
    # Steps

    def _batch(self, draw: random.Random) -> Batch:
        generator = torch.Generator().manual_seed(draw.randrange(10**6))
        inputs = torch.randn(draw.choice((1, 2, 3, 8, 17)), 4, generator=generator, dtype=torch.float64)
        # With noise that nothing can fit: where a gradient is next to 0, so are the digits of its direction.
        noise = torch.randn(len(inputs), 3, generator=generator, dtype=torch.float64)
        return Batch(inputs, torch.sin(inputs[:, :3]) + noise, draw.random() < 0.6)

    def _draw_fault(self, draw: random.Random, count: int) -> Fault | None:
        if draw.random() < 0.75:
            return None
        kind = draw.choice(("raises", "raises", "interrupts", "nan", "nan", "curvature"))
        passes = draw.choice(((0,), (1,), (0, 1))) if kind == "nan" else (draw.randrange(2),)
        return Fault(kind, passes, draw.randrange(count), draw.random() < 0.5)

    def _loss(self, network: Network, number: int, pass_: int) -> Tensor:
        """Of a micro-batch, with its fault."""
        value, fault = self.batches[number].loss(network) / len(self.batches), self.fault
        if fault is not None and fault.micro_batch == number:
            if fault.kind == "curvature":
                moved = network.layers[0] - network.layers[0].detach()
                value = value + moved.abs().pow(1.5).sum()  # whose second derivative is not finite at 0
            elif fault.kind == "nan" and pass_ in fault.passes:
                value = value * math.nan
        return value

    def _evaluate(self, number: int, late: bool = False) -> Tensor:
        """The loss of a micro-batch, in the pass that it is."""
        pass_ = self.calls // len(self.batches)
        value = self._loss(self.network, number, pass_)
        if not late:
            self._raise(number)
        return value

    def _raise(self, number: int) -> None:
        pass_ = self.calls // len(self.batches)
        self.calls += 1
        fault = self.fault
        if fault is not None and (number, pass_) == (fault.micro_batch, fault.passes[0]):
            if fault.kind == "raises":
                raise Planned
            if fault.kind == "interrupts":
                raise KeyboardInterrupt

    def _step(self, style: str, draw: random.Random) -> None:
        count = draw.choice((2, 3, 4)) if style in ("closures", "accumulate") else 1
        self.batches = [self._batch(draw) for _ in range(count)]
        if self.hessian_batches is not None and self.reference._never_had_hessian(self.model.sometimes):
            self.batches[0] = self.batches[0]._replace(uses=True)  # a first Hessian of 0 is refused
        self.calls, self.fault = 0, self._draw_fault(draw, count)
        scaler = self.scaler if draw.random() < 0.3 else None
        to_none = draw.random() < 0.7
        self.say(
            f"batches of {[len(batch.inputs) for batch in self.batches]}",
            self.fault,
            "scaled" if scaler else "",
        )
        self.opt.zero_grad(set_to_none=to_none)
        if not to_none:
            self._drop_frozen()
        # A gradient of 0 that is there takes part where the loop is hand-written and has one pass.
        self.cleared = style == "phases" and not self._perturbs and self.network.sometimes.grad is not None
        before = [param.detach().clone() for param in self.network.parameters()]
        skipped = self.opt.skipped_steps if draw.random() < 0.3 else None
        self.scale = self.reference.scale = 1.0 if scaler is None else scaler.get_scale()
        self.told = style != "phases"
        try:
            loss = None
            if style == "phases":
                self._by_hand(scaler, draw)
            else:
                loss = self._by_closures(style, scaler, to_none, draw)
        except (Planned, KeyboardInterrupt):
            self.say("raised")
            self._after_exception(before)
            return
        expected = self._reference_step()
        self.steps += 1
        if loss is not None:
            torch.testing.assert_close(loss, expected, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
        if skipped is not None:
            assert self.opt.skipped_steps - skipped == self.reference.skipped_steps - self.skipped_before
        if scaler is not None:
            self._update(scaler)

    def _drop_frozen(self) -> None:
        for param in self.network.parameters():
            if not param.requires_grad:
                param.grad = None

    def _by_closures(self, style: str, scaler: GradScaler | None, to_none: bool, draw: random.Random) -> Tensor:
        late = self.fault is not None and self.fault.late
        unscales = draw.random() < 0.3

        def returns(number: int) -> Tensor:
            return self._evaluate(number)

        def runs_backward(number: int) -> Tensor:
            self.opt.zero_grad(set_to_none=to_none)
            self._drop_frozen()
            value = self._evaluate(number, late)
            (value if scaler is None else scaler.scale(value)).backward()
            if scaler is not None and unscales and number == len(self.batches) - 1:
                scaler.unscale_(self.opt)
            if late:
                self._raise(number)
            return value

        kind = runs_backward if style == "standard" or (style != "closure" and draw.random() < 0.5) else returns
        if scaler is not None and unscales and kind is runs_backward:
            self.say("unscales")
            self.reference.scale = 1.0  # of the gradients that perturb
        self.say(kind.__name__)
        closures = [lambda number=number: kind(number) for number in range(len(self.batches))]
        if style in ("closure", "standard"):
            return self.opt.step(closures[0], scaler=scaler)
        if style == "closures":
            return self.opt.step(closures, scaler=scaler)
        for closure in closures[:-1]:
            self.opt.accumulate(closure, scaler=scaler)
        return self.opt.step(closures[-1], scaler=scaler)

    def _by_hand(self, scaler: GradScaler | None, draw: random.Random) -> None:
        opt, late = self.opt, self.fault is not None and self.fault.late
        tells, graph, restores = (draw.random() < 0.5 for _ in range(3))
        perturbs = self._perturbs
        tells = tells and (perturbs or not graph)  # by perturb(), or else by hessian_pass()
        unscales, self.told = tells and draw.random() < 0.5, tells
        self.say("told" if tells else "", "unscales" if unscales else "", "restores" if restores else "")

        def backward(**options: Any) -> None:
            value = self._evaluate(0, late)
            (value if scaler is None else scaler.scale(value)).backward(**options)
            if late:
                self._raise(0)

        told = scaler if tells else None
        if perturbs:
            if not self.along_momentum:
                backward()
            opt.perturb(told)
        if graph:
            backward(create_graph=opt.hessian_due)
        else:
            with opt.hessian_pass(None if perturbs else told):
                backward()
        if perturbs and restores:
            opt.restore()
        if scaler is None:
            opt.step()
            return
        if unscales:
            scaler.unscale_(opt)
        scaler.step(opt)

    def _after_exception(self, before: list[Tensor]) -> None:
        """The weights are w again, and the step is over, or the loop says so."""
        if self.opt.perturbed:
            self.opt.restore()
        exact = self.opt.defaults.get("exact_restore", True)
        for param, was in zip(self.network.parameters(), before, strict=True):
            if exact:
                assert torch.equal(param, was), "an exception has moved the weights"
            else:
                torch.testing.assert_close(param.detach(), was, rtol=0, atol=1e-12)

    def _reference_step(self) -> Tensor:
        """The same step of the reference; returns its loss."""
        self.skipped_before = self.reference.skipped_steps
        passes = 0
        if self.fault is not None and self.fault.kind in ("raises", "interrupts"):
            self.fault = None

        def some(count: int, pass_: int) -> Tensor:
            cleared = 0 * self.model.sometimes.sum() if self.cleared else 0
            return torch.stack([self._loss(self.model, number, pass_) for number in range(count)]).sum() + cleared

        def closure() -> Tensor:
            nonlocal passes
            passes += 1
            return some(len(self.batches), passes - 1)

        few = min(self.hessian_batches or len(self.batches), len(self.batches))
        self.reference.partial = None
        if few < len(self.batches):
            self.reference.partial = lambda: some(few, passes - 1) * (len(self.batches) / few)
        return self.reference.step(closure)

    def _update(self, scaler: GradScaler) -> None:
        """Behind a step that was skipped the scale is half, if the scaler could hear of it; else it may grow."""
        scaler.update()
        factor = scaler.get_scale() / self.scale
        if self.reference.skipped_steps == self.skipped_before:
            assert factor in (1.0, 2.0)
        elif self.told:
            assert factor == 0.5

    # -----------------------------------------------------------------------------------------------------------------
    # Memory

    def _settle(self, draw: random.Random) -> None:
        """Clean steps of either kind, nothing frozen, no gradient left: memory is what it was then."""
        for network in (self.network, self.model):
            network.requires_grad_(True)
        for mine, other in self.both:
            for name in ("betas", "eps", "momentum"):  # by which groups lie together
                if name in mine:
                    mine[name] = other[name] = self.opt.defaults[name]
            mine["lr"] = other["lr"] = float(mine["lr"])
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(8, 4, generator=generator, dtype=torch.float64)
        self.batches, self.fault = [Batch(inputs, inputs[:, :3], uses=True)], None
        self.cleared = False
        for rho in (0.0, self.opt.defaults.get("rho", 0.0)):
            for pair in self.both if "rho" in self.opt.defaults else ():
                for group in pair:
                    group["rho"] = rho
            self.reference.scale = self.scaler.get_scale()
            self.opt.zero_grad()
            self.opt.step(lambda: self.batches[0].loss(self.network), scaler=self.scaler)
            self.scaler.update()
            self._reference_step()
            self.steps += 1
        for opt, network in ((self.opt, self.network), (self.reference, self.model)):
            opt.zero_grad()
            network.zero_grad()
        gc.collect()
        if self.added == ADDITIONS:
            found = live_tensors()
            self.memory = self.memory or found
            assert found == self.memory, f"tensors and bytes are {found}, and were {self.memory}"

    # -----------------------------------------------------------------------------------------------------------------
    # Comparison

    def compare(self, draw: random.Random) -> None:
        """The weights, and in two events of three the states, asked for in one way or the other."""
        mine = [param.detach() for group in self.opt.param_groups for param in group["params"]]
        others = [param for group in self.reference.param_groups for param in group["params"]]
        for i, (param, other) in enumerate(zip(mine, others, strict=True)):
            self._close(f"parameter {i}", param, other)
        way = draw.choice(("state_dict", "state", "none"))
        if way == "none":
            return
        if way == "state_dict":
            saved = self.opt.state_dict()
            states = [saved["state"].get(i, {}) for i in range(len(mine))]
            steps = [group["steps"] for group in saved["param_groups"]]
            assert set(steps) == {self.reference.steps_taken}
            assert {g["skipped_steps"] for g in saved["param_groups"]} == {self.reference.skipped_steps}
        else:
            params = [param for group in self.opt.param_groups for param in group["params"]]
            states = [self.opt.state.get(param, {}) for param in params]
        for i, (state, other) in enumerate(zip(states, others, strict=True)):
            expected = self.reference.state.get(other, {})
            if not expected:  # it has taken no step
                assert not any(bool(torch.as_tensor(value).any()) for value in state.values()), (
                    f"parameter {i}: {state}"
                )
                continue
            assert set(state) == set(expected), f"parameter {i} has {set(state)} instead of {set(expected)}"
            for name, value in expected.items():
                if not isinstance(value, Tensor):
                    assert int(state[name]) == value, f"{name} of parameter {i} is {state[name]} instead of {value}"
                    continue
                if state[name].shape != value.shape:  # compact
                    value = memory_order(value)[:: self.options["hessian_block"]]
                self._close(f"{name} of parameter {i}", state[name], value)

    def _close(self, what: str, mine: Tensor, other: Tensor) -> None:
        largest = max(float(other.detach().abs().max()), 1e-3) if other.numel() else 1.0
        apart = float((mine - other.detach()).abs().max()) / largest if other.numel() else 0.0
        self.apart = max(self.apart, apart)
        assert apart <= TOLERANCE, f"{what} is {apart:.3g} of its largest element apart"

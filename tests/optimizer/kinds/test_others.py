"""Gradients of parameters that belong to nobody or to another optimizer, and two optimizers of one loss."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sassha_fused import Sassha, hessian_pass
from tests.support.kinds import Net, all_styles, assert_clean, assert_states_close, reference_of
from tests.support.problems import ALL_STYLES, assert_same, single_threaded, weights
from tests.support.reference import ReferenceSassha

one_thread = pytest.fixture(autouse=True)(single_threaded)


def deep(seed: int = 0) -> Net:
    return Net(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3), seed=seed)


@all_styles
@pytest.mark.parametrize("rho", [0.0, 0.2])
@pytest.mark.parametrize("own", [slice(0, 2), slice(2, 4), slice(4, 6)], ids=["below", "between", "head"])
def test_parameters_of_nobody_get_the_first_gradient_once_and_no_graph(own: slice, rho: float, style: str) -> None:
    net = deep()
    params = [*net.parameters()]
    mine = params[own]
    others = [param for param in params if all(param is not one for one in mine)]
    opt = Sassha(mine, lr=0.01, rho=rho, hessian_interval=2, backend="cpu")
    for _ in range(5):
        for param in others:
            param.grad = None
        expected = torch.autograd.grad(net.loss(), others)
        if style == "phase":  # by hand nobody is there to keep the second gradients away
            expected = [None] * len(others)
        elif style == "hessian_pass" and not opt.hessian_due:
            expected = [None] * len(others)  # a lazy step's second pass is the caller's own
        due = opt.hessian_due
        ALL_STYLES[style](opt, net.loss)
        for param, grad in zip(others, expected):
            assert param.grad is not None
            assert not (param.grad.requires_grad and (style != "phase" or not due))
            if grad is not None and not (rho == 0 and style == "hessian_pass"):
                torch.testing.assert_close(param.grad, grad, rtol=1e-11, atol=1e-14)
    opt.zero_grad()
    assert_clean(mine)


@all_styles
@pytest.mark.parametrize("after", ALL_STYLES)
def test_a_parameter_that_a_hessian_step_saw_outside_is_trained_in_every_step_once_it_is_added(
    style: str, after: str
) -> None:
    net, other = deep(), deep()
    options = {"lr": 0.01, "hessian_interval": 4}
    opt = Sassha(net[0].parameters(), backend="cpu", **options)
    reference = ReferenceSassha(other[0].parameters(), **options)
    for step, way in enumerate(("closure", style, after, after)):
        opt.zero_grad()
        ALL_STYLES[way](opt, net.loss)
        reference.step(other.loss)
        if step == 0:
            opt.add_param_group({"params": [*net[2].parameters()]})
            reference.add_param_group({"params": [*other[2].parameters()]})
        for param in net.parameters():
            param.grad = None
    assert_states_close([*net.parameters()][:4], opt, [*other.parameters()][:4], reference, 1e-11)


@all_styles
def test_no_graph_of_a_hessian_step_stays_alive(style: str) -> None:
    net = deep()
    opt = Sassha(net[-1].parameters(), lr=0.01, hessian_interval=2, backend="cpu")
    seen: list[weakref.ref[Any]] = []

    class Marker:
        """What a node of the graph keeps alive."""

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.marker = Marker()
            seen.append(weakref.ref(ctx.marker))
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * 1

    def loss() -> Tensor:
        x = net.inputs
        for i, layer in enumerate(net):
            x = Identity.apply(layer(x)) if i == 1 else layer(x)
        return nn.functional.cross_entropy(x, net.targets)

    gc.collect()
    gc.disable()
    try:
        for _ in range(6):
            ALL_STYLES[style](opt, loss)
            if style != "phase":
                assert not any(ref() for ref in seen), "without the garbage collector"
    finally:
        gc.enable()
    gc.collect()
    net.zero_grad()
    assert not any(ref() for ref in seen)


class KeepsVariable(torch.autograd.Function):
    """Keeps something under the name by which the nodes of leaves know their tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.variable = "x"
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 1


@all_styles
def test_what_a_function_keeps_is_no_parameter_of_the_loss(style: str) -> None:
    net, other = deep(), deep()
    opt, plain = (Sassha(n.parameters(), lr=0.01, hessian_interval=2, backend="cpu") for n in (net, other))
    for _ in range(3):
        ALL_STYLES[style](opt, lambda: KeepsVariable.apply(net.loss()))
        ALL_STYLES[style](plain, other.loss)
    assert_same(weights(net.parameters()), weights(other.parameters()))


@all_styles
def test_a_hessian_step_walks_each_graph_once(style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, walks = deep(), []
    original = hessian_pass.nodes_of

    def noted(tensors: Any) -> list[Any]:
        walks.append(len(nodes := original(tensors)))
        return nodes

    for name, module in list(sys.modules.items()):
        if name.startswith("sassha_fused") and hasattr(module, "nodes_of"):
            monkeypatch.setattr(module, "nodes_of", noted)
    opt = Sassha(net.parameters(), lr=0.01, hessian_interval=2, hessian_samples=2, backend="cpu")
    for _ in range(2):
        walks.clear()
        ALL_STYLES[style](opt, net.loss)
        of_loss = [] if style == "phase" else [len(original([net.loss()]))]
        assert walks[: len(of_loss)] == of_loss
        assert [nodes > 20 for nodes in walks[len(of_loss) :]] == [True]
        walks.clear()
        ALL_STYLES[style](opt, net.loss)
        assert walks == []


# ---------------------------------------------------------------------------------------------------------------------
# Two optimizers


def two_of(net: Net, first: dict[str, Any], second: dict[str, Any], kind: Any = Sassha) -> tuple[Any, Any]:
    options = {"backend": "cpu"} if kind is Sassha else {}
    params = [*net.parameters()]
    one, two = ({"lr": 0.01, "hessian_interval": 2, **more, **options} for more in (first, second))
    return Sassha(params[:2], **one), Sassha(params[2:], **two)


def together(net: Net, one: Any, two: Any, how: Callable[..., None]) -> None:
    """The reference's way: both perturb by the gradients at w, both take gradients and products at both w'."""
    for opt in (one, two):
        opt.zero_grad()
    net.loss().backward()
    one.perturb(), two.perturb()
    how(net, one, two)


def by_hand(net: Net, one: Any, two: Any, reverse: bool) -> None:
    net.loss().backward(create_graph=one.hessian_due or two.hessian_due)
    for opt in (two, one) if reverse else (one, two):
        opt.step()


def in_both_passes(net: Net, one: Any, two: Any, reverse: bool) -> None:
    with two.hessian_pass(), one.hessian_pass():
        net.loss().backward()
    for opt in (two, one) if reverse else (one, two):
        opt.step()


def restored_first(net: Net, one: Any, two: Any, reverse: bool) -> None:
    net.loss().backward(create_graph=one.hessian_due or two.hessian_due)
    for opt in (two, one) if reverse else (one, two):
        opt.restore()
    one.step(), two.step()


def of_references(net: Net, one: Any, two: Any) -> None:
    products = []
    for opt in (one, two):  # each from a graph of its own
        params = opt.param_groups[0]["params"]
        grads = list(torch.autograd.grad(net.loss(), params, create_graph=opt.hessian_due))
        for param, grad in zip(params, grads):
            param.grad = grad.detach()
        products.append(opt._hessian_products(grads))
    one.update(products[0]), two.update(products[1])


INTERVALS = [({}, {}), ({"hessian_interval": 3}, {}), ({}, {"hessian_samples": 2, "seed": 5}), ({"rho": 0.05}, {})]


@pytest.mark.parametrize("options", INTERVALS, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("how", [by_hand, in_both_passes, restored_first], ids=lambda how: how.__name__)
def test_two_optimizers_of_one_loss_each_with_a_norm_of_its_own(how: Any, reverse: bool, options: Any) -> None:
    net, other = Net(), Net()
    pair = two_of(net, *options)
    references = [reference_of(opt) for opt in two_of(other, *options)]
    for _ in range(6):
        together(net, *pair, lambda *arguments: how(*arguments, reverse))
        together(other, *references, of_references)
        # Weights and state of both, after each step.
        for opt, reference in zip(pair, references):
            ours, theirs = (o.param_groups[0]["params"] for o in (opt, reference))
            assert_states_close(ours, opt, theirs, reference, 1e-10)
    for opt in pair:
        opt.zero_grad()
    assert_clean(net.parameters())


@pytest.mark.parametrize("helped", [False, True], ids=["by hand", "hessian_pass"])
def test_without_a_radius_the_second_is_told_that_the_first_has_used_the_graph(helped: bool) -> None:
    net = Net()
    one, two = two_of(net, {"rho": 0.0}, {"rho": 0.0})
    if helped:
        with one.hessian_pass(), two.hessian_pass():
            net.loss().backward()
    else:
        net.loss().backward(create_graph=True)
    one.step()
    before = weights(net.parameters())
    with pytest.raises(ValueError, match="another optimizer's step has used and freed"):
        two.step()
    assert_same(weights(net.parameters()), before)
    assert not any(state["exp_avg"].any() for state in two.state.values())
    two.zero_grad()
    two.step(net.loss)


@pytest.mark.parametrize("reverse", [False, True])
def test_without_a_radius_they_perturb_all_the_same(reverse: bool) -> None:
    net, other = Net(), Net()
    pair = two_of(net, {"rho": 0.0}, {"rho": 0.0})
    references = [reference_of(opt) for opt in two_of(other, {"rho": 0.0}, {"rho": 0.0})]
    for _ in range(3):
        together(net, *pair, lambda *arguments: by_hand(*arguments, reverse))
        together(other, *references, of_references)
    for opt, reference in zip(pair, references):
        assert_states_close(opt.param_groups[0]["params"], opt, reference.param_groups[0]["params"], reference, 1e-10)


@pytest.mark.parametrize("style", ["closure", "standard"])
def test_two_optimizers_in_closure_style_take_turns(style: str) -> None:
    net, other = Net(), Net()
    pair = two_of(net, {}, {"hessian_interval": 3})
    references = [reference_of(opt) for opt in two_of(other, {}, {"hessian_interval": 3})]
    for _ in range(6):
        for opt in pair:
            for each in pair:  # what the other's closure has left is the caller's to drop
                each.zero_grad()
            ALL_STYLES[style](opt, net.loss)
        for reference in references:
            reference.step(other.loss)
        for opt, reference in zip(pair, references):
            ours, theirs = (o.param_groups[0]["params"] for o in (opt, reference))
            assert_states_close(ours, opt, theirs, reference, 1e-10)


def test_what_another_closure_left_is_refused_and_not_dropped() -> None:
    net = Net()
    one, two = two_of(net, {}, {})
    one.step(net.loss)
    before = weights(net.parameters())
    with pytest.raises(ValueError, match="left by a step without a closure, this optimizer's or another's"):
        two.step(net.loss)
    assert_same(weights(net.parameters()), before)


@all_styles
def test_a_torch_optimizer_of_the_rest_gets_gradients_at_w(style: str) -> None:
    net = deep()
    params = [*net.parameters()]
    opt = Sassha(params[4:], lr=0.01, hessian_interval=2, backend="cpu")
    rest = torch.optim.SGD(params[:4], lr=0.0)
    for _ in range(3):
        rest.zero_grad()
        expected = torch.autograd.grad(net.loss(), params[:4])
        ALL_STYLES[style](opt, net.loss)
        if style in ("closure", "standard"):
            assert_same([p.grad for p in params[:4]], list(expected))
        rest.step()


@pytest.mark.parametrize("faulty", [False, True], ids=["unfinished", "without a graph"])
def test_a_step_that_somebody_left_unfinished_hinders_no_other_model(faulty: bool) -> None:
    abandoned = Net(seed=1)
    left = Sassha(abandoned.parameters(), backend="cpu")
    abandoned.loss().backward()
    left.perturb()
    abandoned.loss().backward(create_graph=not faulty)
    if faulty:  # as a notebook's cell that raised leaves it
        abandoned[0].weight.grad = torch.ones_like(abandoned[0].weight)
        (abandoned.loss() * 2).backward(create_graph=True)
    kept = [param.grad for param in abandoned.parameters()]
    net, other = Net(), Net()
    opt, undisturbed = (Sassha(n.parameters(), hessian_interval=2, backend="cpu") for n in (net, other))
    for _ in range(3):
        opt.step(net.loss)
    assert all(param.grad is grad for param, grad in zip(abandoned.parameters(), kept))
    left.zero_grad()
    left.restore()
    for _ in range(3):
        undisturbed.step(other.loss)
    assert_same(weights(net.parameters()), weights(other.parameters()))

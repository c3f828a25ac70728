"""Functions and hooks that are constants to double backward: a warning once, and check_products names what is lost."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sassha_fused import Sassha, hessian_pass
from tests.support.kinds import Net, all_styles, assert_clean
from tests.support.problems import ALL_STYLES, assert_same, single_threaded, weights

one_thread = pytest.fixture(autouse=True)(single_threaded)


class Kernel(torch.autograd.Function):
    """Cubes its input; its backward is filled in by a kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        out = torch.empty_like(x)
        np.multiply(grad.detach().numpy(), 3 * x.detach().numpy() ** 2, out=out.numpy())
        return out


class Detached(Kernel):
    """The same, its backward computed without a graph."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        with torch.no_grad():
            return 3 * ctx.saved_tensors[0] ** 2 * grad


class Differentiable(Kernel):
    """The same, its backward made of torch's operations."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class Reversed(torch.autograd.Function):
    """Linear: it saves nothing, and its gradient has a graph where the gradient that comes has one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return -x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class Between(Net):
    """A network with a function between its layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        first, _, last = self
        return last(self.function(first(x)))


@pytest.fixture(autouse=True)
def nothing_warned_of_yet() -> None:
    hessian_pass._warn_once.cache_clear()


@all_styles
@pytest.mark.parametrize("function", [Kernel, Detached], ids=lambda function: function.__name__)
def test_a_backward_that_breaks_the_graph_is_warned_of_once(function: Any, style: str) -> None:
    net = Between(function.apply)
    opt = Sassha(net.parameters(), lr=1e-3, hessian_interval=2, backend="cpu")
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        for _ in range(5):
            ALL_STYLES[style](opt, net.loss)
    texts = [str(warning.message) for warning in shown]
    # By hand nobody is there to look at the graph.
    assert len(texts) == (style != "phase"), texts
    assert all(f"the backward of {function.__name__} is not made of differentiable" in text for text in texts)
    opt.zero_grad()
    assert_clean(net.parameters())


@all_styles
@pytest.mark.parametrize("function", [Differentiable, Reversed], ids=lambda function: function.__name__)
def test_functions_made_of_torchs_operations_are_not_warned_of(function: Any, style: str) -> None:
    net = Between(function.apply)
    opt = Sassha(net.parameters(), lr=1e-3, hessian_interval=2, backend="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            ALL_STYLES[style](opt, net.loss)
    opt.zero_grad()
    assert max(opt.check_products(net.loss).values()) < 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# check_products


def activation_hook(x: Tensor) -> Tensor:
    x = x**3
    if x.requires_grad:
        x.register_hook(lambda grad: grad.detach())
    return x


CONSTANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "kernel": Kernel.apply,
    "detached": Detached.apply,
    "hook of an activation": activation_hook,
}


class Branches(nn.Module):
    """Two networks whose losses are added, the second of them as torch differentiates it."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two = Between(function), Net(seed=1)

    def loss(self) -> Tensor:
        return self.one.loss() + self.two.loss()


@pytest.mark.filterwarnings("ignore:the backward of:UserWarning")
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("constant", CONSTANTS)
def test_exactly_the_parameters_concerned_are_named(constant: str, named: bool) -> None:
    model = Branches(CONSTANTS[constant])
    opt = Sassha(model.named_parameters() if named else model.parameters(), backend="cpu")
    with pytest.raises(ValueError, match="exact Hessian products disagree") as error:
        opt.check_products(model.loss)
    names = [repr(name) for name, _ in model.named_parameters()]
    if not named:
        names = [f"parameter {i} of group 0" for i in range(8)]
    # Of the layer above the products with those below are wrong.
    assert [name in str(error.value) for name in names] == [True] * 4 + [False] * 4


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, 0.1, activation="gelu", batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[:, :4].reshape(4, 4, 4)).reshape(16, 4)


class Image(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :4].reshape(16, 1, 2, 2)


def networks() -> dict[str, Net]:
    return {
        "MLP tanh": Net(),
        "CNN, ReLU and batch norm": Net(
            Image(), nn.Conv2d(1, 4, 2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)
        ),
        "dropout": Net(nn.Linear(5, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 3)),
        "GELU transformer": Net(Attention(), nn.Linear(4, 3)),
        "embedding": Net(nn.Linear(5, 8), nn.LayerNorm(8), nn.SiLU(), nn.Linear(8, 3)),
    }


def everything(net: Net, opt: Sassha) -> dict[str, Any]:
    return {
        "weights": weights(net.parameters()),
        "buffers": weights(net.buffers()),
        "grads": [None if p.grad is None else p.grad.clone() for p in net.parameters()],
        "state": [{k: v.clone() for k, v in opt.state[p].items()} for p in net.parameters() if p in opt.state],
        "torch": torch.get_rng_state(),
        "python": random.getstate()[1],
    }


def with_backward(net: Net) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        loss = net.loss()
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("standard", [False, True], ids=["closure", "standard"])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", networks())
def test_what_is_right_passes_and_all_is_as_before(name: str, dtype: torch.dtype, steps: int, standard: bool) -> None:
    net = networks()[name].to(dtype)
    net.inputs = net.inputs.to(dtype)
    opt = Sassha(net.named_parameters(), lr=1e-3, backend="cpu")
    for _ in range(steps):
        opt.step(net.loss)
    opt.zero_grad()
    net.loss().backward()
    grads = [param.grad for param in net.parameters()]
    before = everything(net, opt)
    found = opt.check_products(with_backward(net) if standard else net.loss)
    assert_same(everything(net, opt), before)
    assert all(param.grad is grad for param, grad in zip(net.parameters(), grads))
    assert list(found) == [name for name, _ in net.named_parameters()] and max(found.values()) < 0.05
    assert_clean(net.parameters())


@pytest.mark.filterwarnings("ignore:the backward of:UserWarning")
def test_what_is_wrong_leaves_all_as_before_too() -> None:
    net = Between(Kernel.apply)
    opt = Sassha(net.parameters(), backend="cpu")
    before = everything(net, opt)
    with pytest.raises(ValueError, match="disagree"):
        opt.check_products(net.loss)
    assert_same(everything(net, opt), before)


def test_an_error_of_the_closure_leaves_all_as_before() -> None:
    net = Net()
    opt = Sassha(net.parameters(), backend="cpu")
    before, calls = everything(net, opt), []

    def closure() -> Tensor:
        calls.append(torch.rand(()))
        if len(calls) == 3:
            raise KeyError("as a loader does")
        return net.loss()

    with pytest.raises(KeyError):
        opt.check_products(closure)
    assert_same(everything(net, opt), before)
    assert_clean(net.parameters())


def test_within_a_step_it_is_refused_and_the_step_goes_on() -> None:
    net, other = Net(), Net()
    opt, undisturbed = (Sassha(n.parameters(), backend="cpu") for n in (net, other))
    net.loss().backward()
    opt.perturb()
    with pytest.raises(ValueError, match="within a step: call it before perturb"):
        opt.check_products(net.loss)
    net.loss().backward(create_graph=True)
    opt.step()
    undisturbed.step(other.loss)
    assert_same(weights(net.parameters()), weights(other.parameters()))

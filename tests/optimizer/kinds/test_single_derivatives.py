"""Operators that cannot be differentiated twice: an error that names the Hessian step and a way out, at w."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sassha_fused import Sassha
from tests.support.kinds import all_styles, assert_clean
from tests.support.problems import ALL_STYLES, assert_same, single_threaded, weights

one_thread = pytest.fixture(autouse=True)(single_threaded)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class Exchangeable(nn.Module):
    """A network in which one operator may be exchanged for another that is the same function."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.twice = kind, False
        self.first, self.bag, self.last = nn.Linear(4, 6), nn.EmbeddingBag(9, 6), nn.Linear(6, 3)
        self.inputs = torch.randn(8, 4)
        self.tokens, self.targets = torch.randint(0, 9, (8, 5)), torch.randint(0, 3, (8,))

    def loss(self) -> Tensor:
        return getattr(self, self.kind)()

    def embedding_bag(self) -> Tensor:
        found = F.embedding(self.tokens, self.bag.weight).mean(1) if self.twice else self.bag(self.tokens)
        return F.cross_entropy(self.last(torch.tanh(found + self.first(self.inputs))), self.targets)

    def once_differentiable(self) -> Tensor:
        hidden = self.first(self.inputs)
        hidden = hidden**3 if self.twice else Once.apply(hidden)
        return F.cross_entropy(self.last(hidden), self.targets)

    def ctc(self) -> Tensor:
        logs = self.last(torch.tanh(self.first(self.inputs))).log_softmax(-1).unsqueeze(1)
        if self.twice:
            return -logs[:, 0, 1].mean()
        return F.ctc_loss(logs, torch.tensor([[1, 2, 1]]), torch.tensor([8]), torch.tensor([3]))


def snapshot(net: nn.Module, opt: Sassha) -> Any:
    state = [{k: v.clone() for k, v in opt.state[p].items()} for p in net.parameters() if p in opt.state]
    return [weights(net.parameters()), state, opt.skipped_steps, opt.hessian_due]


@all_styles
@pytest.mark.parametrize("kind", ["embedding_bag", "once_differentiable", "ctc"])
def test_the_error_names_the_hessian_step_and_the_exchange_works(kind: str, style: str) -> None:
    net, other = Exchangeable(kind), Exchangeable(kind)
    net.twice = other.twice = True
    opt, undisturbed = (Sassha(n.parameters(), lr=0.01, hessian_interval=2, backend="cpu") for n in (net, other))
    for _ in range(2):
        ALL_STYLES[style](opt, net.loss)
    opt.zero_grad()
    before = snapshot(net, opt)
    net.twice = False
    with pytest.raises(RuntimeError) as error:
        ALL_STYLES[style](opt, net.loss)
    text = str(error.value)
    assert "Hessian step of sassha_fused" in text and "to another optimizer" in text and "nn.EmbeddingBag" in text
    assert not opt.perturbed
    opt.zero_grad()
    assert_same(snapshot(net, opt), before)
    assert_clean(net.parameters())
    net.twice = True
    for _ in range(3):
        ALL_STYLES[style](opt, net.loss)
    for _ in range(5):
        ALL_STYLES[style](undisturbed, other.loss)
    assert_same(snapshot(net, opt), snapshot(other, undisturbed))


@pytest.mark.parametrize("kind", ["embedding_bag", "once_differentiable", "ctc"])
def test_check_products_is_refused_alike(kind: str) -> None:
    net = Exchangeable(kind)
    opt = Sassha(net.parameters(), lr=0.01, backend="cpu")
    before = snapshot(net, opt)
    with pytest.raises(RuntimeError, match="This was the double backward of a Hessian step of sassha_fused"):
        opt.check_products(net.loss)
    assert_same(snapshot(net, opt), before)
    assert_clean(net.parameters())


@all_styles
@pytest.mark.parametrize("kind", ["embedding_bag", "once_differentiable", "ctc"])
def test_on_lazy_steps_they_serve(kind: str, style: str) -> None:
    net = Exchangeable(kind)
    net.twice = True
    opt = Sassha(net.parameters(), lr=0.01, hessian_interval=3, backend="cpu")
    ALL_STYLES[style](opt, net.loss)
    net.twice = False
    for _ in range(2):
        ALL_STYLES[style](opt, net.loss)
    with pytest.raises(RuntimeError, match="Hessian step"):
        ALL_STYLES[style](opt, net.loss)


@all_styles
def test_leaving_its_parameters_to_another_optimizer_is_a_way_out(style: str) -> None:
    net = Exchangeable("embedding_bag")
    opt = Sassha(net.last.parameters(), lr=0.01, hessian_interval=2, backend="cpu")
    rest = torch.optim.SGD([*net.bag.parameters(), *net.first.parameters()], lr=0.01)
    losses = []
    for _ in range(8):
        rest.zero_grad()
        losses.append(float(ALL_STYLES[style](opt, net.loss)))
        rest.step()
    assert losses[-1] < losses[0]


def raises_in_backward(net: Exchangeable) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        value = net.loss()
        value.register_hook(lambda grad: (_ for _ in ()).throw(RuntimeError("of the model's own")))
        return value

    return loss


@all_styles
def test_an_error_of_the_model_itself_is_left_as_it_is(style: str) -> None:
    net = Exchangeable("embedding_bag")
    net.twice = True
    opt = Sassha(net.parameters(), backend="cpu")
    before = weights(net.parameters())
    with pytest.raises(RuntimeError, match=r"^of the model's own$"):
        ALL_STYLES[style](opt, raises_in_backward(net))
    opt.restore()
    assert_same(weights(net.parameters()), before)
    opt.zero_grad()
    assert_clean(net.parameters())

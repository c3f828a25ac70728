"""Attention and compiled models: the Hessian pass takes exact products with no change by the user."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sassha_fused import Sassha
from tests.support.kinds import Net, assert_states_close
from tests.support.problems import ALL_STYLES, single_threaded

one_thread = pytest.fixture(autouse=True)(single_threaded)
# In the others the caller runs the second backward by hand, outside of hessian_pass().
helped = pytest.mark.parametrize("style", ["closure", "standard", "hessian_pass"])


def eager_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    return scores.softmax(-1) @ v


class Block(nn.Module):
    """Self-attention and a perceptron, over sequences of 4."""

    def __init__(self, attention: Callable[..., Tensor], around: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.around = attention, around
        self.qkv, self.out, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 3)
        self.double()
        self.inputs = torch.randn(5, 4, 8, dtype=torch.float64)
        self.targets = torch.randint(0, 3, (20,))

    def block(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(5, 4, 3, 2, 4).permute(2, 0, 3, 1, 4)
        return x + self.out(self.attention(q, k, v, is_causal=True).transpose(1, 2).reshape(5, 4, 8))

    def loss(self) -> Tensor:
        checkpointed = self.around == "checkpoint"
        x = checkpoint(self.block, self.inputs, use_reentrant=False) if checkpointed else self.block(self.inputs)
        return F.cross_entropy(self.head(torch.tanh(x)).view(20, 3), self.targets)


def trained(net: Any, style: str, loss: Callable[[], Tensor] | None = None) -> tuple[list[nn.Parameter], Sassha]:
    opt = Sassha(net.parameters(), lr=0.01, hessian_interval=2, backend="cpu")
    for _ in range(4):
        ALL_STYLES[style](opt, loss or net.loss)
    return [*net.parameters()], opt


@helped
@pytest.mark.parametrize("around", ["", "checkpoint"])
def test_scaled_dot_product_attention(around: str, style: str) -> None:
    fused, eager = Block(F.scaled_dot_product_attention, around), Block(eager_attention)
    assert_states_close(*trained(fused, style), *trained(eager, "closure"), 1e-10)


@helped
def test_transformer_encoder_layer(style: str) -> None:
    def made() -> Net:
        torch.manual_seed(0)
        return Net(Sequences(), nn.Linear(4, 3))

    fused, eager = made(), made()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = trained(eager, "closure")
    assert_states_close(*trained(fused, style), *expected, 1e-10)


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, activation="gelu", batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[:, :4].reshape(4, 4, 4)).reshape(16, 4)


def compiled(backend: str, style: str) -> None:
    net, plain = Net(), Net()
    fast = torch.compile(net.forward, backend=backend)

    def loss() -> Tensor:
        return F.cross_entropy(fast(net.inputs), net.targets)

    assert_states_close(*trained(net, style, loss), *trained(plain, "closure"), 1e-10)


@pytest.mark.slow
@helped
def test_a_compiled_model(style: str) -> None:
    compiled("aot_eager", style)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_a_model_compiled_by_inductor() -> None:
    compiled("inductor", "closure")

"""Two small models with data, for whole training steps."""

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


def cnn(batch: int = 64) -> tuple[nn.Module, Tensor, Tensor]:
    """Residual blocks with batch norm on images of 32 x 32."""
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1),
        Residual(32),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        Residual(64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    return model, torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))


class Attention(nn.Module):
    """Written out, because fused attention has no double backward."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


def transformer(batch: int = 16) -> tuple[nn.Module, Tensor, Tensor]:
    """Two encoder blocks of width 128 on sequences of 64 tokens."""
    model = nn.Sequential(
        nn.Embedding(256, 128), Block(128, 4), Block(128, 4), nn.LayerNorm(128), nn.Linear(128, 256), nn.Flatten(0, 1)
    )
    return model, torch.randint(256, (batch, 64)), torch.randint(256, (batch * 64,))


MODELS = {"CNN": cnn, "transformer": transformer}

"""A small GPT over characters."""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from examples.chargpt.text import CONTEXT

LAYERS = 2
HEADS = 4
WIDTH = 96


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Characters [N, CONTEXT] to logits of the next ones, [N, CONTEXT, characters].

    Everything starts as torch makes it but the embeddings, normal with this deviation.
    """

    def __init__(self, characters: int, deviation: float) -> None:
        super().__init__()
        self.character = nn.Embedding(characters, WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, characters, bias=False)
        for embedding in (self.character, self.position):
            nn.init.normal_(embedding.weight, std=deviation)

    def forward(self, characters: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.character(characters) + self.position.weight)))


def gpt(characters: int, deviation: float, seed: int) -> GPT:
    """The same seed gives the same weights."""
    torch.manual_seed(seed)
    return GPT(characters, deviation)

"""The nets that figures are given for: one name, one model, one batch, one request each."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """One piece of work.

    Attributes:
        name: what it is, as the tables show it.
        make: builds the model and the batch; everything random is drawn from the seed set before.
        request: the fields of the request.
    """

    name: str
    make: Callable[[], tuple[nn.Module, Tensor]]
    request: dict[str, Any] = field(default_factory=dict)


def mlp(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers of these widths with an activation between them."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1])


def cnn(channels: tuple[int, ...], size: int, stride: int, outputs: int = 10) -> nn.Sequential:
    """Convolutions 3 x 3 with ReLU, then one Linear."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(channels):
        layers += [nn.Conv2d(a, b, 3, stride=stride, padding=1), nn.ReLU()]
        size = -(-size // stride)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * size * size, outputs))


class Block(nn.Module):
    """A transformer block over 64 tokens with a small head."""

    def __init__(self, width: int = 256, outputs: int = 8) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, tokens, width)` to `(B, outputs)`."""
        return self.head(self.layer(x).mean(dim=1))


class LanguageModel(nn.Module):
    """Two causal layers and a wide head on the last position."""

    def __init__(self, vocabulary: int = 8000, width: int = 64, tokens: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(tokens))

    def forward(self, ids: Tensor) -> Tensor:
        """`(B, tokens)` to the logits `(B, vocabulary)` of the last position."""
        return self.head(self.layers(self.embedding(ids), mask=self.mask, is_causal=True)[:, -1])


EMBEDDINGS = {"module": "embedding", "side": "output"}

CASES = (
    Case("J wrt parameters, MLP 784-512-512-10, B=32, dense", lambda: (mlp(784, 512, 512, 10), torch.randn(32, 784)),
         {"wrt": "params", "form": "dense"}),
    Case("J wrt parameters, MLP 784-512-512-10, B=32, factors", lambda: (mlp(784, 512, 512, 10), torch.randn(32, 784)),
         {"wrt": "params"}),
    Case("J wrt parameters, CNN 3x32x32 (64-128-128), B=16",
         lambda: (cnn((3, 64, 128, 128), 32, 2), torch.randn(16, 3, 32, 32)), {"wrt": "params", "form": "dense"}),
    Case("J wrt parameters, CNN 1x28x28 (16-32-32), B=32",
         lambda: (cnn((1, 16, 32, 32), 28, 2), torch.randn(32, 1, 28, 28)), {"wrt": "params", "form": "dense"}),
    Case("J wrt parameters, transformer block d=256, 64 tokens, O=8, B=8", lambda: (Block(), torch.randn(8, 64, 256)),
         {"wrt": "params", "form": "dense"}),
    Case("J wrt inputs, autoencoder 784-512-32-512-784, B=32",
         lambda: (mlp(784, 512, 32, 512, 784), torch.randn(32, 784))),
    Case("logits of a language model (V=8000, d=64, 2 layers, 16 tokens) wrt embeddings, B=2",
         lambda: (LanguageModel(), torch.randint(0, 8000, (2, 16))), {"wrt": EMBEDDINGS}),
    Case("J wrt inputs, MLP 784-512-512-10, B=64", lambda: (mlp(784, 512, 512, 10), torch.randn(64, 784))),
    Case("J wrt inputs, MLP 3-64-5, N=128", lambda: (mlp(3, 64, 5, activation=nn.Tanh), torch.randn(128, 3))),
    Case("J wrt inputs, CNN 1x28x28 (16-32-32), B=32",
         lambda: (cnn((1, 16, 32, 32), 28, 2), torch.randn(32, 1, 28, 28))),
)  # fmt: skip

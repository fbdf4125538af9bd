"""Nets for a GPU: a ResNet18 at CIFAR's size and a model of GPT-2's, both with weights drawn at random."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.nets import EMBEDDINGS, Case


class Residual(nn.Module):
    """Two 3 x 3 convolutions with batch norm beside a shortcut."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, inside, h, w)` to `(B, outside, h / stride, w / stride)`."""
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


class ResNet18(nn.Module):
    """He et al. 2016 with the stem that CIFAR's 32 x 32 images get: 3 x 3, no pooling. 11.2 million parameters."""

    def __init__(self, outputs: int = 10, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        stages, inside = [], width
        for i in range(4):
            outside = width << i
            stages += [Residual(inside, outside, 1 if i == 0 else 2), Residual(outside, outside, 1)]
            inside = outside
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(inside, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, 3, h, w)` to `(B, outputs)`."""
        return self.head(self.stages(self.stem(x)).mean(dim=(2, 3)))


class CausalLayer(nn.Module):
    """A transformer layer as in GPT-2: norms first, GELU, causal attention by torch's own function."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, tokens, width)` to the same."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT2(nn.Module):
    """GPT-2's small size (124 million parameters with the tied head): the logits of the last position."""

    def __init__(
        self, vocabulary: int = 50257, width: int = 768, layers: int = 12, heads: int = 12, tokens: int = 128
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.01 * torch.randn(tokens, width))
        self.layers = nn.Sequential(*[CausalLayer(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def embed(self, ids: Tensor) -> Tensor:
        """`(B, tokens)` to `(B, tokens, width)`."""
        return self.embedding(ids)

    def after(self, e: Tensor) -> Tensor:
        """From the embeddings to the logits `(B, vocabulary)` of the last position."""
        return self.head(self.norm(self.layers(e + self.positions)[:, -1]))

    def forward(self, ids: Tensor) -> Tensor:
        """`(B, tokens)` to `(B, vocabulary)`."""
        return self.after(self.embed(ids))


def resnet_parameters(samples: int, outputs: int = 10, width: int = 64, size: int = 32) -> Case:
    """J wrt all parameters of the ResNet18, dense."""
    return Case(
        "resnet-params",
        f"J wrt parameters, ResNet18 (width {width}), 3x{size}x{size}, N={samples}, O={outputs}",
        lambda: (ResNet18(outputs, width), torch.randn(samples, 3, size, size)),
        {"wrt": "params", "form": "dense"},
    )


def resnet_kernel(samples: int, outputs: int, width: int = 64, size: int = 32) -> Case:
    """The tangent kernel of the ResNet18 with all pairs of outputs."""
    return Case(
        f"resnet-ntk-{outputs}",
        f"NTK, ResNet18 (width {width}), 3x{size}x{size}, N={samples}, O={outputs}",
        lambda: (ResNet18(outputs, width), torch.randn(samples, 3, size, size)),
        {"wrt": "params"},
        "ntk",
    )


def gpt2_logits(
    samples: int = 1, tokens: int = 128, vocabulary: int = 50257, width: int = 768, layers: int = 12
) -> Case:
    """All logits of the last position wrt the token embeddings."""
    heads = max(1, width // 64)
    return Case(
        "gpt2-logits",
        f"logits (V={vocabulary}) of a GPT-2 (d={width}, {layers} layers) wrt embeddings, {tokens} tokens, B={samples}",
        lambda: (
            GPT2(vocabulary, width, layers, heads, tokens),
            torch.randint(0, vocabulary, (samples, tokens)),
        ),
        {"wrt": EMBEDDINGS},
    )

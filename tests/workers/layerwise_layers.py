"""More models for the tests of `layerwise`: the layers of torch.nn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tests.workers.layerwise_cases import case, lin, r, stack, tokens, use


def bn(kind: type, features: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        norm = kind(features)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(norm.weight)
        return norm

    return make


# Convolutions ----------------------------------------------------------------------------------------
flat = nn.Flatten
stack(
    "conv2d",
    lambda: r(3, 3, 8, 8),
    lambda: nn.Conv2d(3, 4, 3, 2, 1),
    lambda: nn.ReLU(True),
    lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding=2),
    flat,
    lin(96, 3),
)
stack(
    "conv1d",
    lambda: r(3, 3, 8),
    lambda: nn.Conv1d(3, 4, 3, 2, 1),
    nn.GELU,
    lambda: nn.Conv1d(4, 4, 3, padding="same", groups=4),
    flat,
    lin(16, 3),
)
stack(
    "conv3d",
    lambda: r(2, 2, 3, 4, 5),
    lambda: nn.Conv3d(2, 4, (1, 2, 3), (1, 2, 1), (0, 1, 1)),
    nn.Tanh,
    lambda: nn.Conv3d(4, 2, 2, groups=2, dilation=(1, 1, 2)),
    flat,
    lin(24, 3),
)
stack(
    "conv_same_even",
    lambda: r(2, 2, 5, 6),
    lambda: nn.Conv2d(2, 3, (2, 4), padding="same", dilation=(1, 2)),
    flat,
    lin(90, 2),
)
stack("conv_pointwise", lambda: r(2, 3, 3, 3), lambda: nn.Conv2d(3, 4, 1), flat, lin(36, 2))
stack(
    "transposed1d",
    lambda: r(3, 3, 5),
    lambda: nn.ConvTranspose1d(3, 4, 3, 2, 1, 1),
    nn.Tanh,
    lambda: nn.ConvTranspose1d(4, 6, 2, groups=2, dilation=2),
    flat,
    lin(72, 2),
)
stack(
    "transposed2d",
    lambda: r(2, 3, 4, 4),
    lambda: nn.ConvTranspose2d(3, 4, 3, 2, 1, 1),
    nn.Tanh,
    lambda: nn.ConvTranspose2d(4, 6, (2, 1), groups=2, dilation=2, bias=False),
    flat,
    lin(480, 2),
)
stack("transposed3d", lambda: r(2, 2, 2, 1, 2), lambda: nn.ConvTranspose3d(2, 2, 2, 2), flat, lin(64, 2))
for mode in ("circular", "reflect", "replicate"):
    stack(
        f"pad_{mode}",
        lambda: r(3, 2, 4, 4),
        lambda mode=mode: nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode),
        flat,
        lin(48, 2),
    )
use(
    "frames",
    lambda: r(2, 3, 2, 4, 4),
    lambda s, x: s.c(x.flatten(0, 1)).tanh().view(len(x), -1),
    c=lambda: nn.Conv2d(2, 3, 3, padding=1),
)
use(
    "shared_conv",
    lambda: r(2, 2, 4, 4),
    lambda s, x: s.c(torch.tanh(s.c(x))).mean(3),
    c=lambda: nn.Conv2d(2, 2, 3, padding=1),
)
use(
    "reparametrised_conv",
    lambda: r(2, 2, 4, 4),
    lambda s, x: F.conv2d(x, s.w.exp() * s.g, padding=1),
    w=lambda: r(3, 2, 3, 3),
    g=lambda: r(3, 1, 1, 1),
)


class Residual(nn.Module):
    """A residual block with in-place activations and an in-place sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([bn(nn.BatchNorm2d, 4)() for _ in range(2)])
        self.short, self.head, self.act = nn.Conv2d(3, 4, 1), nn.Linear(4, 3), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[1](self.second(self.act(self.norms[0](self.first(x)))))
        h += self.short(x)
        return self.head(F.adaptive_avg_pool2d(self.act(h), 1).flatten(1))


case("resnet", lambda: (Residual(), r(3, 3, 6, 6)))
use(
    "unet", lambda: r(2, 2, 4, 4),
    lambda s, x: s.o(torch.cat([F.interpolate(s.m(F.max_pool2d(s.d(x), 2)), scale_factor=2), x], 1)).mean((2, 3)),
    d=lambda: nn.Conv2d(2, 3, 3, padding=1), m=lambda: nn.Conv2d(3, 3, 3, padding=1),
    o=lambda: nn.Conv2d(5, 2, 3, padding=1),
)  # fmt: skip

# Norms -----------------------------------------------------------------------------------------------
stack("batch_norm", lambda: r(3, 4), bn(nn.BatchNorm1d, 4), lin(4, 2))
stack("batch_norm_sequence", lambda: r(3, 4, 5), bn(nn.BatchNorm1d, 4), flat, lin(20, 2))
stack("layer_norm", lambda: r(3, 3, 4), lambda: nn.LayerNorm([3, 4]), flat, lin(12, 2))
stack("group_norm", lambda: r(3, 4, 5), lambda: nn.GroupNorm(2, 4), flat, lin(20, 2))
stack("instance_norm", lambda: r(3, 2, 3, 3), lambda: nn.InstanceNorm2d(2, affine=True), flat, lin(18, 2))
stack("rms_norm", lambda: r(3, 5, 4), lambda: nn.RMSNorm(4), lin(4, 2))
use(
    "rms_by_hand",
    lambda: r(3, 5, 4),
    lambda s, x: s.w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
    w=lambda: r(4),
)

# Tables ----------------------------------------------------------------------------------------------
table = {"e": lambda: nn.Embedding(11, 6, padding_idx=0)}
use("tied_head", tokens, lambda s, x: s.e(x).mean(1) @ s.e.weight.T, **table)
use("tied_linear", tokens, lambda s, x: F.linear(s.e(x), s.e.weight)[:, -1], **table)
use("tokens_of_one", lambda: tokens(1), lambda s, x: s.e(x).tanh().sum(1), **table)
use("positions", tokens, lambda s, x: s.l(s.e(x) + s.p[:, : x.shape[1]]), p=lambda: r(1, 7, 6), l=lin(6, 2), **table)
use(
    "positions_looked_up",
    tokens,
    lambda s, x: s.l(s.e(x) + s.p(torch.arange(x.shape[1]))),
    p=lambda: nn.Embedding(7, 6),
    l=lin(6, 2),
    **table,
)
use(
    "positions_by_sample",
    tokens,
    lambda s, x: s.l(s.e(x) + s.p(torch.arange(x.shape[1])[None].expand_as(x))),
    p=lambda: nn.Embedding(7, 6),
    l=lin(6, 2),
    **table,
)
use(
    "bias_table",
    lambda: r(3, 4, 5),
    lambda s, x: torch.softmax(x @ x.mT + s.t[torch.arange(4)[:, None] - torch.arange(4) + 3], -1),
    t=lambda: r(7),
)
use("index_by_data", tokens, lambda s, x: s.t[x].sum(1).tanh() + s.t.index_select(0, x[:, 0]), t=lambda: r(11, 3))
stack("embedding_bag", tokens, lambda: nn.EmbeddingBag(11, 4, mode="mean"), lin(4, 2))

# Attention -------------------------------------------------------------------------------------------
for first in (False, True):
    stack(
        f"encoder_norm_first_{first}",
        lambda: r(2, 5, 8),
        lambda first=first: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=first),
    )
    use(
        f"encoder_time_first_{first}", lambda: r(2, 5, 8), lambda s, x: s.e(x.transpose(0, 1)).transpose(0, 1),
        e=lambda first=first: nn.TransformerEncoderLayer(8, 2, 16, norm_first=first, activation="gelu"),
    )  # fmt: skip
use(
    "decoder", lambda: r(2, 4, 8),
    lambda s, x: s.d(x, s.m(x), tgt_mask=nn.Transformer.generate_square_subsequent_mask(4, dtype=x.dtype)),
    d=lambda: nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), m=lin(8, 8),
)  # fmt: skip
use(
    "attention_own_dims", lambda: r(3, 4, 8), lambda s, x: s.m(x, s.k(x), s.v(x))[0], k=lin(8, 5), v=lin(8, 6),
    m=lambda: nn.MultiheadAttention(8, 2, kdim=5, vdim=6, batch_first=True, add_bias_kv=True, add_zero_attn=True),
)  # fmt: skip
use(
    "attention_cross",
    lambda: r(3, 4, 8),
    lambda s, x: s.m(x, x[:, :2], x[:, :2], need_weights=False)[0],
    m=lambda: nn.MultiheadAttention(8, 2, batch_first=True),
)
use(
    "attention_causal",
    lambda: r(3, 4, 8),
    lambda s, x: F.scaled_dot_product_attention(s.l(x), x, x, is_causal=True),
    l=lin(8, 8),
)
use(
    "attention_weights",
    lambda: r(3, 4, 8),
    lambda s, x: _masked(s.m, x),
    m=lambda: nn.MultiheadAttention(8, 2, batch_first=True),
)


def _masked(attention: nn.Module, x: Tensor) -> Tensor:
    padding = torch.zeros(len(x), 4, dtype=torch.bool)
    padding[:, -1] = True
    mixed, weights = attention(
        x, x, x, key_padding_mask=padding, attn_mask=torch.triu(torch.ones(4, 4, dtype=torch.bool), 1)
    )
    return mixed.sum(2) + weights[:, :, 0]


# Recurrence ------------------------------------------------------------------------------------------
for kind in ("LSTM", "GRU", "RNN"):
    for ways in (1, 2):
        use(
            f"{kind.lower()}_{ways}", lambda: r(3, 5, 3), lambda s, x: s.l(s.r(x)[0][:, -1]), l=lin(4 * ways, 2),
            r=lambda kind=kind, ways=ways: getattr(nn, kind)(3, 4, 2, batch_first=True, bidirectional=ways == 2),
        )  # fmt: skip
use(
    "lstm_projected",
    lambda: r(3, 5, 3),
    lambda s, x: s.r(x.transpose(0, 1))[0][-1],
    r=lambda: nn.LSTM(3, 4, proj_size=2),
)
use(
    "rnn_relu_no_bias",
    lambda: r(3, 5, 3),
    lambda s, x: s.r(x)[0].sum(1),
    r=lambda: nn.RNN(3, 4, nonlinearity="relu", bias=False, batch_first=True),
)
use("lstm_cell", lambda: r(3, 5, 3), lambda s, x: _lstm_cell(s.c, x), c=lambda: nn.LSTMCell(3, 4))
use(
    "gru_cell_start",
    lambda: r(3, 5, 3),
    lambda s, x: _gru_cell(s.c, s.h, x),
    c=lambda: nn.GRUCell(3, 4),
    h=lambda: r(4),
)


def _lstm_cell(cell: nn.Module, x: Tensor) -> Tensor:
    state = (x.new_zeros(len(x), 4), x.new_zeros(len(x), 4))
    for t in range(3):
        state = cell(x[:, t], state)
    return state[0]


def _gru_cell(cell: nn.Module, start: Tensor, x: Tensor) -> Tensor:
    h = start.expand(len(x), -1)
    for t in range(3):
        h = cell(x[:, t], h)
    return h


def _loop(s: Any, x: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(5):
        z = torch.tanh(s.l(z) + s.u(x))
    return z


use("loop", lambda: r(3, 4), _loop, l=lin(4, 4), u=lin(4, 4))

"""Transformers and other attention."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from tests.zoo.registry import entry

EMBEDDED = {"module": "embed", "side": "output"}


@entry("attention")
def encoder_layer():
    """One encoder layer, whose fused path has no gradient."""
    return nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), torch.randn(2, 3, 8)


class _Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.body, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

    def forward(self, x, padding):
        return self.head(self.body(x, src_key_padding_mask=padding)[:, 0])


@entry("attention")
def encoder_padded():
    """An encoder with a padding mask, which torch turns into nested tensors where it may."""
    padding = torch.tensor([[False, False, False, True], [False, False, True, True]])
    return _Padded(), (torch.randn(2, 4, 8), padding)


@entry("attention")
def encoder_norm_first():
    """Pre-norm, GELU, two layers."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, activation="gelu", norm_first=True, batch_first=True)
    return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8), enable_nested_tensor=False), torch.randn(2, 3, 8)


class _Seq2Seq(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Transformer(8, 2, 1, 1, 12, batch_first=True)

    def forward(self, source, target):
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=target.dtype)
        return self.body(source, target, tgt_mask=mask, tgt_is_causal=True).mean(dim=1)


@entry("attention")
def encoder_decoder():
    """Two inputs: encoder, causal decoder and cross attention."""
    return _Seq2Seq(), (torch.randn(2, 3, 8), torch.randn(2, 2, 8))


class _Attend(nn.Module):
    def __init__(self, need: bool) -> None:
        super().__init__()
        self.attention, self.need = nn.MultiheadAttention(6, 2, batch_first=True), need

    def forward(self, x):
        y, weights = self.attention(x, x, x, need_weights=self.need)
        return (y, weights) if self.need else y


@entry("attention")
def multihead():
    """MultiheadAttention without its weights: fused attention."""
    return _Attend(need=False), torch.randn(2, 3, 6)


@entry("attention")
def multihead_weights():
    """MultiheadAttention with its weights: two outputs."""
    return _Attend(need=True), torch.randn(2, 3, 6)


class _Cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, kdim=4, vdim=5, batch_first=True, add_bias_kv=True)

    def forward(self, q, k, v):
        return self.attention(q, k, v)[0].sum(dim=1)


@entry("attention")
def cross_attention():
    """Three inputs of three widths, and biases for keys and values."""
    return _Cross(), (torch.randn(2, 2, 6), torch.randn(2, 3, 4), torch.randn(2, 3, 5))


class _CausalBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 12), nn.GELU(approximate="tanh"), nn.Linear(12, width))

    def forward(self, x):
        b, t, w = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(a.transpose(1, 2).reshape(b, t, w))
        return x + self.mlp(self.norm2(x))


class _GPT(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self, words: int = 11, width: int = 8, length: int = 4) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(words, width), nn.Parameter(torch.randn(length, width) / 4)
        self.blocks = nn.ModuleList(_CausalBlock(width, 2) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))[:, -1]


@entry("attention", wrt=(EMBEDDED, "params", {"module": "blocks.1", "side": "input"}))
def causal_decoder():
    """A small GPT: token ids, a tied head, fused causal attention; wrt embeddings and wrt a hidden state."""
    return _GPT(), torch.randint(0, 11, (2, 4))


class _CausalFloat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = _CausalBlock(8, 2)

    def forward(self, x):
        return self.block(x)


@entry("attention")
def causal_block():
    """One block wrt its float inputs, at every position."""
    return _CausalFloat(), torch.randn(2, 3, 8)


class _ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 8, 2, stride=2)
        self.cls, self.place = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), tokens], dim=1) + self.place
        return self.head(self.layer(x)[:, 0])


@entry("attention")
def vision_transformer():
    """Patches, a class token and positions."""
    return _ViT(), torch.randn(2, 1, 4, 4)


class _Rotary(nn.Module):
    """Rotary positions as complex numbers, RMSNorm and a gated MLP, as LLaMA has them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = (
            nn.RMSNorm(8, eps=1e-6),
            nn.Linear(8, 24, bias=False),
            nn.Linear(8, 8, bias=False),
        )
        self.gate, self.up, self.down = (nn.Linear(8, 8, bias=False) for _ in range(3))

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        q, k = self._turn(q), self._turn(k)
        x = x + self.out(torch.softmax(q @ k.transpose(1, 2) / 8**0.5, dim=-1) @ v)
        return x + self.down(F.silu(self.gate(x)) * self.up(x))

    @staticmethod
    def _turn(x):
        angles = torch.outer(torch.arange(x.shape[1], dtype=x.dtype), 10.0 ** -torch.arange(4, dtype=x.dtype))
        turned = torch.view_as_complex(x.unflatten(-1, (4, 2)).contiguous()) * torch.polar(
            torch.ones_like(angles), angles
        )
        return torch.view_as_real(turned).flatten(-2)


@entry("attention")
def rotary_block():
    """Rotary positions by complex multiplication."""
    return _Rotary(), torch.randn(2, 3, 8)


class _Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = torch.einsum("bti,btj->btij", k, v).cumsum(dim=1)
        return torch.einsum("bti,btij->btj", q, state) / (q * k.cumsum(dim=1)).sum(dim=-1, keepdim=True)


@entry("attention")
def linear_attention():
    """Causal attention by cumulative sums."""
    return _Linear(), torch.randn(2, 3, 4)


class _BagOfWords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 5, padding_idx=0)
        self.body = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, tokens):
        kept = (tokens != 0).unsqueeze(-1)
        return self.body((self.embed(tokens) * kept).sum(dim=1) / kept.sum(dim=1))


@entry("attention", wrt=(EMBEDDED, "params"))
def bag_of_words():
    """Mean of embeddings with padding."""
    return _BagOfWords(), torch.tensor([[3, 4, 0, 0], [1, 1, 8, 0], [7, 2, 5, 6]])


class _Pool(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.score, self.value = nn.Linear(4, 1), nn.Linear(4, 3)

    def forward(self, x, mask):
        scores = self.score(x).squeeze(-1).masked_fill(mask, float("-inf"))
        return torch.einsum("bt,btd->bd", torch.softmax(scores, dim=-1), self.value(x))


@entry("attention")
def attention_pooling():
    """Minus infinity in a softmax: the masked get zeros, not NaN."""
    return _Pool(), (torch.randn(3, 4, 4), torch.tensor([[0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 0, 0]]).bool())

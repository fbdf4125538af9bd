"""Fully connected networks, and what is done to their weights."""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrizations

from tests.zoo.registry import entry

x34 = (3, 4)


def _mlp(*widths: int, act: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1])


@entry("mlp")
def linear():
    """One linear layer: the Jacobian is its weight."""
    return nn.Linear(4, 3), torch.randn(x34)


@entry("mlp")
def linear_no_bias():
    """One linear layer without a bias."""
    return nn.Linear(4, 2, bias=False), torch.randn(x34)


@entry("mlp")
def mlp_tanh():
    """Two hidden layers."""
    return _mlp(4, 8, 8, 3), torch.randn(x34)


@entry("mlp")
def mlp_relu():
    """Kinks, none of them at a sample."""
    return _mlp(4, 16, 16, 3, act=nn.ReLU), torch.randn(x34)


@entry("mlp")
def mlp_deep_gelu():
    """Ten layers."""
    return _mlp(*[6] * 11, act=nn.GELU), torch.randn(2, 6)


@entry("mlp")
def mlp_float64():
    """The same in double precision."""
    return _mlp(4, 8, 3).double(), torch.randn(x34, dtype=torch.float64)


@entry("mlp")
def mlp_bfloat16():
    """The same in bfloat16, against the float64 twin of its rounded weights."""
    return _mlp(4, 8, 3).bfloat16(), torch.randn(x34).bfloat16()


@entry("mlp", wrt=("inputs",), chain=True)
def autoencoder():
    """A bottleneck of two, wide enough on both sides to pay."""
    return _mlp(128, 64, 2, 64, 128), torch.randn(2, 128)


@entry("mlp", wrt=("inputs",), chain=True)
def wide_head():
    """Many outputs from few features."""
    return nn.Sequential(_mlp(128, 64, 8), nn.SiLU(), nn.Linear(8, 300)), torch.randn(2, 128)


@entry("mlp")
def many_inputs_one_output():
    """Reverse mode's home ground."""
    return _mlp(40, 6, 1), torch.randn(3, 40)


@entry("mlp")
def scalar_per_sample():
    """Outputs of shape (B,)."""
    return nn.Sequential(_mlp(4, 6, 1), nn.Flatten(0)), torch.randn(x34)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.body = nn.LayerNorm(width), _mlp(width, 12, width, act=nn.GELU)

    def forward(self, x):
        return x + self.body(self.norm(x))


@entry("mlp")
def mlp_residual_layernorm():
    """Pre-norm residual blocks."""
    return nn.Sequential(_Residual(6), _Residual(6), nn.Linear(6, 2)), torch.randn(3, 6)


@entry("mlp")
def mlp_batchnorm_eval():
    """Batch norm in eval mode, with statistics of its own."""
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Softplus(), nn.Linear(8, 3))
    with torch.no_grad():
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2.0)
        model[1].weight.normal_()
    return model, torch.randn(x34)


@entry("mlp")
def mlp_dropout_eval():
    """Dropout, which does nothing in eval mode."""
    return nn.Sequential(nn.Linear(4, 8), nn.ELU(), nn.Dropout(0.5), nn.Linear(8, 3)), torch.randn(x34)


@entry("mlp")
def mlp_rmsnorm():
    """RMSNorm and SiLU."""
    return nn.Sequential(nn.Linear(4, 8), nn.RMSNorm(8, eps=1e-6), nn.SiLU(), nn.Linear(8, 3)), torch.randn(x34)


class _Sine(nn.Module):
    def forward(self, x):
        return torch.sin(3.0 * x)


@entry("mlp")
def siren():
    """A coordinate network with sines."""
    return nn.Sequential(nn.Linear(2, 16), _Sine(), nn.Linear(16, 16), _Sine(), nn.Linear(16, 3)), torch.rand(5, 2)


@entry("mlp")
def glu_gates():
    """Gated linear units."""
    return nn.Sequential(nn.Linear(4, 12), nn.GLU(), nn.Linear(6, 3)), torch.randn(x34)


class _Maxout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 15)

    def forward(self, x):
        return self.layer(x).unflatten(-1, (5, 3)).amax(dim=-1)


@entry("mlp")
def maxout():
    """The largest of three linear pieces."""
    return _Maxout(), torch.randn(x34)


class _TiedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 6) / 2), nn.Parameter(torch.randn(3))

    def forward(self, x):
        return F.linear(torch.tanh(F.linear(x, self.weight, self.bias)), self.weight.T)


@entry("mlp")
def tied_transpose():
    """The decoder's weight is the encoder's, transposed; parameters stand in no layer."""
    return _TiedAutoencoder(), torch.randn(3, 6)


@entry("mlp")
def reused_layer():
    """One layer called three times."""
    layer = nn.Linear(5, 5)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), layer), torch.randn(3, 5)


class _TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)
        self.back = nn.Linear(6, 4)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.back(self.embed(x))))


@entry("mlp", wrt=("inputs", "params", "head.*"))
def tied_two_names():
    """One parameter under two names, asked for by either."""
    return _TwoNames(), torch.randn(x34)


@entry("mlp")
def frozen_layers():
    """Half of the parameters do not require gradients."""
    model = _mlp(4, 8, 8, 3)
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    return model, torch.randn(x34)


class _Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(4, 3), nn.Linear(5, 7)

    def forward(self, x):
        return torch.tanh(self.used(x))


@entry("mlp")
def unused_parameters():
    """A layer that is never called: zeros."""
    return _Unused(), torch.randn(x34)


class _Outsider(nn.Module):
    """Uses another module's parameter without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 4), nn.Parameter(torch.randn(4))

    def forward(self, x):
        return torch.tanh(self.layer(x)) * self.scale + x @ self.layer.weight


@entry("mlp")
def parameter_used_outside():
    """A layer's weight is used by the layer and past it."""
    return _Outsider(), torch.randn(x34)


@entry("mlp", defeats=("forward:params",))
def weight_norm():
    """The weight is computed from a direction and a length."""
    layer = parametrizations.weight_norm(nn.Linear(4, 6))
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(6, 3)), torch.randn(x34)


@entry("mlp")
def spectral_norm():
    """The weight is divided by its largest singular value."""
    layer = parametrizations.spectral_norm(nn.Linear(4, 6))
    return nn.Sequential(layer.eval(), nn.Tanh(), nn.Linear(6, 3)), torch.randn(x34)


@entry("mlp")
def orthogonal_weight():
    """The weight is the Cayley map of a skew matrix."""
    layer = parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="cayley")
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 2)), torch.randn(x34)


class _Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Bilinear(4, 4, 3)

    def forward(self, x):
        return self.mix(x, torch.sigmoid(x))


@entry("mlp")
def bilinear():
    """A layer of two arguments."""
    return _Bilinear(), torch.randn(x34)


class _LoRA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 5)
        self.down, self.up = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(5, 2))

    def forward(self, x):
        return self.base(x) + (x @ self.down.T) @ self.up.T


@entry("mlp", wrt=("inputs", ["down", "up"], "base.*"))
def lora():
    """A frozen layer with a low-rank correction; globs pick either part."""
    return _LoRA(), torch.randn(3, 6)


class _Hyper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.maker, self.shape = nn.Linear(2, 12), (3, 4)

    def forward(self, x, code):
        weight = self.maker(code).unflatten(-1, self.shape)
        return torch.tanh(torch.einsum("boi,bi->bo", weight, x))


@entry("mlp")
def hypernetwork():
    """One input makes the weights that the other passes through."""
    return _Hyper(), (torch.randn(x34), torch.randn(3, 2))


class _Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 3), nn.ModuleList(nn.Linear(4, 2) for _ in range(3))

    def forward(self, x):
        gates = torch.softmax(self.gate(x), dim=-1)
        return sum(gates[:, i : i + 1] * torch.tanh(e(x)) for i, e in enumerate(self.experts))


@entry("mlp")
def mixture_of_experts():
    """Soft gates over experts."""
    return _Mixture(), torch.randn(x34)


class _TopK(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 3)
        self.weight = nn.Parameter(torch.randn(3, 2, 4))

    def forward(self, x):
        best, which = self.gate(x).topk(2, dim=-1)
        chosen = self.weight[which]
        return torch.einsum("bk,bkoi,bi->bo", torch.softmax(best, dim=-1), chosen, x)


@entry("mlp")
def routed_experts():
    """Each sample picks two of three experts by index."""
    return _TopK(), torch.randn(x34)


# vmap over the derivative of PReLU fails in torch.
@entry("mlp", defeats=("reverse",))
def prelu_and_friends():
    """Activations with parameters and thresholds."""
    model = nn.Sequential(
        nn.Linear(4, 6), nn.PReLU(6), nn.Linear(6, 6), nn.Hardswish(), nn.Linear(6, 6), nn.Softshrink(0.1),
        nn.Linear(6, 6), nn.Mish(), nn.LogSoftmax(dim=-1),
    )  # fmt: skip
    return model, torch.randn(x34)


class _Ensemble(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Parameter(torch.randn(5, 4, 6) / 2), nn.Parameter(torch.randn(5, 6, 2) / 2)

    def forward(self, x):
        h = torch.tanh(torch.einsum("bi,mio->mbo", x, self.first))
        return torch.bmm(h, self.last).transpose(0, 1)


@entry("mlp")
def ensemble():
    """Five networks in one batched product; outputs (B, 5, 2)."""
    return _Ensemble(), torch.randn(x34)

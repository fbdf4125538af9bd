"""Models for the tests of `layerwise`, each with a batch: every way that a parameter may meet a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

Case = tuple[nn.Module, Tensor]
CASES: dict[str, Callable[[], Case]] = {}
r = torch.randn


class Use(nn.Module):
    """A function of a module and its input; floating-point tensors become parameters, the rest attributes."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            is_weight = isinstance(part, Tensor) and part.is_floating_point()
            setattr(self, name, nn.Parameter(part) if is_weight else part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def case(name: str, build: Callable[[], Case]) -> None:
    assert name not in CASES, name
    CASES[name] = build


def use(name: str, x: Callable[[], Tensor], function: Callable[..., Any], **parts: Callable[[], Any]) -> None:
    case(name, lambda: (Use(function, **{key: make() for key, make in parts.items()}), x()))


def stack(name: str, x: Callable[[], Tensor], *layers: Callable[[], nn.Module]) -> None:
    case(name, lambda: (nn.Sequential(*(make() for make in layers)), x()))


def lin(a: int, b: int) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(a, b)


def tokens(batch: int = 3, length: int = 4) -> Tensor:
    return torch.randint(0, 11, (batch, length))


# Products with a matrix ------------------------------------------------------------------------------
stack("mlp", lambda: r(3, 4), lin(4, 5), nn.Tanh, lin(5, 3))
stack("mlp_softmax", lambda: r(3, 4), lin(4, 5), lambda: nn.Softmax(1))
stack("batch_of_one", lambda: r(1, 4), lin(4, 5), nn.Tanh, lin(5, 3))
use("shared", lambda: r(3, 4), lambda s, x: s.o(torch.tanh(s.l(torch.tanh(s.l(x))))), l=lin(4, 4), o=lin(4, 2))
use(
    "shared_positions",
    lambda: r(3, 6, 4),
    lambda s, x: s.l(x[:, :3]).sum(1) + s.l(x[:, 3:].tanh()).mean(1),
    l=lin(4, 4),
)
use("fold", lambda: r(3, 6, 4), lambda s, x: s.l(x.reshape(-1, 4)).tanh().view(len(x), -1), l=lin(4, 2))
use(
    "fold_time_first",
    lambda: r(3, 6, 4),
    lambda s, x: s.l(x.transpose(0, 1).reshape(-1, 4)).view(6, len(x), 2).sum(0),
    l=lin(4, 2),
)
use(
    "fold_middle", lambda: r(3, 6, 2, 4),
    lambda s, x: s.l(x.permute(1, 0, 2, 3).reshape(-1, 4)).view(6, len(x), 2, 2).sum((0, 2)), l=lin(4, 2),
)  # fmt: skip
use("time_first", lambda: r(3, 6, 4), lambda s, x: s.l(x.transpose(0, 1)).tanh().sum(0), l=lin(4, 2))
use("p_at_x", lambda: r(3, 4, 6), lambda s, x: torch.tanh(s.p @ x).sum(2), p=lambda: r(5, 4))
use("p_at_x_transposed", lambda: r(3, 4), lambda s, x: torch.tanh(s.p @ x.T).T, p=lambda: r(5, 4))
use("x_at_p", lambda: r(3, 4), lambda s, x: torch.tanh(x @ s.p), p=lambda: r(4, 5))
use("x_at_p_transposed", lambda: r(3, 4), lambda s, x: torch.tanh(x @ s.p.T) @ s.p, p=lambda: r(5, 4))
use("x_at_vector", lambda: r(3, 2, 4), lambda s, x: torch.tanh(x @ s.p), p=lambda: r(4))
use("x_at_stack", lambda: r(3, 6, 4), lambda s, x: torch.tanh(x[:, None] @ s.p).flatten(1), p=lambda: r(2, 4, 5))
use(
    "bmm_stack",
    lambda: r(3, 6, 4),
    lambda s, x: torch.bmm(x.transpose(0, 1), s.p).transpose(0, 1).flatten(1),
    p=lambda: r(6, 4, 5),
)
use("einsum", lambda: r(3, 6, 4), lambda s, x: torch.einsum("bti,hio->bhto", x, s.p).flatten(1), p=lambda: r(2, 4, 5))
use(
    "einsum_two",
    lambda: r(3, 4),
    lambda s, x: torch.einsum("bi,ri,rj->bj", x, s.p, s.q),
    p=lambda: r(2, 4),
    q=lambda: r(2, 3),
)
use(
    "addmm",
    lambda: r(3, 4),
    lambda s, x: torch.addmm(s.b, x, s.p, beta=0.5, alpha=2.0),
    p=lambda: r(4, 5),
    b=lambda: r(5),
)
use(
    "addmm_folded",
    lambda: r(3, 6, 4),
    lambda s, x: torch.addmm(s.b, x.view(-1, 4), s.p).view(len(x), -1),
    p=lambda: r(4, 5),
    b=lambda: r(5),
)
use("bilinear", lambda: r(3, 4), lambda s, x: s.b(x, torch.tanh(x)), b=lambda: nn.Bilinear(4, 4, 3))

# Parameters that come to a call through others -------------------------------------------------------
par = torch.nn.utils.parametrizations
use(
    "lora",
    lambda: r(3, 4),
    lambda s, x: F.linear(x, s.w + 0.5 * s.b @ s.a),
    w=lambda: r(5, 4),
    a=lambda: r(2, 4),
    b=lambda: torch.zeros(5, 2),
)
use(
    "lora_folded", lambda: r(3, 6, 4),
    lambda s, x: (F.linear(x.reshape(-1, 4), s.w) + (x.reshape(-1, 4) @ s.a.T) @ s.b.T).view(len(x), -1),
    w=lambda: r(5, 4), a=lambda: r(2, 4), b=lambda: torch.zeros(5, 2),
)  # fmt: skip
stack("weight_norm", lambda: r(3, 4), lambda: par.weight_norm(nn.Linear(4, 5)), nn.Tanh, lin(5, 2))
stack("spectral_norm", lambda: r(3, 4), lambda: par.spectral_norm(nn.Linear(4, 5)), nn.Tanh, lin(5, 2))
stack("orthogonal", lambda: r(3, 4), lambda: par.orthogonal(nn.Linear(4, 4)), nn.Tanh, lin(4, 2))
use(
    "masked_weight",
    lambda: r(3, 4),
    lambda s, x: F.linear(x, s.w * s.m),
    w=lambda: r(5, 4),
    m=lambda: torch.arange(20).view(5, 4) % 3,
)
use(
    "packed_slices",
    lambda: r(3, 4),
    lambda s, x: F.linear(x, s.w[2:5]) * F.linear(x, s.w[:3]) + F.linear(x, s.w.chunk(2)[1]),
    w=lambda: r(6, 4),
)
use("written_copy", lambda: r(3, 4), lambda s, x: _written(s.w, x), w=lambda: r(2, 4))


def _written(w: Tensor, x: Tensor) -> Tensor:
    w = w.clone()
    w.mul_(2)
    return F.linear(x, w)


def _keeps_a_mask(s: Any, x: Tensor) -> Tensor:
    if not hasattr(s, "mask"):
        s.mask = torch.ones(4, dtype=x.dtype).cumsum(0)
    return s.l(x * s.mask)


# Parameters used directly ----------------------------------------------------------------------------
use("plus", lambda: r(3, 4), lambda s, x: s.l(x + s.p), p=lambda: r(4), l=lin(4, 2))
use(
    "minus_over",
    lambda: r(3, 2, 4),
    lambda s, x: ((s.p - x) / (s.q**2 + 1) + 2**s.q).sum(1),
    p=lambda: r(4),
    q=lambda: r(2, 1),
)
use("times", lambda: r(3, 4), lambda s, x: s.l(torch.tanh(x * s.p)), p=lambda: r(4), l=lin(4, 2))
use("power", lambda: r(3, 4), lambda s, x: x.abs() ** s.p + torch.where(x > 0, x, s.p), p=lambda: r(4))
use("scalar", lambda: r(3, 4), lambda s, x: torch.tanh(x * s.p) + s.p, p=lambda: r(()))
use("only_parameter", lambda: r(3, 4), lambda s, x: s.p.expand(len(x), -1).tanh(), p=lambda: r(4))
use(
    "class_token",
    lambda: r(3, 2, 4),
    lambda s, x: s.l(torch.cat([s.c.expand(len(x), -1, -1), x], 1)),
    c=lambda: r(1, 1, 4),
    l=lin(4, 2),
)
use(
    "queries",
    lambda: r(3, 5, 4),
    lambda s, x: (s.q.unsqueeze(1).repeat(1, len(x), 1) * x.transpose(0, 1)).transpose(0, 1),
    q=lambda: r(5, 4),
)
use(
    "repeat_interleave",
    lambda: r(3, 5, 4),
    lambda s, x: s.q.repeat_interleave(len(x), 0).view(5, len(x), 4).transpose(0, 1) * x,
    q=lambda: r(5, 4),
)
use("prelu", lambda: r(3, 4), lambda s, x: s.b(s.l(s.a(x))), a=lambda: nn.PReLU(4), l=lin(4, 3), b=nn.PReLU)
use("unused", lambda: r(3, 4), lambda s, x: s.l(x), l=lin(4, 2), p=lambda: r(3))
use("keeps_a_mask", lambda: r(3, 4), _keeps_a_mask, l=lin(4, 4))
use("dead_branch", lambda: r(3, 4), lambda s, x: (s.m(x), s.l(x))[1], l=lin(4, 2), m=lin(4, 2))
use("complex_inside", lambda: r(3, 4), lambda s, x: torch.fft.rfft(s.l(x) * s.p).abs(), l=lin(4, 6), p=lambda: r(6))
use(
    "complex_filter",
    lambda: r(3, 4),
    lambda s, x: torch.fft.irfft(torch.fft.rfft(s.l(x)) * torch.view_as_complex(s.p), n=6),
    l=lin(4, 6),
    p=lambda: r(4, 2),
)
use(
    "real_times_complex",
    lambda: r(3, 4),
    lambda s, x: torch.view_as_real(torch.fft.rfft(s.l(x)) * s.p),
    l=lin(4, 6),
    p=lambda: r(4),
)


# Writes ----------------------------------------------------------------------------------------------
def _set_item(s: Any, x: Tensor) -> Tensor:
    out = x.new_zeros(len(x), 3, 4)
    out[:, 0] = s.c
    out[:, 1:] = s.l(x)[:, None]
    return torch.tanh(out)


def _write_to_view(s: Any, x: Tensor) -> Tensor:
    h = s.l(x)
    h[:, :2].add_(s.c)
    h[:, 2:] += s.c * 2
    h.view(len(x), 2, 2)[:, 1].mul_(s.d)
    return torch.tanh(h)


use("set_item", lambda: r(3, 4), _set_item, c=lambda: r(4), l=lin(4, 4))
use("write_to_view", lambda: r(3, 4), _write_to_view, c=lambda: r(2), d=lambda: r(2), l=lin(4, 4))
stack("write_to_input", lambda: r(3, 4), lambda: nn.ReLU(True), lin(4, 2))


class Cube(torch.autograd.Function):
    """A function of data alone, in the old form that `vmap` does not take."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * 3 * x**2


use("custom_function_of_data", lambda: r(3, 4), lambda s, x: s.l(Cube.apply(s.m(x))), l=lin(4, 2), m=lin(4, 4))

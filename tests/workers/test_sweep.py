"""The walk back through autograd's graph against autograd's own, one cotangent at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from jacray_workers.kernels import matmul, sweep_convs
from jacray_workers.kernels.matmul import mm
from jacray_workers.kernels.sweep import sweep
from torch import nn

torch.manual_seed(0)
D = torch.float64
W = torch.randn(6, 5, dtype=D)
B = torch.randn(6, dtype=D)
K = {n: torch.randn(4, 3, *(3,) * n, dtype=D) for n in (1, 2, 3)}
FEW = torch.randn(4, 2, 3, 2, dtype=D)
T = torch.randn(3, 4, 2, 2, dtype=D)
S = torch.randn(5, dtype=D)


def twice(x, f):
    """A residual connection, whose cotangent goes two ways and meets itself again."""
    return x + f(F.linear(F.linear(x, W, B), W.T)) * 2


# What is done to x, and the shape of x with the batch first.
USES = {
    "linear": (lambda x: F.linear(x, W, B), (3, 5)),
    "linear on several axes": (lambda x: F.linear(x, W, B).tanh(), (3, 2, 4, 5)),
    "linear behind a mean": (lambda x: F.linear(F.relu(F.linear(x, W, B)), W.T, S).mean(dim=1), (3, 4, 5)),
    "linear used twice": (lambda x: F.linear(x, W, B).sum(1) + F.linear(x, W, B)[:, 0], (3, 4, 5)),
    "addmm with a factor": (lambda x: torch.addmm(B, x, W.T, alpha=0.5), (3, 5)),
    "products of data": (lambda x: x @ x.mT, (3, 4, 5)),
    "product of one matrix": (lambda x: (x.flatten(1).T @ x.flatten(1)).sum(0).expand(3, -1), (3, 2, 2)),
    "a shared matrix": (lambda x: x @ W.T, (3, 4, 5)),
    "smooth functions": (lambda x: F.gelu(x) + torch.exp(-x.sigmoid()) + F.silu(x) ** 2, (3, 5)),
    "kinks": (lambda x: F.relu(x) - F.leaky_relu(x) + x.clamp(-0.5, 0.5) + x.abs(), (3, 5)),
    "sums and factors": (lambda x: torch.add(x, x * S, alpha=2) - x / 3 + 2 * x, (3, 5)),
    "a spread factor": (lambda x: x[:, :1] * S + x[:, 1:2].expand(-1, 5), (3, 5)),
    "axes": (lambda x: x.transpose(1, 2).permute(0, 2, 1).unsqueeze(1).squeeze(1).flatten(1), (3, 4, 5)),
    "parts": (lambda x: torch.cat([p * (i + 1) for i, p in enumerate(x.split(2, dim=-1))], dim=1), (3, 5)),
    "some parts": (lambda x: x.split(2, dim=-1)[1] + x.unbind(dim=-1)[0][:, None], (3, 5)),
    "entries": (lambda x: torch.stack([p * (i + 1) for i, p in enumerate(x.unbind(1))]).sum(0), (3, 4, 5)),
    "means": (lambda x: x.mean(dim=(1, 2)) + x.mean(dim=-1, keepdim=True)[:, 0] + x.sum(dim=-2), (3, 4, 1)),
    "conv1d": (lambda x: F.conv1d(x, K[1], stride=2, padding=1), (3, 3, 9)),
    "conv2d": (lambda x: F.relu(F.conv2d(x, K[2], padding=1, dilation=2)), (3, 3, 9, 8)),
    "conv2d twice": (lambda x: F.conv2d(F.relu(F.conv2d(x, K[2])), K[2].mT.transpose(0, 1)), (3, 3, 7, 7)),
    "conv2d of few channels": (lambda x: F.conv2d(x, FEW, stride=(2, 1), padding=(1, 0)), (3, 2, 8, 7)),
    "conv2d in groups": (lambda x: F.conv2d(x, K[2][:, :1], groups=2), (3, 2, 6, 6)),
    "conv3d": (lambda x: F.conv3d(x, K[3]), (3, 3, 4, 4, 4)),
    "transposed conv": (lambda x: F.conv_transpose2d(x, T, stride=2, output_padding=1), (3, 3, 4, 4)),
    "residuals": (lambda x: twice(twice(x, F.relu), F.gelu), (3, 5)),
    "residuals of stacks": (lambda x: twice(twice(x, lambda t: (t @ t.mT).softmax(-1) @ t), F.relu), (3, 4, 5)),
    "one cotangent for several": (lambda x: (x.tanh() + x.sin()) + (x.exp() + (x + x)) + (x.cos() - x), (3, 5)),
    "norm": (lambda x: F.layer_norm(x, (5,), S, S).softmax(dim=-1), (3, 4, 5)),
    "norm of several axes": (lambda x: F.layer_norm(x.transpose(1, 2), (4, 5)) * S, (3, 4, 2, 5)),
    "norm of everything": (lambda x: F.layer_norm(x[1], (4,)).sum() + x[:, 0] ** 2, (3, 4)),
    "norm behind a mean": (lambda x: F.layer_norm(x * S, (5,), S).mean(dim=1), (3, 4, 5)),
    "softmax": (lambda x: x.softmax(dim=1) + (2 * x).log_softmax(dim=-1) + x.softmax(dim=0), (3, 4, 5)),
    "softmax by heads": (lambda x: torch.softmax(x.unflatten(2, (2, 2)).transpose(1, 2), -1) @ S[:2], (3, 5, 4)),
    "one entry": (lambda x: x[:, -1] * x.select(2, 1).sum(1, keepdim=True) + x[:, 1], (3, 4, 5)),
    "entries of a stack": (lambda x: sum(p * i for i, p in enumerate(torch.stack([x, x * x]), 1)), (3, 4)),
    "slices": (lambda x: x[:, 1:-1] + x[:, ::2] * x[:, -2:] + x.narrow(1, 0, 2) + x[:, :2].exp(), (3, 4, 5)),
    "slices of samples": (lambda x: torch.cat([x[1:], x[:1]]) + x.flip(0)[:3], (3, 5)),
    "pool": (lambda x: F.avg_pool2d(F.max_pool2d(x, 2), 2), (3, 2, 8, 8)),
    "complex numbers between": (
        lambda x: torch.fft.irfft(torch.fft.rfft(x) * (1 + 2j), n=5) + torch.fft.rfft(x).abs()[:, :1],
        (3, 5),
    ),
    "two precisions": (lambda x: x.float().tanh() * 2 + x, (3, 5)),
    "attention": (lambda x: (x @ x.mT + S[:4].diag()).softmax(-1) @ x, (3, 2, 4, 5)),
}


@pytest.mark.parametrize("rows_first", [False, True])
@pytest.mark.parametrize("name", USES)
def test_agrees_with_autograd(name, rows_first):
    use, shape = USES[name]
    leaf = torch.randn(shape, dtype=D, requires_grad=True)
    x = leaf.clone()
    y = use(x)
    vs = (
        torch.randn(4, *y.shape, dtype=D)
        if rows_first
        else torch.randn(4, 1, *y.shape[1:], dtype=D).expand(4, *y.shape)
    )
    found = sweep(y, [leaf, x], vs)
    assert found is not None
    plain = torch.stack([torch.autograd.grad(y, leaf, v, retain_graph=True)[0] for v in vs])
    for g in found:
        torch.testing.assert_close(g, plain, rtol=1e-10 if name != "two precisions" else 1e-6, atol=1e-12)


def test_an_inner_place_gets_its_shape():
    x = torch.randn(3, 4, 5, dtype=D, requires_grad=True)
    flat = x.reshape(12, 5)
    made = torch.addmm(B, flat, W.T)
    y = made.reshape(3, 4, 6).mean(dim=1)
    vs = torch.eye(6, dtype=D)[:, None].expand(-1, 3, -1)
    found = sweep(y, [x, flat, made], vs)
    assert found is not None
    for place, g in zip((x, flat, made), found, strict=True):
        plain = torch.stack([torch.autograd.grad(y, place, v, retain_graph=True)[0] for v in vs])
        torch.testing.assert_close(g, plain)


def test_what_a_caller_gets_is_not_written_over():
    x = torch.randn(3, 5, dtype=D, requires_grad=True)
    hidden = F.linear(x, W, B)
    off = F.relu(hidden)
    scaled = off * 3
    y = F.linear(scaled, W.T) + x
    places = [y, scaled, off, hidden, x]
    vs = torch.randn(4, 3, 5, dtype=D)
    before = vs.clone()
    found = sweep(y, places, vs)
    assert found is not None
    for place, g in zip(places, found, strict=True):
        plain = torch.stack([torch.autograd.grad(y, place, v, retain_graph=True)[0] for v in vs])
        torch.testing.assert_close(g, plain)
    assert torch.equal(vs, before)


def test_large_cotangents_of_a_norm_and_a_softmax():
    weight = torch.randn(512, 64, dtype=D) / 8
    x = torch.randn(2, 24, 512, dtype=D, requires_grad=True)
    scores = F.layer_norm(x, (512,)) @ weight
    y = (torch.softmax(scores @ scores.mT, -1) @ F.layer_norm(x, (512,))).log_softmax(-1).mean(1)
    vs = torch.eye(512, dtype=D)[:6, None].expand(-1, 2, -1)
    found = sweep(y, [x], vs)
    assert found is not None
    plain = torch.stack([torch.autograd.grad(y, x, v, retain_graph=True)[0] for v in vs])
    torch.testing.assert_close(found[0], plain, rtol=1e-9, atol=1e-13)


NARROW = {
    "one axis": ((2, 1, 21), (5, 1, 4), {"stride": 2, "padding": 1, "dilation": 3}),
    "one channel": ((3, 1, 9, 11), (6, 1, 3, 3), {"stride": 2, "padding": 1}),
    "strides per axis": ((3, 3, 12, 7), (4, 3, 3, 2), {"stride": (3, 1), "padding": (1, 0), "dilation": (1, 2)}),
    "inputs that nothing sees": ((3, 2, 11, 10), (4, 2, 1, 2), {"stride": (4, 3)}),
    "padding alone": ((2, 2, 1, 1), (3, 2, 3, 3), {"padding": 2}),
    "some channels": ((2, 17, 9, 8), (5, 17, 3, 3), {"stride": 2, "padding": 1}),
    "three axes": ((2, 2, 5, 6, 4), (3, 2, 2, 3, 3), {"stride": 2, "padding": 1}),
    "the same size": ((2, 2, 6, 7), (3, 2, 5, 3), {"padding": "same", "dilation": (1, 2)}),
}


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("bound", [{}, {"CACHED": 1}, {"KEPT": 0}, {"PAIRS": 0}], ids=str)
def test_narrow_convolutions(name, bound, monkeypatch):
    for constant, value in bound.items():
        monkeypatch.setattr(sweep_convs, constant, value)
    shape, kernel, settings = NARROW[name]
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(kernel)
    y = getattr(F, f"conv{len(shape) - 2}d")(x, weight, **settings)
    vs = torch.randn(3, *y.shape)
    found = sweep(y, [x], vs)
    assert found is not None
    plain = torch.stack([torch.autograd.grad(y, x, v, retain_graph=True)[0] for v in vs])
    torch.testing.assert_close(found[0], plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("rows", [3, 700])
def test_products_of_every_size(rows, turned, monkeypatch):
    a, b = torch.randn(rows, 320), torch.randn(256, 320).mT if turned else torch.randn(320, 256)
    torch.testing.assert_close(mm(a, b).double(), a.double() @ b.double(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(mm(a.T.contiguous().T, b), mm(a, b), rtol=1e-5, atol=1e-4)
    monkeypatch.setattr(matmul, "_maker", lambda: "another")
    matmul._linear.cache_clear()
    torch.testing.assert_close(mm(a, b), a @ b, rtol=1e-5, atol=1e-4)
    matmul._linear.cache_clear()


def test_a_place_that_nothing_leads_to_gets_none():
    x, z = (torch.randn(3, 5, requires_grad=True) for _ in range(2))
    found = sweep(x * 2, [x, z], torch.ones(2, 3, 5))
    assert found is not None
    assert found[0] is not None
    assert found[1] is None


def test_a_relu_that_is_off_passes_nothing_infinite():
    x = torch.tensor([[-1.0, 2.0]], requires_grad=True)
    found = sweep(F.relu(x), [x], torch.full((2, 1, 2), float("inf")))
    assert found is not None
    assert torch.equal(found[0], torch.tensor([[0.0, float("inf")]]).expand(2, 1, 2))


def test_a_function_of_ones_own_is_left_to_autograd():
    class Own(torch.autograd.Function):
        @staticmethod
        def forward(_ctx, x):
            return x * 2

        @staticmethod
        def backward(_ctx, g):
            return g * 2

    x = torch.randn(3, 5, requires_grad=True)
    assert sweep(Own.apply(x), [x], torch.ones(2, 3, 5)) is None


def test_what_was_overwritten_is_refused():
    x = torch.randn(3, 5, requires_grad=True)
    h = x.tanh()
    y = h * 1.0
    h.data.add_(1)
    h.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sweep(y, [x], torch.ones(4, 3, 5))


def test_a_module_tree_of_many_uses():
    model = nn.Sequential(nn.Conv2d(1, 6, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 7), nn.Tanh()).double()
    for p in model.parameters():
        p.requires_grad_(False)
    x = torch.randn(5, 1, 7, 7, dtype=D, requires_grad=True)
    y = model(x)
    vs = torch.eye(7, dtype=D)[:, None].expand(-1, 5, -1)
    found = sweep(y, [x], vs)
    assert found is not None
    plain = torch.stack([torch.autograd.grad(y, x, v, retain_graph=True)[0] for v in vs])
    torch.testing.assert_close(found[0], plain)

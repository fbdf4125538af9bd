"""Flows, implicit layers, physics, linear algebra and Fourier transforms."""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812

from tests.zoo.registry import entry


class _Coupling(nn.Module):
    def __init__(self, flip: bool) -> None:
        super().__init__()
        self.net, self.flip = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 4)), flip

    def forward(self, x):
        a, b = x.flip(-1).chunk(2, dim=-1) if self.flip else x.chunk(2, dim=-1)
        shift, scale = self.net(a).chunk(2, dim=-1)
        return torch.cat([a, b * torch.exp(scale) + shift], dim=-1), scale.sum(dim=-1)


class _Flow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList(_Coupling(flip=bool(i % 2)) for i in range(3))

    def forward(self, x):
        total = 0.0
        for step in self.steps:
            x, logdet = step(x)
            total = total + logdet
        return x, total


@entry("science")
def normalizing_flow():
    """Coupling layers: returns the sample and log|det|."""
    return _Flow(), torch.randn(3, 4)


class _PlanarFlow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.u, self.w, self.b = (
            nn.Parameter(torch.randn(3) / 2),
            nn.Parameter(torch.randn(3) / 2),
            nn.Parameter(torch.zeros(1)),
        )

    def forward(self, x):
        return x + self.u * torch.tanh(x @ self.w + self.b).unsqueeze(-1)


@entry("science")
def planar_flow():
    """A rank-one update, square Jacobian."""
    return _PlanarFlow(), torch.randn(3, 3)


class _FixedPoint(nn.Module):
    """A deep equilibrium model: iterate until nothing moves, as many times as that takes."""

    def __init__(self, tolerance: float) -> None:
        super().__init__()
        self.inner, self.outer, self.tolerance = nn.Linear(4, 4), nn.Linear(3, 4), tolerance
        with torch.no_grad():
            self.inner.weight.mul_(0.3)

    def forward(self, x):
        z = torch.zeros(len(x), 4, dtype=x.dtype)
        for _ in range(60):
            new = torch.tanh(self.inner(z) + self.outer(x))
            if (new - z).abs().max() < self.tolerance:
                break
            z = new
        return z


@entry("science", defeats=("reverse", "forward", "layerwise"))
def fixed_point_until():
    """DEQ: the number of iterations depends on the data."""
    return _FixedPoint(1e-6), torch.randn(3, 3)


class _FixedSteps(_FixedPoint):
    def forward(self, x):
        z = torch.zeros(len(x), 4, dtype=x.dtype)
        for _ in range(30):
            z = torch.tanh(self.inner(z) + self.outer(x))
        return z


@entry("science")
def fixed_point_steps():
    """DEQ with a fixed number of steps."""
    return _FixedSteps(0.0), torch.randn(3, 3)


class _Solve(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(3) * 2 + torch.randn(3, 3) / 4)

    def forward(self, x):
        a = self.matrix + torch.diag_embed(x.square())
        return torch.linalg.solve(a, x.unsqueeze(-1)).squeeze(-1), torch.linalg.slogdet(a).logabsdet


# torch 2.13 has a wrong answer here: vmap over the forward mode of linalg.solve and slogdet.
@entry("science", defeats=("forward",))
def linear_solve():
    """A linear system and a log-determinant per sample."""
    return _Solve(), torch.randn(3, 3)


class _Factors(nn.Module):
    def forward(self, x):
        a = x.unflatten(-1, (3, 3))
        s = a @ a.transpose(1, 2) + 2 * torch.eye(3, dtype=x.dtype)
        return torch.linalg.eigvalsh(s), torch.linalg.cholesky(s)[:, -1], torch.linalg.inv(s).diagonal(dim1=1, dim2=2)


@entry("science", wrt=("inputs",))
def matrix_functions():
    """Eigenvalues, Cholesky factor and inverse."""
    return _Factors(), torch.randn(2, 9, dtype=torch.float64)


class _Fourier(nn.Module):
    """A Fourier neural operator's layer: complex weights on the low modes."""

    def __init__(self) -> None:
        super().__init__()
        self.real, self.imag = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
        self.local = nn.Linear(8, 8)

    def forward(self, x):
        modes = torch.fft.rfft(x)
        kept = modes[:, :3] * torch.complex(self.real, self.imag)
        modes = torch.cat([kept, torch.zeros_like(modes[:, 3:])], dim=1)
        return F.gelu(torch.fft.irfft(modes, n=8) + self.local(x))


@entry("science")
def fourier_operator():
    """Complex intermediates by FFT."""
    return _Fourier(), torch.randn(2, 8)


class _Spectrum(nn.Module):
    def forward(self, x):
        return torch.fft.fft(x).abs().square(), torch.angle(torch.fft.fft(x)[:, 1] + 3.0)


@entry("science", wrt=("inputs",))
def power_spectrum():
    """Squared magnitudes and a phase."""
    return _Spectrum(), torch.randn(2, 6)


class _Energy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x):
        return self.net(x)


class _HamiltonianGrad(_Energy):
    """dq/dt, dp/dt from `autograd.grad` inside the model, as most code has it."""

    def forward(self, x):
        with torch.enable_grad():
            x = x if x.requires_grad else x.requires_grad_()
            (g,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        return torch.cat([g[:, 2:], -g[:, :2]], dim=-1)


@entry("science", defeats=("reverse:params", "forward", "layerwise:params"))
def hamiltonian_autograd():
    """The model differentiates itself with autograd.grad."""
    return _HamiltonianGrad(), torch.randn(3, 4)


class _HamiltonianFunc(_Energy):
    def forward(self, x):
        parameters = dict(self.net.named_parameters())

        def energy(state):
            return functional_call(self.net, parameters, (state,)).sum()

        g = torch.func.grad(energy)(x)
        return torch.cat([g[:, 2:], -g[:, :2]], dim=-1)


@entry("science", defeats=("forward:params", "layerwise:params"))
def hamiltonian_func():
    """The model differentiates itself with torch.func."""
    return _HamiltonianFunc(), torch.randn(3, 4)


def lorenz(state):
    """One step of the Lorenz system, a plain function of (B, 3)."""
    x, y, z = state.unbind(dim=-1)
    return state + 0.01 * torch.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z], dim=-1)


@entry("science", wrt=("inputs",))
def lorenz_step():
    """A function instead of a module."""
    return lorenz, torch.randn(4, 3)


def two_body(q, p, mass):
    """Leapfrog steps of a body around a mass: three inputs, two outputs."""
    for _ in range(3):
        p = p - 0.05 * mass * q / q.square().sum(dim=-1, keepdim=True) ** 1.5
        q = q + 0.1 * p
        p = p - 0.05 * mass * q / q.square().sum(dim=-1, keepdim=True) ** 1.5
    return q, p


@entry("science", wrt=("inputs", "inputs.mass", ("inputs.q", "inputs.p")))
def leapfrog():
    """Named inputs, one after the other and together."""
    return two_body, (torch.randn(3, 2) + 2, torch.randn(3, 2), torch.rand(3, 1) + 1)


class _Kernel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.centres, self.width = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.tensor(0.3))
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        return self.head(torch.exp(-torch.cdist(x, self.centres).square() * self.width))


# torch 2.13 has a wrong answer here: the derivative of cdist under torch.func; and no forward mode for it.
@entry("science", defeats=("reverse", "forward"))
def radial_basis():
    """Distances to centres by cdist, and a parameter without axes."""
    return _Kernel(), torch.randn(3, 3)


class _Spline(nn.Module):
    """Piecewise linear: bins found by searchsorted."""

    def __init__(self) -> None:
        super().__init__()
        self.knots, self.heights = nn.Buffer(torch.linspace(-3, 3, 9)), nn.Parameter(torch.randn(9).cumsum(0))

    def forward(self, x):
        right = torch.searchsorted(self.knots, x.detach().contiguous()).clamp(1, 8)
        a, b = self.knots[right - 1], self.knots[right]
        share = (x - a) / (b - a)
        return (1 - share) * self.heights[right - 1] + share * self.heights[right]


@entry("science")
def spline():
    """Table look-up with interpolation."""
    return _Spline(), torch.randn(3, 4)


class _Ordered(nn.Module):
    def forward(self, x):
        ordered = x.sort(dim=-1).values
        return ordered.cumsum(dim=-1), torch.logcumsumexp(x, dim=-1), x.median(dim=-1).values, x.prod(dim=-1)


@entry("science", wrt=("inputs",))
def order_statistics():
    """Sorting, cumulative sums, medians and products: four outputs."""
    return _Ordered(), torch.randn(3, 5)

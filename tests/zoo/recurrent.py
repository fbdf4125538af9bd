"""Recurrent networks and loops over time."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from tests.zoo.registry import entry

# The kernels of nn.RNN, nn.GRU and nn.LSTM have no rule under vmap.
VMAP = ("reverse", "forward")


class _Last(nn.Module):
    """A recurrent module and a head on its last state."""

    def __init__(self, body: nn.RNNBase, features: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(features, 3)

    def forward(self, x):
        return self.head(self.body(x)[0][:, -1])


@entry("recurrent", defeats=VMAP)
def rnn():
    """nn.RNN with tanh."""
    return _Last(nn.RNN(3, 4, batch_first=True), 4), torch.randn(2, 4, 3)


@entry("recurrent", defeats=VMAP)
def rnn_relu():
    """nn.RNN with ReLU, two layers."""
    return _Last(nn.RNN(3, 5, 2, nonlinearity="relu", batch_first=True), 5), torch.randn(2, 4, 3)


@entry("recurrent", defeats=VMAP)
def gru():
    """nn.GRU."""
    return _Last(nn.GRU(3, 4, batch_first=True), 4), torch.randn(2, 4, 3)


@entry("recurrent", defeats=("forward",))
def lstm():
    """nn.LSTM."""
    return _Last(nn.LSTM(3, 4, batch_first=True), 4), torch.randn(2, 4, 3)


@entry("recurrent", defeats=VMAP, warns="LSTM with projections is not supported with oneDNN")
def lstm_bidirectional():
    """Two layers, both directions, projections."""
    body = nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2, batch_first=True)
    return _Last(body, 4), torch.randn(2, 3, 3)


class _States(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.LSTM(2, 3, batch_first=True)

    def forward(self, x, h, c):
        y, (h, c) = self.body(x, (h.transpose(0, 1).contiguous(), c.transpose(0, 1).contiguous()))
        return {"y": y[:, -1], "state": (h.transpose(0, 1), c.transpose(0, 1))}


@entry("recurrent", defeats=("forward",))
def lstm_with_states():
    """States in and out; the outputs are a dict with a tuple in it."""
    return _States(), (torch.randn(2, 3, 2), torch.randn(2, 1, 3), torch.randn(2, 1, 3))


class _Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTMCell(3, 4), nn.GRUCell(4, 3)

    def forward(self, x):
        h = c = x.new_zeros(len(x), 4)
        s = x.new_zeros(len(x), 3)
        for t in range(x.shape[1]):
            h, c = self.lstm(x[:, t], (h, c))
            s = self.gru(h, s)
        return s


@entry("recurrent")
def cells_in_a_loop():
    """Cells called by hand, over and over."""
    return _Cells(), torch.randn(2, 3, 3)


class _Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(2, 4)

    def forward(self, x):
        h = torch.zeros(len(x), 4, dtype=x.dtype)
        for step in x.unbind(dim=1):
            h = torch.tanh(self.inner(h) + self.outer(step))
        return h


@entry("recurrent")
def plain_recurrence():
    """A recurrence of linear layers that starts from a tensor made inside."""
    return _Plain(), torch.randn(2, 4, 2)


class _StateSpace(nn.Module):
    """A diagonal linear recurrence with complex states."""

    def __init__(self) -> None:
        super().__init__()
        self.decay, self.turn = nn.Parameter(torch.rand(3)), nn.Parameter(torch.rand(3))
        self.into, self.out = nn.Linear(2, 3), nn.Linear(6, 2)

    def forward(self, x):
        pole = torch.exp(torch.complex(-F.softplus(self.decay), self.turn))
        state = torch.zeros(len(x), 3, dtype=pole.dtype)
        for t in range(x.shape[1]):
            state = pole * state + self.into(x[:, t])
        return self.out(torch.cat([state.real, state.imag], dim=-1))


@entry("recurrent")
def state_space():
    """Complex poles."""
    return _StateSpace(), torch.randn(2, 4, 2)


class _NeuralODE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x):
        h = 0.25
        for _ in range(4):
            a = self.field(x)
            b = self.field(x + h / 2 * a)
            c = self.field(x + h / 2 * b)
            d = self.field(x + h * c)
            x = x + h / 6 * (a + 2 * b + 2 * c + d)
        return x


@entry("recurrent")
def neural_ode():
    """Runge-Kutta: the same layers sixteen times."""
    return _NeuralODE(), torch.randn(3, 3)


class _Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x):
        h = c = x.new_zeros(len(x), 2, *x.shape[-2:])
        for t in range(x.shape[1]):
            i, f, o, g = self.gates(torch.cat([x[:, t], h], dim=1)).chunk(4, dim=1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return h.mean(dim=(2, 3))


@entry("recurrent")
def conv_lstm():
    """A convolution reused at every step."""
    return _Convolved(), torch.randn(2, 2, 1, 3, 3)

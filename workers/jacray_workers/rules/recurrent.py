"""Recurrent layers written out step by step: their fused kernels know neither `vmap` nor their own weights' uses.

Gate order and equations are those of the documentation of `torch.nn.LSTM`, `torch.nn.GRU` and `torch.nn.RNN`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor
from torch.overrides import TorchFunctionMode

State = tuple[Tensor, ...]
Step = Callable[[Tensor, State, Sequence[Tensor | None]], State]


def _lstm_step(x: Tensor, state: State, weights: Sequence[Tensor | None]) -> State:
    """One step; `x` has been through the input's weights already."""
    h, c = state
    recurrent, bias, projection = weights
    i, f, g, o = (x + F.linear(h, _given(recurrent), bias)).chunk(4, dim=1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return (h if projection is None else F.linear(h, projection)), c


def _gru_step(x: Tensor, state: State, weights: Sequence[Tensor | None]) -> State:
    (h,) = state
    recurrent, bias, _ = weights
    xr, xz, xn = x.chunk(3, dim=1)
    hr, hz, hn = F.linear(h, _given(recurrent), bias).chunk(3, dim=1)
    r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
    n = torch.tanh(xn + r * hn)
    return ((1 - z) * n + z * h,)


def _simple_step(activation: Callable[[Tensor], Tensor]) -> Step:
    def step(x: Tensor, state: State, weights: Sequence[Tensor | None]) -> State:
        (h,) = state
        return (activation(x + F.linear(h, _given(weights[0]), weights[1])),)

    return step


def _given(t: Tensor | None) -> Tensor:
    if t is None:
        raise TypeError("a recurrent layer without recurrent weights")
    return t


def _layers(step: Step, states: int) -> Callable[..., Any]:
    """A rewrite of a whole layer stack from its single step."""

    def rewrite(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], mode: TorchFunctionMode) -> Any:
        del func
        if kwargs or len(args) != 9 or not isinstance(args[3], bool | int) or args[0].dim() != 3:
            return NotImplemented  # packed sequences, whose batch shrinks from step to step
        x, hx, params, biases, layers, dropout, train, both_ways, batch_first = args
        with mode:
            state = tuple(hx) if states == 2 else (hx,)
            return _stack(
                step,
                x,
                state,
                params,
                biases=bool(biases),
                layers=layers,
                dropout=dropout if train else 0.0,
                both_ways=both_ways,
                batch_first=batch_first,
            )

    return rewrite


def _stack(
    step: Step,
    x: Tensor,
    hx: State,
    params: Sequence[Tensor],
    *,
    biases: bool,
    layers: int,
    dropout: float,
    both_ways: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    ways = 2 if both_ways else 1
    each = len(params) // (layers * ways)
    x = x.transpose(0, 1) if batch_first else x
    last: list[State] = []
    for layer in range(layers):
        outs = []
        for way in range(ways):
            place = layer * ways + way
            weights = params[place * each : (place + 1) * each]
            made, state = _run(step, x, tuple(h[place] for h in hx), weights, biases=biases, backwards=way == 1)
            outs.append(made)
            last.append(state)
        x = outs[0] if ways == 1 else torch.cat(outs, dim=2)
        if dropout and layer + 1 < layers:
            x = F.dropout(x, dropout, training=True)
    finals = tuple(torch.stack(parts) for parts in zip(*last, strict=True))
    return (x.transpose(0, 1) if batch_first else x, *finals)


def _run(
    step: Step, x: Tensor, state: State, weights: Sequence[Tensor], *, biases: bool, backwards: bool
) -> tuple[Tensor, State]:
    """One layer in one direction over `x` `(T, B, F)`."""
    into, recurrent = weights[0], weights[1]
    into_bias, bias = (weights[2], weights[3]) if biases else (None, None)
    projection = weights[-1] if len(weights) in (3, 5) else None
    steps = F.linear(x, into, into_bias).unbind(0)
    outs = []
    for part in reversed(steps) if backwards else steps:
        state = step(part, state, (recurrent, bias, projection))
        outs.append(state[0])
    return torch.stack(outs[::-1] if backwards else outs), state


def _cell(step: Step, states: int) -> Callable[..., Any]:
    """A rewrite of a single cell."""

    def rewrite(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], mode: TorchFunctionMode) -> Any:
        del func
        if kwargs or len(args) not in (4, 6):
            return NotImplemented
        x, hx, into, recurrent = args[:4]
        into_bias, bias = args[4:] if len(args) == 6 else (None, None)
        with mode:
            state = tuple(hx) if states == 2 else (hx,)
            made = step(F.linear(x, into, into_bias), state, (recurrent, bias, None))
        return made if states == 2 else made[0]

    return rewrite


lstm = _layers(_lstm_step, states=2)
gru = _layers(_gru_step, states=1)
rnn_tanh = _layers(_simple_step(torch.tanh), states=1)
rnn_relu = _layers(_simple_step(torch.relu), states=1)
lstm_cell = _cell(_lstm_step, states=2)
gru_cell = _cell(_gru_step, states=1)
rnn_tanh_cell = _cell(_simple_step(torch.tanh), states=1)
rnn_relu_cell = _cell(_simple_step(torch.relu), states=1)

"""Small random nets, inputs and requests for property tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

ACTS = {"tanh": torch.tanh, "sin": torch.sin, "softplus": nn.functional.softplus, "relu": torch.relu}
# Relative error allowed, and the size below which it is measured absolutely: what passes through these nets is of order
# one, and where it cancels to something small its rounding stays.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1}
FLOOR = {torch.float64: 1e-2, torch.float32: 1e-2, torch.bfloat16: 0.1}
SHAPES = [(), (1,), (3,), (2, 2), (1, 2, 2)]


class Net(nn.Module):
    """Any number of inputs of any shape, a reused layer between them, any number of outputs of any shape."""

    def __init__(self, ins: list[tuple[int, ...]], outs: list[tuple[int, ...]], act: str, style: str) -> None:
        super().__init__()
        width = 4
        self.into = nn.ModuleList(nn.Linear(max(_size(s), 1), width) for s in ins)
        self.mix, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.out = nn.ModuleList(nn.Linear(width, max(_size(s), 1)) for s in outs)
        self.scale = nn.Parameter(torch.randn(()))
        self.outs, self.act, self.style = outs, act, style

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        xs = list(args) or list(kwargs.values())
        h = sum(layer(x.reshape(len(x), -1)) for layer, x in zip(self.into, xs, strict=True))
        act = ACTS[self.act]
        h = self.mix(act(self.norm(self.mix(act(h)))))
        ys = [
            layer(h)[:, : _size(s)].reshape(len(h), *s) * self.scale
            for layer, s in zip(self.out, self.outs, strict=True)
        ]
        if self.style == "dict":
            return {f"y{i}": y for i, y in enumerate(ys)}
        return ys[0] if len(ys) == 1 else (ys[0], ys[1:])


def _size(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


@dataclass(frozen=True)
class Drawn:
    """A net with its inputs and what to differentiate with respect to."""

    net: Net
    inputs: Any
    wrt: Any
    dtype: torch.dtype

    @property
    def tolerance(self) -> float:
        """Relative error allowed."""
        return TOLERANCE[self.dtype]

    @property
    def floor(self) -> float:
        """The size below which errors are measured absolutely."""
        return FLOOR[self.dtype]


@st.composite
def drawn(
    draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = tuple(TOLERANCE), most: int = 4, params: bool | None = None
) -> Drawn:
    """A net, a batch and a target: all parameters where `params`, none where it is False."""
    ins = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=2))
    outs = draw(st.lists(st.sampled_from([*SHAPES, (0,)]), min_size=1, max_size=2))
    style = draw(st.sampled_from(["plain", "dict"]))
    keys = draw(st.booleans())
    samples = draw(st.integers(1, most))
    dtype = draw(st.sampled_from(dtypes))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    net = Net(ins, outs, draw(st.sampled_from(sorted(ACTS))), style).to(dtype)
    tensors = [torch.randn(samples, *s).to(dtype) for s in ins]
    names = [f"x{i}" for i in range(len(ins))]
    inputs: Any = tensors[0]
    if keys or len(ins) > 1:
        inputs = dict(zip(names, tensors, strict=True)) if keys else tuple(tensors)
    hidden = [{"module": "norm", "side": side} for side in ("input", "output")]
    plain: list[Any] = ["inputs", *hidden, *([f"inputs.{names[-1]}"] if keys else [])]
    mixed: list[Any] = ["params", "*.weight", ("inputs", "mix.*"), ("scale", hidden[1])]
    targets = plain + mixed if params is None else ["params"] if params else plain
    return Drawn(net, inputs, draw(st.sampled_from(targets)), dtype)

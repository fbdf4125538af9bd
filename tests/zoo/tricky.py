"""Models made to get a wrong number out of jacray in silence: what a few samples do not show, and states."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.zoo.registry import entry

# Models that look at their data, or treat a batch otherwise than a sample, go one sample at a time.
BATCHED = ("layerwise",)
LOOKS = ("layerwise", "reverse", "forward")


class Linear(nn.Module):
    """A linear layer, and after it whatever a function makes of the model, the input and the layer's output."""

    def __init__(self, then: Callable[[Linear, Tensor, Tensor], Tensor], **state) -> None:
        super().__init__()
        self.layer, self.then = nn.Linear(4, 3), then
        for name, value in state.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self, x, self.layer(x))


def one_far_out() -> Tensor:
    """Samples of which the sixth lies far from the others."""
    x = 0.3 * torch.randn(8, 4)
    x[5] += 6
    return x


@entry("tricky", defeats=LOOKS)
def branch_by_numpy():
    """A branch on a value that left torch for numpy."""
    return Linear(lambda _, x, y: y * 2 if x.detach().numpy().max() > 4 else y.tanh()), one_far_out()


@entry("tricky", defeats=LOOKS)
def branch_by_count():
    """A branch on how many numbers a mask picks."""
    return Linear(lambda _, x, y: y * 2 if x[x > 4].numel() else y.tanh()), one_far_out()


@entry("tricky", defeats=LOOKS)
def branch_by_comparison():
    """A branch on torch.allclose."""
    return Linear(lambda _, x, y: y * 2 if torch.allclose(x, x.clamp(-4, 4)) else y.tanh()), one_far_out()


@entry("tricky", defeats=BATCHED)
def coupled_far_out():
    """Samples are coupled, but only where one of them is large."""
    return Linear(lambda _, x, y: y * (1 + (x.amax() - 4).relu())), one_far_out()


@entry("tricky", defeats=BATCHED)
def other_way_in_large_batches():
    """Another function for more than four samples at a time."""
    return Linear(lambda _, x, y: y * 2 if x.shape[0] > 4 else y.tanh()), torch.randn(12, 4)


@entry("tricky")
def counts_in_a_dict():
    """A count in a dict, on which the output depends."""

    def then(m, x, y):
        m.seen["calls"] += 1
        return y.tanh() * m.seen["calls"]

    return Linear(then, seen={"calls": 0}), torch.randn(5, 4)


@entry("tricky")
def caches_what_weights_give():
    """A tensor made of the weight, kept in a dict at the first call."""

    def then(m, x, y):
        if "w" not in m.kept:
            m.kept["w"] = m.layer.weight.tanh()
        return x @ m.kept["w"].T

    return Linear(then, kept={}), torch.randn(5, 4)


@entry("tricky")
def keeps_every_output():
    """A list that grows with every call, and is summed."""

    def then(m, x, y):
        m.kept.append(y.tanh())
        return torch.stack(m.kept).sum(0)

    return Linear(then, kept=[]), torch.randn(5, 4)


@entry("tricky", defeats=("forward:params",))
def writes_into_its_weight():
    """A weight that shrinks with every call."""

    def then(m, x, y):
        with torch.no_grad():
            m.layer.weight.mul_(0.9)
        return m.layer(x).tanh()

    return Linear(then), torch.randn(5, 4)

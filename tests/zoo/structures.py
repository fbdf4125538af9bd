"""Inputs and outputs that are not one tensor, and shapes at the edge."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.zoo.registry import entry


class _TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, user, item):
        a, b = torch.tanh(self.left(user)), torch.tanh(self.right(item))
        return {"score": (a * b).sum(dim=-1), "features": {"user": a, "item": b}}


@entry("structures", wrt=("inputs", "inputs.item", "params", ["inputs.user", "right.*"]))
def dict_in_dict_out():
    """Keyword inputs, nested dict outputs, inputs and parameters together."""
    return _TwoTowers(), {"user": torch.randn(3, 3), "item": torch.randn(3, 2)}


class _TreeModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, tree):
        a, (b, c) = tree["a"], tree["rest"]
        h = self.layer(torch.cat([a, b], dim=-1))
        return [torch.tanh(h), (h * c.sum(dim=(1, 2)).unsqueeze(1), a.square())]


@entry("structures", spread=False)
def nested_trees():
    """One argument that is a dict with a tuple in it; a list with a tuple comes back."""
    tree = {"a": torch.randn(3, 2), "rest": (torch.randn(3, 3), torch.randn(3, 2, 2))}
    return _TreeModel(), tree


class Moments(NamedTuple):
    """A named tuple as models return them."""

    mean: Tensor
    spread: Tensor


class _Gaussian(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean, self.spread = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        return Moments(self.mean(x), nn.functional.softplus(self.spread(x)))


@entry("structures")
def named_tuple_out():
    """A named tuple of mean and spread."""
    return _Gaussian(), torch.randn(3, 3)


@dataclass
class Output(OrderedDict):
    """Dict-like outputs in the manner of Hugging Face: attributes and keys, None where absent."""

    logits: Tensor
    hidden: Tensor | None = None

    def __post_init__(self) -> None:
        for key in ("logits", "hidden"):
            if (value := getattr(self, key)) is not None:
                self[key] = value


pytree.register_pytree_node(
    Output,
    lambda output: (list(output.values()), list(output.keys())),
    lambda values, keys: Output(**dict(zip(keys, values, strict=True))),
    flatten_with_keys_fn=lambda output: (
        [(pytree.MappingKey(k), v) for k, v in output.items()], list(output.keys())
    ),
    serialized_type_name="tests.zoo.Output",
)  # fmt: skip


class _HuggingFaceLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        hidden = torch.tanh(self.body(x))
        return Output(self.head(hidden), hidden)


@entry("structures")
def dict_like_output():
    """A dataclass that is a dict, known to torch's pytrees."""
    return _HuggingFaceLike(), torch.randn(3, 4)


class _WithLabels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        logits = self.layer(x)
        return logits, logits.argmax(dim=-1)


@entry("structures")
def whole_numbers_beside():
    """Floats and whole numbers come back: the latter have no derivative."""
    return _WithLabels(), torch.randn(3, 4)


class _Empty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x)[:, :0]


@entry("structures")
def zero_size_output():
    """Outputs of shape (B, 0)."""
    return _Empty(), torch.randn(3, 4)


class _PartlyEmpty(_Empty):
    def forward(self, x):
        h = self.layer(x)
        return {"none": h[:, 3:], "some": h[:, :2]}


@entry("structures")
def partly_empty_output():
    """One output holds nothing, the other something."""
    return _PartlyEmpty(), torch.randn(3, 4)


@entry("structures")
def scalar_samples():
    """Inputs of shape (B,): a sample is a number."""
    return nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5)


@entry("structures")
def one_sample():
    """A batch of one."""
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(1, 4)


class _Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.randn(2))

    def forward(self, x):
        return {"fixed": torch.ones(len(x), 2, dtype=x.dtype), "own": self.value.expand(len(x), -1), "x": x.sin()}


@entry("structures")
def constant_outputs():
    """Outputs that depend on nothing, or on parameters alone."""
    return _Constant(), torch.randn(3, 2)


class _MixedPrecision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        h = self.layer(x)
        return h, h.double().exp()


@entry("structures", tolerance=1e-4)
def mixed_precision_outputs():
    """A float32 output beside a float64 one."""
    return _MixedPrecision(), torch.randn(3, 4)


class _Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 2)

    def forward(self, image, scale):
        return self.conv(image) * scale.view(-1, 1, 1, 1)


@entry("structures", wrt=("inputs.scale", "params", {"module": "conv", "side": "output"}))
def image_and_number():
    """A multi-axis output wrt a scalar input, and wrt a hidden feature map."""
    return _Images(), (torch.randn(2, 1, 3, 3), torch.rand(2) + 0.5)


class _Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.steps = nn.Buffer(torch.tensor(3))

    def forward(self, x, *, power=2):
        for _ in range(3):
            x = torch.where(x > 0, self.layer(x), x**power)
        return x


@entry("structures")
def default_arguments():
    """A keyword argument with a default, an integer buffer, and a where."""
    return _Masked(), torch.randn(3, 4)

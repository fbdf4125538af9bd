"""A batch of inputs in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Loaded:
    """A batch of inputs with what is known about its samples.

    Attributes:
        inputs: a tensor `(N, ...)`, or a dict of such by name.
        fields: further tensors with a row per sample, such as `target`.
        start: the place of the first sample in the source.
    """

    inputs: Any
    fields: Mapping[str, Tensor] = field(default_factory=dict)
    start: int = 0

    @property
    def named(self) -> dict[str, Tensor]:
        """The inputs by name; the empty name for a bare tensor."""
        return dict(self.inputs) if isinstance(self.inputs, Mapping) else {"": self.inputs}

    @property
    def samples(self) -> int:
        """N."""
        return int(next(iter(self.named.values())).shape[0])

    @cached_property
    def digest(self) -> str:
        """A sha256 of names, types, shapes and bytes."""
        found = hashlib.sha256()
        for group in (self.named, self.fields):
            for name in sorted(group):
                tensor = group[name].detach().contiguous()
                found.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
                found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()

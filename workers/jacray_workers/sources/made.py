"""Inputs that need no file: random numbers, scikit-learn's digits, numbers written in the spec."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from jacray_workers.errors import InputError, Plain
from jacray_workers.nested import tensor_of
from jacray_workers.planning.explain import size
from jacray_workers.sources.specs import Inline, Random


def random(spec: Random, argument: str) -> dict[str, Tensor]:
    """Numbers drawn by a generator of their own, in the order of the names."""
    dtype: torch.dtype = getattr(torch, spec.dtype)
    shapes = spec.shape if isinstance(spec.shape, dict) else {"": spec.shape}
    check_memory(sum(math.prod(s) for s in shapes.values()) * dtype.itemsize, f"{argument}.shape")
    generator = torch.Generator().manual_seed(spec.seed)
    draw = torch.randn if spec.distribution == "normal" else torch.rand
    return {name: draw(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}


def digits() -> tuple[Tensor, Tensor]:
    """Images `(1797, 1, 8, 8)` from 0 to 1 and their classes `(1797,)`."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = (found.images / 16).astype(np.float32)[:, None]
    return torch.from_numpy(images), torch.from_numpy(found.target.astype(np.int64))


def inline(spec: Inline) -> dict[str, Tensor]:
    """The spec's values as tensors of its dtype."""
    dtype: torch.dtype = getattr(torch, spec.dtype)
    named = spec.values if isinstance(spec.values, dict) else {"": spec.values}
    return {str(name): tensor_of(value, f"inputs.values.{name}".rstrip("."), dtype) for name, value in named.items()}


def inline_fields(spec: Inline) -> dict[str, Tensor]:
    """The spec's fields: whole numbers stay whole."""
    return {name: _field(value, f"inputs.fields.{name}") for name, value in spec.fields.items()}


def _field(value: Any, argument: str) -> Tensor:
    tensor = tensor_of(value, argument)
    whole = bool((tensor == tensor.round()).all())
    return tensor.to(torch.int64 if whole else torch.float32)


def check_memory(needed: int, argument: str) -> None:
    """Refuse what cannot fit, before anything is allocated.

    Raises:
        InputError: naming both figures.
    """
    free = psutil.virtual_memory().available
    if needed > free:
        way_out = "take fewer samples with `range`, or a smaller shape"
        raise InputError(
            argument, f"must fit into the {size(free)} of memory that are free", Plain(size(needed)), way_out
        )

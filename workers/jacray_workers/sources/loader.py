"""From an input spec to tensors: read, cut to the range, preprocessed, and checked before any worker starts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jacray_workers.errors import InputError, Plain
from jacray_workers.problem.trees import check_batch
from jacray_workers.sources import files, made
from jacray_workers.sources.arrays import check_range
from jacray_workers.sources.preprocess import preprocess
from jacray_workers.sources.specs import AnyInput, Csv, Digits, Inline, Npy, Npz, Random, Safetensors, Zarr
from jacray_workers.sources.table import csv_table


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


def load(spec: AnyInput, base: Path, argument: str = "inputs") -> Loaded:
    """Read the batch that a spec describes.

    Args:
        spec: any input spec.
        base: the folder that relative paths start from.
        argument: what the spec is called in errors.

    Raises:
        InputError: the source is not there, is not what its kind says, does not fit into memory, is empty, or its
            parts have different numbers of samples.
    """
    parts, fields = _read(spec, base, argument)
    parts = preprocess(parts, spec.preprocess, f"{argument}.preprocess")
    names = list(parts)
    check_batch(list(parts.values()), names)
    samples = next(iter(parts.values())).shape[0]
    for name, tensor in fields.items():
        if tensor.dim() == 0 or tensor.shape[0] != samples:
            shown = Plain(f"shape {tuple(tensor.shape)}")
            raise InputError(f"{argument}.fields.{name}", f"must have a row for each of the {samples} samples", shown)
    return Loaded(parts[""] if names == [""] else parts, fields, spec.range[0] if spec.range else 0)


def _read(spec: AnyInput, base: Path, argument: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The inputs by name and the fields, cut to the range."""
    match spec:
        case Random():
            return cut(made.random(spec, argument), spec, argument), {}
        case Digits():
            images, target = made.digits()
            return cut({"": images}, spec, argument), cut({"target": target}, spec, argument)
        case Inline():
            return cut(made.inline(spec), spec, argument), cut(made.inline_fields(spec), spec, argument)
        case Csv():
            table, fields = csv_table(spec, base, argument)
            return cut({"": table}, spec, argument), cut(fields, spec, argument)
        case Npy():
            return {"": files.npy(spec, base, argument)}, {}
        case Npz() | Safetensors() | Zarr():
            return files.several(spec, base, argument)


def cut(parts: Mapping[str, Tensor], spec: AnyInput, argument: str) -> dict[str, Tensor]:
    """The samples of the spec's range, as views."""
    if spec.range is None:
        return dict(parts)
    start, stop = spec.range
    for tensor in parts.values():
        check_range(spec.range, tensor.shape[0] if tensor.dim() else 0, argument)
    return {name: tensor[start:stop] for name, tensor in parts.items()}

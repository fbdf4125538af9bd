"""Inputs that need no file: random numbers, and numbers or texts written in the spec."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jacray_workers.errors import InputError, Plain
from jacray_workers.nested import tensor_of
from jacray_workers.problem.trees import check_batch
from jacray_workers.sources.arrays import Part, check_memory
from jacray_workers.sources.places import Place, Reach, Stamp
from jacray_workers.sources.specs import Inline, Random, is_texts

BLOCK_NUMBERS = 1 << 18
"""Random samples are drawn in blocks of about so many numbers, each from a seed of its own, so that any block can be
drawn without the ones before it."""

_STRIDE = 0x9E3779B1  # odd, so that 2**32 blocks in a row have distinct seeds; torch's generator looks at 32 bits


@dataclass(frozen=True)
class Drawn:
    """A reader that draws random numbers, the same for each sample whatever range is read.

    Attributes:
        spec: what to draw.
        shapes: of each input, the batch first.
    """

    spec: Random
    argument: str
    samples: int
    shapes: Mapping[str, tuple[int, ...]]
    places: tuple[tuple[Place, Stamp], ...] = ()

    def read(self, start: int, stop: int) -> tuple[dict[str, Part], dict[str, Tensor]]:
        """The inputs from row start to row stop; no fields."""
        sample = sum(math.prod(shape[1:]) for shape in self.shapes.values())
        check_memory(sample * (stop - start) * getattr(torch, self.spec.dtype).itemsize, f"{self.argument}.shape")
        size = max(1, BLOCK_NUMBERS // max(sample, 1))
        pieces = [self._cut(block, size, start, stop) for block in range(start // size, -(-stop // size))]
        return {
            name: torch.cat([p[name] for p in pieces]) if pieces[1:] else pieces[0][name] for name in self.shapes
        }, {}

    def _cut(self, block: int, size: int, start: int, stop: int) -> dict[str, Tensor]:
        """What a block holds of the rows from start to stop."""
        first = block * size
        drawn = self._block(block, min(size, self.samples - first))
        return {name: tensor[max(start - first, 0) : stop - first] for name, tensor in drawn}

    def _block(self, block: int, rows: int) -> Iterator[tuple[str, Tensor]]:
        """A block's inputs in the order of the names, from one generator."""
        # The first block has the spec's own seed.
        seed = (self.spec.seed + block * _STRIDE) % 2**64
        generator = torch.Generator().manual_seed(seed if seed < 2**63 else seed - 2**64)
        draw = torch.randn if self.spec.distribution == "normal" else torch.rand
        dtype: torch.dtype = getattr(torch, self.spec.dtype)
        for name, shape in self.shapes.items():
            yield name, draw((rows, *shape[1:]), generator=generator, dtype=dtype)


def random(spec: Random, _base: Path, argument: str, _reach: Reach) -> Drawn:
    """Numbers from a generator of their own; the caller's is left alone."""
    shapes = dict(spec.shape) if isinstance(spec.shape, dict) else {"": spec.shape}
    sizes = {name: shape[0] for name, shape in shapes.items()}
    if len(set(sizes.values())) > 1:
        shown = Plain(", ".join(f"{name}: {n}" for name, n in sizes.items()))
        raise InputError(f"{argument}.shape", "must have the same batch size in every leaf", shown)
    return Drawn(spec, argument, next(iter(sizes.values())), shapes)


@dataclass(frozen=True)
class Held:
    """A reader of what is in memory.

    Attributes:
        inputs: by name.
        fields: by name.
    """

    argument: str
    samples: int
    inputs: Mapping[str, Part]
    fields: Mapping[str, Tensor]
    places: tuple[tuple[Place, Stamp], ...] = ()

    def read(self, start: int, stop: int) -> tuple[dict[str, Part], dict[str, Tensor]]:
        """The rows, as views."""
        inputs = {name: part[start:stop] for name, part in self.inputs.items()}
        return inputs, {name: field[start:stop] for name, field in self.fields.items()}


def held(inputs: Mapping[str, Part], fields: Mapping[str, Tensor], argument: str) -> Held:
    """A reader of these inputs and fields.

    Raises:
        InputError: there is no sample, or the numbers of samples differ.
    """
    check_batch([p if isinstance(p, Tensor) else torch.empty(len(p)) for p in inputs.values()], list(inputs))
    samples = len(next(iter(inputs.values())))
    for name, field in fields.items():
        if field.dim() == 0 or field.shape[0] != samples:
            shown = Plain(f"shape {tuple(field.shape)}")
            raise InputError(f"{argument}.fields.{name}", f"must have a row for each of the {samples} samples", shown)
    return Held(argument, samples, inputs, fields)


def inline(spec: Inline, _base: Path, argument: str, _reach: Reach) -> Held:
    """The spec's values as tensors of its dtype, its fields as whole numbers where they are whole."""
    dtype: torch.dtype = getattr(torch, spec.dtype)
    named: dict[str, Any] = spec.values if isinstance(spec.values, dict) else {"": spec.values}
    inputs: dict[str, Part] = {
        name: list(value) if is_texts(value) else tensor_of(value, f"{argument}.values.{name}".rstrip("."), dtype)
        for name, value in named.items()
    }
    fields = {name: _field(value, f"{argument}.fields.{name}") for name, value in spec.fields.items()}
    return held(inputs, fields, argument)


def _field(value: Any, argument: str) -> Tensor:
    return tensor_of(value, argument, torch.int64 if _whole(value) else torch.float32)


def _whole(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_whole, value))
    return isinstance(value, int) or (isinstance(value, float) and value.is_integer())

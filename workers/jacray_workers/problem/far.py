"""Input leaves that are not in memory: a slice of one reads those samples from their source."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from jacray_workers.sources.ranged import Rows


class FarLeaf:
    """One input of all samples, as far as preparing and computing look at it: a shape, a type, and slices.

    Attributes:
        shape: `(N, ...)`.
        dtype: of the samples.
        device: where slices come: the CPU.
    """

    device = torch.device("cpu")
    layout = torch.strided

    def __init__(self, window: _Window, name: str) -> None:
        leaf = window.rows.inputs[name]
        self._window, self._name = window, name
        self.shape = torch.Size((window.rows.samples, *leaf.shape))
        self.dtype = leaf.dtype

    def __getitem__(self, index: slice | int) -> Tensor:
        if isinstance(index, int):
            return self[index : index + 1][0]
        start, stop, step = index.indices(self.shape[0])
        if step != 1 or stop <= start:
            raise IndexError(f"samples that are read by range are taken in rising order; got {index}")
        return self._window.read(start, stop)[self._name]

    def is_inference(self) -> bool:
        """Whether nobody counts what is written to it, as to tensors of inference mode: it is only read."""
        return True

    def is_floating_point(self) -> bool:
        """Whether it holds floats."""
        return self.dtype.is_floating_point

    def numel(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    def detach(self) -> Tensor:
        """All of it, in memory."""
        return self[0 : self.shape[0]]


class _Window:
    """The samples read last, for the inputs of one batch are asked for one after the other."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self._last: tuple[int, int, dict[str, Tensor]] = (0, 0, {})

    def read(self, start: int, stop: int) -> dict[str, Tensor]:
        """The inputs of these samples by name."""
        last = self._last
        if last[:2] != (start, stop):
            last = self._last = (start, stop, self.rows.read(start, stop).named)
        return last[2]


def far_inputs(rows: Rows) -> FarLeaf | dict[str, FarLeaf]:
    """The inputs of a source as a model takes them, each read when it is sliced."""
    window = _Window(rows)
    named = {name: FarLeaf(window, name) for name in rows.inputs}
    return named[""] if list(named) == [""] else named


def far_leaves(rows: Rows, few: Any) -> list[FarLeaf]:
    """The leaves of a source, in the order in which those of a few of its samples come."""
    window = _Window(rows)
    return [FarLeaf(window, name) for name in (few if isinstance(few, Mapping) else ("",))]

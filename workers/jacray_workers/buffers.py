"""A shard's arrays while they fill: one tensor per array, or a list of parts for blocks kept in factors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jacray_workers import pages
from jacray_workers.blocks.block import Block
from jacray_workers.kernels.common import Targets, blocks_for
from jacray_workers.plan import ArrayPlan, Shard
from jacray_workers.planning.memory import out_of_memory
from jacray_workers.progress import Chunk
from jacray_workers.transfer import Landing

if TYPE_CHECKING:
    from jacray_workers.engine import Prepared
    from jacray_workers.problem.problem import Problem

TORCH_OF = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
# Numbers that are added to a sum at a time.
ADDED = 1 << 20


class Buffers:
    """What a shard computes goes here, chunk by chunk."""

    def __init__(self, prepared: Prepared, shard: Shard, into: dict[str, Tensor], landing: Landing) -> None:
        self.shard = shard
        self.landing = landing
        self.plan = prepared.plan
        self.arrays = {(a.name, a.out, a.leaf): a for a in prepared.plan.arrays}
        self.parts: dict[str, list[Tensor]] = {}
        self.tensors: dict[str, Tensor] = {}
        self.added: list[tuple[ArrayPlan, Tensor]] = []
        self.problem = prepared.problem
        # Where the Jacobian of the chunk at hand is written, and whether that is the result's own memory.
        self.begun: tuple[Targets, Chunk, bool] | None = None
        # Samples whose numbers are known to be finite, by array.
        self.finite: Counter[str] = Counter()
        for array in prepared.plan.arrays:
            if array.factored:
                self.parts[array.key] = []
            else:
                self.tensors[array.key] = into[array.key] if array.key in into else self._new(array)

    def _new(self, array: ArrayPlan) -> Tensor:
        shape = list(array.shape)
        if array.axis < 0:
            return torch.zeros(shape, dtype=torch.float64)
        shape[array.axis] = self.shard.stop - self.shard.start
        return pages.empty(shape, TORCH_OF[array.dtype])

    def view(self, array: ArrayPlan, start: int, stop: int) -> Tensor:
        """The part of an array that belongs to these samples."""
        return self.tensors[array.key].narrow(array.axis, start - self.shard.start, stop - start)

    def put(self, name: str, out: int, leaf: int, start: int, stop: int, value: Tensor) -> None:
        """Write a chunk's value; what is appended or added waits for `commit`."""
        array = self.arrays[name, out, leaf]
        if array.factored or array.axis < 0:
            self.added.append((array, value))
        else:
            target = self.view(array, start, stop)
            # For a class of tensors of our own torch would load its distributed ones first, for a second and more.
            value = value.dense() if isinstance(value, Block) else value
            if value.device != target.device:
                self.landing.put(target, value)
            elif target.data_ptr() != value.data_ptr() or target.dtype != value.dtype:
                target.copy_(value)

    def commit(self) -> None:
        """The chunk is done: a chunk that ran out of memory halfway and comes again must not count twice."""
        for array, value in self.added:
            if array.factored:
                self.parts[array.key].append(value)
            else:
                _add(self.tensors[array.key], value.to("cpu"))
        self.added.clear()
        self.begun = None
        self.landing.turn()

    def forget(self, *, keep: bool = False) -> list[int]:
        """The chunk failed. What it had put arrives before anything that is put again; its memory is free then.

        Returns:
            The steps of its Jacobian that stand in the result for each of its samples; none unless they are to `keep`.
        """
        self.added.clear()
        steps = self._salvaged() if keep else []
        self.begun = None
        self.landing.wait()
        return steps

    def _salvaged(self) -> list[int]:
        if self.begun is None or not any(self.begun[0].steps):
            return []
        into, chunk, direct = self.begun
        try:
            if not direct:
                # What is not done yet is put too: it is written over when its turn comes.
                self.put_blocks(into, chunk)
        except Exception as error:
            if out_of_memory(error):
                return []
            raise
        return into.steps

    def finished(self) -> dict[str, Tensor]:
        """The arrays by key; sums in their own precision."""
        self.landing.wait()
        done = {}
        for array in self.plan.arrays:
            if array.factored:
                parts = self.parts[array.key]
                done[array.key] = parts[0] if len(parts) == 1 else type(parts[0]).cat(parts)  # type: ignore[attr-defined]
            elif array.axis < 0:
                done[array.key] = self.tensors.pop(array.key).to(TORCH_OF[array.dtype])
            else:
                done[array.key] = self.tensors[array.key]
        return done

    # The Jacobian ------------------------------------------------------------------------------------------------

    def targets(self, chunk: Chunk) -> Targets:
        """Where a method should write the blocks `(b, rows, *leaf)`: the result's own memory where it can be.

        What is done of them already, the chunk's `steps`, stands there.
        """
        arrays, problem = self.plan.array("jacobian"), self.problem
        direct = len(problem.outs) == 1 and all(self._direct(array) for array in arrays)
        if direct:
            views = [self.view(array, chunk.start, chunk.stop) for array in arrays]
            shapes = [(chunk.size, problem.rows, *leaf.shape) for leaf in problem.leaves]
            into = Targets((v.view(shape) for v, shape in zip(views, shapes, strict=True)), [chunk.steps] * chunk.size)
        else:
            into = Targets(blocks_for(problem, chunk.size, problem.rows, None), [chunk.steps] * chunk.size)
            self._load(into, chunk)
        self.begun = into, chunk, direct
        return into

    def landed(self, chunk: Chunk) -> None:
        """The blocks of a chunk are complete."""
        if self.begun is None:
            return
        into, _, direct = self.begun
        if not direct:
            self.put_blocks(into, chunk)
        for array in self.plan.array("jacobian") if direct else ():
            self.finite[array.key] += chunk.size if array.leaf in into.finite else 0

    def put_blocks(self, blocks: Sequence[Tensor], chunk: Chunk) -> None:
        """Write blocks of all outputs, one output after the other along the rows; factors stay factors."""
        for i, block in enumerate(blocks):
            for o, part in enumerate(_by_output(self.problem, block)):
                self.put("jacobian", o, i, chunk.start, chunk.stop, part)

    def _load(self, into: Targets, chunk: Chunk) -> None:
        """Take up what an earlier attempt has left in the result."""
        self.landing.wait()
        for array in self.plan.array("jacobian") if chunk.steps else ():
            rows = self.problem.outs[array.out].rows
            target = into[array.leaf][:, rows.start : rows.stop]
            target.copy_(self.view(array, chunk.start, chunk.stop).reshape(target.shape))

    def _direct(self, array: ArrayPlan) -> bool:
        """Whether blocks can be written to the array itself: of their type, in the memory that they are made in."""
        wanted = torch.promote_types(self.problem.leaves[array.leaf].dtype, self.problem.dtype)
        return TORCH_OF[array.dtype] == wanted and self.tensors[array.key].device == self.problem.device


def _by_output(problem: Problem, block: Tensor) -> list[Tensor]:
    """A block's rows as one tensor per output, in that output's shape; factors stay factors."""
    unflatten = getattr(block, "unflatten_rows", None)
    if unflatten is None:
        parts: list[Tensor] = problem.split(block)
        return parts
    if len(problem.outs) == 1:
        return [unflatten(problem.outs[0].shape)]
    return [block[:, o.rows.start : o.rows.stop].unflatten_rows(o.shape) for o in problem.outs]  # type: ignore[attr-defined]


def _add(total: Tensor, part: Tensor) -> None:
    """Add a chunk's part; some rows at a time, since torch makes a copy in the sum's precision of all that it adds."""
    if total.dim() == 0:
        total.add_(part)
        return
    step = max(1, ADDED // max(1, total[:1].numel()))
    for low in range(0, total.shape[0], step):
        total[low : low + step].add_(part[low : low + step])

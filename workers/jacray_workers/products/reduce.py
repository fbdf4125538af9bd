"""Make a shard's products from its chunks, with whole Jacobians only where a product needs them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from jacray_workers.kernels import lacks, pick
from jacray_workers.kernels.common import blocks_for, per_sample, singly, spans
from jacray_workers.plan import ArrayPlan, Shard
from jacray_workers.problem.resolve import place
from jacray_workers.problem.weights import Directions
from jacray_workers.products import curvature, krylov, needs, parts, spectrum, sums
from jacray_workers.products.band import Band, Unit
from jacray_workers.products.dense import plain
from jacray_workers.trust.alike import alike

if TYPE_CHECKING:
    from jacray_workers.engine import Prepared
    from jacray_workers.progress import Chunk

# Methods that write into the memory they are given as they go.
WRITES = ("layerwise", "backward_loop", "forward")


class Buffers(Protocol):
    """Where results go."""

    arrays: dict[tuple[str, int, int], ArrayPlan]

    def put(self, name: str, out: int, leaf: int, start: int, stop: int, value: Tensor) -> None:
        """Write a chunk's value, or add it where the array is a sum."""

    def view(self, array: ArrayPlan, start: int, stop: int) -> Tensor:
        """The part of an array that belongs to these samples."""


class Reducer:
    """The products of one shard.

    Args:
        prepared: the job.
        shard: which samples.
        buffers: where results go.
        pause: called in the middle of long work; raises when the job was cancelled.

    Attributes:
        by_blocks: the results that are made here from blocks of the Jacobian.
        by_passes: those made here from jvp and vjp passes.
        wants_outputs: whether `add` needs the outputs.
    """

    def __init__(self, prepared: Prepared, shard: Shard, buffers: Buffers, pause: Callable[[], None]) -> None:
        self.prepared, self.buffers = prepared, buffers
        self.problem, self.request, self.plan = prepared.problem, prepared.request, prepared.plan
        self.kernel: Any = pick(self.plan.method)
        self.piece = needs.piece(self.plan.budget_bytes)
        self.scratch: dict[str, list[Tensor]] = {}
        # Rows in flight; fewer than planned once one sample alone has run out of memory.
        self.rows = self.plan.row_chunk
        self.by_blocks, self.by_passes = split(prepared)
        curved = {"ggn", "fisher"}.intersection(self.by_blocks + self.by_passes)
        self.wants_outputs = self.request.loss != "mse" and bool(curved)
        self.ntk = self._band(shard, pause) if "ntk" in self.by_blocks else None

    def add(self, chunk: Chunk, batch: Sequence[Tensor], y: Tensor | None, blocks: list[Tensor] | None) -> None:
        """Make everything of one chunk.

        Args:
            chunk: which samples, and how many rows at a time.
            batch: its placed inputs.
            y: its outputs `(b, rows)`, where `wants_outputs`.
            blocks: its Jacobian `(b, rows, *leaf)` by leaf, where the result keeps that; else what is needed of it
                is computed here, some rows at a time where all are too many.
        """
        p, start, stop = None, chunk.start, chunk.stop
        self.rows = chunk.rows
        if self.wants_outputs and y is not None:
            p = curvature.probabilities(self.problem, y, self.request.loss)
        found: dict[str, parts.Found] = {}
        if self.by_blocks:
            found = self._from_blocks(start, stop, batch, p, blocks)
        for name in self.by_passes:
            found[name] = self._from_passes(name, start, stop, batch, None if name == "gram" else p)
        for name, values in found.items():
            for (out, leaf), value in values.items():
                self.buffers.put(name, out, leaf, start, stop, value if self._many(name) else value[0])

    def forget(self) -> None:
        """Memory ran out: give back what is kept to be used again."""
        self.scratch.clear()

    def finish(self) -> None:
        """What can only be made when all chunks are there."""
        if self.ntk is not None:
            self.ntk.finish()

    def _many(self, name: str) -> bool:
        """Whether a value has the axes that its array has: a single direction comes with a leading axis of one."""
        if name == "weighted_gradient":
            return self.prepared.cotangents is None or self.prepared.cotangents.many
        if name == "jvp" or (name in needs.PAIRS and self.request.vectors is not None):
            return self.prepared.tangents is None or self.prepared.tangents.many
        return True

    # From passes -------------------------------------------------------------------------------------------------

    def _from_passes(self, name: str, start: int, stop: int, batch: Sequence[Tensor], p: Tensor | None) -> parts.Found:
        problem = self.problem
        if name == "mean_jacobian":
            return parts.by_output(problem, sums.row_sums(problem, self.kernel, batch), self.plan.samples)
        if name == "singular_values":
            return {(-1, -1): self._top(batch)}
        vectors = _selected(self.prepared.tangents, start, stop)
        return {(-1, i): v for i, v in enumerate(sums.times_vectors(problem, self.kernel, batch, vectors, p))}

    def _top(self, batch: Sequence[Tensor]) -> Tensor:
        """The leading singular values from products with vectors; of a sample that resists, from its Jacobian."""
        problem, top_k, seed = self.problem, self.request.top_k or 1, self.request.seed
        found, good = krylov.of_problem(problem, self.kernel, batch, top_k, seed)
        for i in (~good).nonzero().flatten().tolist():
            blocks = self._compute([leaf[i : i + 1] for leaf in batch], range(problem.rows), None)
            found[i] = spectrum.of_blocks(blocks)[0, :top_k]
        return found

    # From blocks -------------------------------------------------------------------------------------------------

    def _from_blocks(
        self, start: int, stop: int, batch: Sequence[Tensor], p: Tensor | None, blocks: list[Tensor] | None
    ) -> dict[str, parts.Found]:
        made = {name: self._part(name, p, start, stop) for name in self.by_blocks if name != "ntk"}
        if "ggn" in made and "fisher" in made:
            # Equal for both losses.
            made["fisher"] = made["ggn"]
        each = list({id(part): part for part in made.values()}.values())
        looking = [part for part in each if part.looks]
        bands = self._bands() if blocks is None else [range(self.problem.rows)]
        if looking and len(bands) > 1:
            for rows, some in self._banded(batch, bands):
                for part in looking:
                    part.look(rows, some)
                del some
        for rows, some in self._banded(batch, bands) if blocks is None else ((bands[0], blocks),):
            for part in looking if len(bands) == 1 else ():
                part.look(rows, some)
            for part in each:
                part.take(rows, some)
            if self.ntk is not None:
                self.ntk.add(Unit(start, stop, rows), some)
            # Or it would be held while the next rows are made.
            del some
        return {name: part.found() for name, part in made.items()}

    def _part(self, name: str, p: Tensor | None, start: int, stop: int) -> parts.Part:
        problem, request, prepared = self.problem, self.request, self.prepared
        if name in needs.PAIRS:
            p = None if name == "gram" else p
            if request.vectors is None:
                return parts.Pairs(problem, p, self.piece)
            return parts.TimesVectors(problem, _selected(prepared.tangents, start, stop), p)
        if name == "jvp":
            return parts.Pushed(problem, _selected(prepared.tangents, start, stop))
        if name == "weighted_gradient":
            ks = [k.reshape(*k.shape[:2], k.shape[2:].numel()) for k in _selected(prepared.cotangents, start, stop)]
            summed = [not per_sample(leaf) and request.reduction == "sum" for leaf in problem.leaves]
            return parts.Pulled(lambda: torch.cat(ks, dim=2), summed)
        if name == "mean_jacobian":
            return parts.Mean(problem, self.plan.samples)
        return parts.Numbers(name, problem, stop - start, request.top_k, request.seed, self.piece)

    def _bands(self) -> list[range]:
        """The ranges of rows that blocks come in."""
        rows = range(self.problem.rows)
        whole = self.plan.method in ("forward", "chain") or not needs.separable(self.problem, self.request)
        return [rows] if whole or not rows else list(spans(rows, self.rows))

    def _banded(self, batch: Sequence[Tensor], bands: Sequence[range]) -> Iterator[tuple[range, list[Tensor]]]:
        """Blocks of a chunk, band by band, in memory that the next band uses again."""
        for rows in bands:
            yield rows, self._compute(batch, rows, self._memory("own", batch, rows))

    def _compute(self, batch: Sequence[Tensor], rows: range, into: list[Tensor] | None) -> list[Tensor]:
        """Blocks of these rows; where the method can, with no more of them in flight than planned."""
        problem, plan, kernel = self.problem, self.plan, self.kernel
        if plan.form != "dense":
            return list(kernel.jacobian(problem, batch, rows, form=plan.form))
        if self.rows < len(rows) and getattr(kernel, "CHUNKS_ITSELF", False):
            return list(kernel.jacobian(problem, batch, rows, into, self.rows))
        return list(kernel.jacobian(problem, batch, rows, into))

    def _memory(self, name: str, batch: Sequence[Tensor], rows: range) -> list[Tensor] | None:
        """Buffers of this name that were used before, since fresh memory costs more than the arithmetic.

        None for a method that makes its own whatever it is given.
        """
        if self.plan.form != "dense" or self.plan.method not in WRITES:
            return None
        shapes = [(batch[0].shape[0], len(rows), *leaf.shape) for leaf in self.problem.leaves]
        held = self.scratch.get(name, [])
        fits = [kept.numel() >= math.prod(shape) for kept, shape in zip(held, shapes, strict=False)]
        if not fits or not all(fits):
            held = [block.flatten() for block in blocks_for(self.problem, shapes[0][0], len(rows), None)]
            self.scratch[name] = held
        return [kept[: math.prod(shape)].view(shape) for kept, shape in zip(held, shapes, strict=True)]

    def _band(self, shard: Shard, pause: Callable[[], None]) -> Band:
        plan = self.plan

        def compute(unit: Unit) -> list[Tensor]:
            batch = place(self.problem, [leaf[unit.start : unit.stop] for leaf in self.prepared.leaves])
            if plan.compared and not alike(self.problem, batch):
                found = [map(plain, self._compute(single, unit.rows, None)) for single in singly(batch)]
                return [torch.cat(parts) for parts in zip(*found, strict=True)]
            return self._compute(batch, unit.rows, self._memory("other", batch, unit.rows))

        view = self.buffers.view(self.buffers.arrays["ntk", -1, -1], shard.start, shard.stop)
        room = plan.budget_bytes - plan.peak_bytes
        trace = self.request.ntk == "trace"
        return Band(view, shard, plan.samples, plan.chunk_size, self._bands(), trace, room, self.piece, compute, pause)


def split(prepared: Prepared) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The results of a request that are made from blocks, and from passes; both empty for what has its own way.

    Where blocks are computed anyway, everything that they give comes from them: methods differ in the passes they have.
    """
    problem, request, plan = prepared.problem, prepared.request, prepared.plan
    if request.returns == ("jacobian",):
        return (), ()
    products = [name for name in request.returns if name in needs.FROM_JACOBIAN and name != "jacobian"]
    blocks = {name for name in needs.from_blocks(problem, request) if name in products}
    if blocks or "jacobian" in request.returns:
        missing = lacks(plan.method)
        blocks |= {name for name in products if name != "mean_jacobian" or plan.form == "dense" or "vjp" in missing}
        blocks |= {"weighted_gradient"} if "vjp" in missing else set()
        blocks |= {"jvp"} if "jvp" in missing else set()
    by_blocks = tuple(name for name in request.returns if name in blocks)
    return by_blocks, tuple(name for name in products if name not in blocks)


def _selected(directions: Directions | None, start: int, stop: int) -> list[Tensor]:
    """The directions of some samples."""
    return directions.select(start, stop) if directions is not None else []

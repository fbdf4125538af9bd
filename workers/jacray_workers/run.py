"""Compute one shard: chunk by chunk into buffers for its range, halving the chunk when memory runs out."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jacray_workers import pages, rowcuts
from jacray_workers.blocks.block import Block
from jacray_workers.errors import BudgetError, JobError, NonFiniteError
from jacray_workers.kernels import pick
from jacray_workers.kernels.common import Targets, blocks_for
from jacray_workers.plan import ArrayPlan, Shard
from jacray_workers.planning.memory import out_of_memory, release
from jacray_workers.problem.blame import accuse
from jacray_workers.problem.resolve import place
from jacray_workers.products.reduce import Reducer
from jacray_workers.shard import NonFinite, ShardResult
from jacray_workers.transfer import Landing
from jacray_workers.trust import finite
from jacray_workers.trust.alike import Judge
from jacray_workers.trust.checks import check_shard
from jacray_workers.unwanted import listening

if TYPE_CHECKING:
    from jacray_workers.engine import Prepared
    from jacray_workers.problem.problem import Problem

TORCH_OF = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


def run_shard(
    prepared: Prepared,
    shard: Shard,
    *,
    cancelled: Callable[[], bool] | None = None,
    on_samples: Callable[[int], None] | None = None,
    into: dict[str, Tensor] | None = None,
) -> ShardResult:
    """Compute every array of the plan for the samples of one shard.

    Args:
        prepared: the job.
        shard: which samples.
        cancelled: asked between chunks, and between the passes within one; True ends the shard.
        on_samples: told how many more samples are done.
        into: buffers by array key to write to, of the range's shape; made where absent.

    Raises:
        JobError: cancelled.
        BudgetError: not even one sample at a time fits the memory there is.
        ModelError: the model raised; the text names the module and the sample.
        NonFiniteError: NaN or infinity, where the request forbids them.
        VerificationError: a checked sample disagrees with an independent computation.
    """
    if shard.rows is None:
        return _run(prepared, shard, cancelled, on_samples, into or {})
    alone = replace(shard, rows=None)
    parts = [_run(share, alone, cancelled, None, into or {}) for share in rowcuts.shares(prepared, shard)]
    if on_samples is not None and shard.rows[1] == prepared.problem.rows:
        on_samples(shard.stop - shard.start)
    return rowcuts.merged(shard, parts)


def _run(
    prepared: Prepared,
    shard: Shard,
    cancelled: Callable[[], bool] | None,
    on_samples: Callable[[int], None] | None,
    into: dict[str, Tensor],
) -> ShardResult:
    """Compute a shard that holds all rows of its samples."""
    began = time.perf_counter()
    chunk, backoffs = prepared.plan.chunk_size, 0
    at = shard.start

    def pause() -> None:
        if cancelled is not None and cancelled():
            raise JobError("job", "was cancelled", f"after {at - shard.start} samples of shard {shard.index}")

    with prepared.problem.session(), listening(pause), contextlib.closing(Landing(prepared.problem.device)) as landing:
        # Inside, for a buffer made under the caller's inference mode could not be written to here.
        buffers = _Buffers(prepared, shard, into, landing)
        reducer = Reducer(prepared, shard, buffers, pause)
        judge = Judge(prepared.problem, prepared.leaves)
        while at < shard.stop:
            pause()
            stop = min(at + chunk, shard.stop)
            try:
                stop = judge.stop(at, stop)
                compute_chunk(prepared, at, stop, buffers, reducer)
            except Exception as error:
                buffers.forget()
                if not out_of_memory(error):
                    raise _whose(prepared, at, stop, error) from error
                if stop - at == 1:
                    raise _does_not_fit(prepared, error) from error
                chunk, backoffs = max(1, (stop - at) // 2), backoffs + 1
            else:
                buffers.commit()
                if on_samples is not None:
                    on_samples(stop - at)
                at = stop
                continue
            release(prepared.problem.device)
        reducer.finish()
        blocks = buffers.finished()
        bad = _nonfinite(prepared, shard, blocks, buffers.finite)
        checks = check_shard(prepared, shard, blocks) if not bad else ()
    facts: dict[str, Any] = {"threads": torch.get_num_threads(), "device": str(prepared.problem.device)}
    facts.update({name: count for name, count in (("backoffs", backoffs), ("alone", judge.alone)) if count})
    return ShardResult(shard, blocks, checks, bad, time.perf_counter() - began, chunk, facts)


def _whose(prepared: Prepared, start: int, stop: int, error: Exception) -> Exception:
    """The error to raise: the model's own mistakes are the caller's to mend."""
    if isinstance(error, JobError):  # nobody wants the work any more
        return error
    batch = place(prepared.problem, [leaf[start:stop] for leaf in prepared.leaves])
    return accuse(prepared.problem, batch, start, error) or error


def _does_not_fit(prepared: Prepared, error: Exception) -> BudgetError:
    return BudgetError(
        "memory",
        "one sample at a time must fit the memory of the device",
        str(error).splitlines()[0],
        f"choose fewer outputs, or returns that need no Jacobian (now: {', '.join(prepared.request.returns)})",
    )


class _Buffers:
    """The shard's arrays while they fill: one tensor per array, or a list of parts for blocks kept in factors."""

    def __init__(self, prepared: Prepared, shard: Shard, into: dict[str, Tensor], landing: Landing) -> None:
        self.shard = shard
        self.landing = landing
        self.plan = prepared.plan
        self.arrays = {(a.name, a.out, a.leaf): a for a in prepared.plan.arrays}
        self.parts: dict[str, list[Tensor]] = {}
        self.tensors: dict[str, Tensor] = {}
        self.added: list[tuple[ArrayPlan, Tensor]] = []
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

    def beside(self, array: ArrayPlan, problem: Problem) -> bool:
        """Whether the array's buffer is in the memory that the problem computes in."""
        return self.tensors[array.key].device == problem.device

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
                self.tensors[array.key].add_(value.to("cpu"))
        self.added.clear()
        self.landing.turn()

    def forget(self) -> None:
        """The chunk failed. What it had put arrives before anything that is put again; its memory is free then."""
        self.added.clear()
        self.landing.wait()

    def finished(self) -> dict[str, Tensor]:
        """The arrays by key; sums in their own precision."""
        self.landing.wait()
        done = {}
        for array in self.plan.arrays:
            if array.factored:
                parts = self.parts[array.key]
                done[array.key] = parts[0] if len(parts) == 1 else type(parts[0]).cat(parts)  # type: ignore[attr-defined]
            elif array.axis < 0:
                done[array.key] = self.tensors[array.key].to(TORCH_OF[array.dtype])
            else:
                done[array.key] = self.tensors[array.key]
        return done


def compute_chunk(prepared: Prepared, start: int, stop: int, buffers: _Buffers, reducer: Reducer) -> None:
    """Compute every array for these samples and put it into the buffers."""
    problem, returns = prepared.problem, prepared.request.returns
    batch = place(problem, [leaf[start:stop] for leaf in prepared.leaves])
    kernel = pick(prepared.plan.method)
    y = None
    if "outputs" in returns or reducer.wants_outputs:
        y = _outputs(prepared, batch)
    if "outputs" in returns and y is not None:
        for o, part in enumerate(problem.split(y)):
            buffers.put("outputs", o, -1, start, stop, part)
    if "weighted_gradient" in returns and "weighted_gradient" not in reducer.by_blocks:
        _weighted(prepared, kernel, batch, start, stop, buffers)
    if prepared.tangents is not None and "jvp" in returns and "jvp" not in reducer.by_blocks:
        pushed = kernel.jvp(problem, batch, prepared.tangents.select(start, stop))
        for o, part in enumerate(problem.split(pushed, axis=2)):
            buffers.put("jvp", o, -1, start, stop, part if prepared.tangents.many else part[0])
    blocks = _jacobian(prepared, kernel, batch, start, stop, buffers) if "jacobian" in returns else None
    reducer.add(start, stop, batch, y, blocks)


def _outputs(prepared: Prepared, batch: list[Tensor]) -> Tensor:
    """The outputs `(b, rows)`, each sample's what it gives alone."""
    problem = prepared.problem
    alone = [[leaf[i : i + 1] for leaf in batch] for i in range(batch[0].shape[0])]
    with torch.no_grad():
        parts = [problem.forward(problem.values(b), b) for b in ([batch] if prepared.plan.batched else alone)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _weighted(prepared: Prepared, kernel: Any, batch: list[Tensor], start: int, stop: int, buffers: _Buffers) -> None:
    problem, ks = prepared.problem, prepared.cotangents
    if ks is None:
        return
    parts = [part.reshape(*part.shape[:2], -1) for part in ks.select(start, stop)]
    rows = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    keep = prepared.request.reduction == "none"
    for i, grad in enumerate(kernel.vjp(problem, batch, rows, per_sample_params=keep)):
        buffers.put("weighted_gradient", -1, i, start, stop, grad if ks.many else grad[0])


def _jacobian(
    prepared: Prepared, kernel: Any, batch: list[Tensor], start: int, stop: int, buffers: _Buffers
) -> list[Tensor]:
    """The chunk's blocks `(b, rows, *leaf)`, written straight into the result's memory where they can be."""
    problem, plan = prepared.problem, prepared.plan
    arrays = plan.array("jacobian")
    one_out = len(problem.outs) == 1
    if any(a.factored for a in arrays):
        blocks: list[Tensor] = kernel.jacobian(problem, batch, form=prepared.request.form)
        _put_split(problem, blocks, start, stop, buffers)
        return blocks
    size = stop - start
    direct = one_out and all(_direct(a, problem) and buffers.beside(a, problem) for a in arrays)
    if direct:
        into = Targets(
            buffers.view(a, start, stop).view(size, problem.rows, *leaf.shape)
            for a, leaf in zip(arrays, problem.leaves, strict=True)
        )
    else:
        into = Targets(blocks_for(problem, size, problem.rows, None))
    blocks = by_rows(kernel, problem, batch, into, plan.row_chunk)
    if not direct:
        _put_split(problem, blocks, start, stop, buffers)
    buffers.finite.update({a.key: size for a in arrays if direct and a.leaf in into.finite})
    return blocks


def by_rows(kernel: Any, problem: Any, batch: Sequence[Tensor], into: list[Tensor], width: int) -> list[Tensor]:
    """The kernel's blocks, in bands of at most `width` rows where all at once would be too many."""
    if getattr(kernel, "CHUNKS_ITSELF", False):
        return list(kernel.jacobian(problem, batch, None, into, width))
    if width >= problem.rows:
        return list(kernel.jacobian(problem, batch, None, into))
    for low in range(0, problem.rows, width):
        rows = range(low, min(low + width, problem.rows))
        band = kernel.jacobian(problem, batch, rows)
        for target, part in zip(into, band, strict=True):
            target[:, rows.start : rows.stop] = part
    return into


def _direct(array: ArrayPlan, problem: Any) -> bool:
    return TORCH_OF[array.dtype] == torch.promote_types(problem.leaves[array.leaf].dtype, problem.dtype)


def _put_split(problem: Any, blocks: Sequence[Tensor], start: int, stop: int, buffers: _Buffers) -> None:
    for i, block in enumerate(blocks):
        for o, part in enumerate(_by_output(problem, block)):
            buffers.put("jacobian", o, i, start, stop, part)


def _by_output(problem: Any, block: Tensor) -> list[Tensor]:
    """A block's rows as one tensor per output, in that output's shape; factors stay factors."""
    unflatten = getattr(block, "unflatten_rows", None)
    if unflatten is None:
        parts: list[Tensor] = problem.split(block)
        return parts
    if len(problem.outs) == 1:
        return [unflatten(problem.outs[0].shape)]
    return [block[:, o.rows.start : o.rows.stop].unflatten_rows(o.shape) for o in problem.outs]  # type: ignore[attr-defined]


def _nonfinite(
    prepared: Prepared, shard: Shard, blocks: dict[str, Tensor], finite_samples: Counter[str]
) -> tuple[NonFinite, ...]:
    found = []
    for array in prepared.plan.arrays:
        if finite_samples[array.key] == shard.stop - shard.start:
            continue
        bad = finite.locate(array.key, blocks[array.key], array.axis, shard.start)
        if bad is not None:
            found.append(bad)
    if found and prepared.request.nan_policy == "raise":
        first = found[0]
        raise NonFiniteError(
            "nan_policy",
            "raise forbids NaN and infinity",
            f"{first.count} in {first.key}, first at sample {first.first}",
            "nan_policy='propagate' keeps them, counted and located in the receipt",
        )
    return tuple(found)

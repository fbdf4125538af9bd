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

from jacray_workers import rowcuts
from jacray_workers.buffers import Buffers
from jacray_workers.errors import BudgetError, JobError, NonFiniteError
from jacray_workers.kernels import pick
from jacray_workers.kernels.common import WHOLE, Targets, begun, reach, singly, spans
from jacray_workers.plan import Shard
from jacray_workers.planning.memory import Keeper, out_of_memory, release
from jacray_workers.problem.blame import accuse
from jacray_workers.problem.resolve import place
from jacray_workers.products.reduce import Reducer
from jacray_workers.progress import Chunk, Progress
from jacray_workers.shard import NonFinite, ShardResult
from jacray_workers.transfer import Landing
from jacray_workers.trust import finite
from jacray_workers.trust.alike import Judge
from jacray_workers.trust.checks import check_shard
from jacray_workers.unwanted import listening

if TYPE_CHECKING:
    from jacray_workers.engine import Prepared


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
    progress = Progress(prepared.plan, shard)

    def pause() -> None:
        if cancelled is not None and cancelled():
            raise JobError("job", "was cancelled", f"after {progress.at - shard.start} samples of shard {shard.index}")

    with prepared.problem.session(), listening(pause), contextlib.closing(Landing(prepared.problem.device)) as landing:
        # Inside, for a buffer made under the caller's inference mode could not be written to here.
        buffers = Buffers(prepared, shard, into, landing)
        reducer = Reducer(prepared, shard, buffers, pause)
        judge = Judge(prepared.problem, prepared.leaves)
        keeper = Keeper(prepared.plan.peak_bytes, prepared.plan.budget_bytes, prepared.problem.device)
        while progress.at < shard.stop:
            pause()
            chunk = progress.ahead()
            try:
                chunk = replace(chunk, stop=judge.stop(chunk.start, chunk.stop))
                compute_chunk(prepared, chunk, buffers, reducer)
            except Exception as error:
                out = out_of_memory(error)
                steps = buffers.forget(keep=out)
                if not out:
                    raise _whose(prepared, chunk, error) from error
                if not progress.back_off(chunk, steps):
                    raise _does_not_fit(prepared, error) from error
                reducer.forget()
            else:
                buffers.commit()
                progress.done(chunk)
                keeper.look()
                if on_samples is not None:
                    on_samples(chunk.size)
                continue
            release(prepared.problem.device)
        reducer.finish()
        blocks = buffers.finished()
        bad = _nonfinite(prepared, shard, blocks, buffers.finite)
        checks = check_shard(prepared, shard, blocks) if not bad else ()
    facts = {"threads": torch.get_num_threads(), "device": str(prepared.problem.device), **progress.facts()}
    facts |= {"alone": judge.alone} if judge.alone else {}
    return ShardResult(shard, blocks, checks, bad, time.perf_counter() - began, progress.size, facts)


def _whose(prepared: Prepared, chunk: Chunk, error: Exception) -> Exception:
    """The error to raise: the model's own mistakes are the caller's to mend."""
    if isinstance(error, JobError):  # nobody wants the work any more
        return error
    batch = place(prepared.problem, [leaf[chunk.start : chunk.stop] for leaf in prepared.leaves])
    return accuse(prepared.problem, batch, chunk.start, error) or error


def _does_not_fit(prepared: Prepared, error: Exception) -> BudgetError:
    return BudgetError(
        "memory",
        "one sample at a time must fit the memory of the device",
        str(error).splitlines()[0],
        f"choose fewer outputs, or returns that need no Jacobian (now: {', '.join(prepared.request.returns)})",
    )


def compute_chunk(prepared: Prepared, chunk: Chunk, buffers: Buffers, reducer: Reducer) -> None:
    """Compute every array for these samples and put it into the buffers."""
    problem, returns = prepared.problem, prepared.request.returns
    start, stop = chunk.start, chunk.stop
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
    blocks = _jacobian(prepared, kernel, batch, chunk, buffers) if "jacobian" in returns else None
    reducer.add(chunk, batch, y, blocks)


def _outputs(prepared: Prepared, batch: list[Tensor]) -> Tensor:
    """The outputs `(b, rows)`, each sample's what it gives alone."""
    problem = prepared.problem
    with torch.no_grad():
        parts = [problem.forward(problem.values(b), b) for b in ([batch] if prepared.plan.batched else singly(batch))]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _weighted(prepared: Prepared, kernel: Any, batch: list[Tensor], start: int, stop: int, buffers: Buffers) -> None:
    problem, ks = prepared.problem, prepared.cotangents
    if ks is None:
        return
    parts = [part.reshape(*part.shape[:2], -1) for part in ks.select(start, stop)]
    rows = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    keep = prepared.request.reduction == "none"
    for i, grad in enumerate(kernel.vjp(problem, batch, rows, per_sample_params=keep)):
        buffers.put("weighted_gradient", -1, i, start, stop, grad if ks.many else grad[0])


def _jacobian(prepared: Prepared, kernel: Any, batch: list[Tensor], chunk: Chunk, buffers: Buffers) -> list[Tensor]:
    """The chunk's blocks `(b, rows, *leaf)`, written straight into the result's memory where they can be."""
    problem = prepared.problem
    if any(a.factored for a in prepared.plan.array("jacobian")):
        blocks: list[Tensor] = kernel.jacobian(problem, batch, form=prepared.request.form)
        buffers.put_blocks(blocks, chunk)
        return blocks
    into = buffers.targets(chunk)
    if chunk.steps < WHOLE:
        by_rows(kernel, problem, batch, into, chunk.rows)
        into.steps = [WHOLE] * chunk.size
    buffers.landed(chunk)
    return into


def by_rows(kernel: Any, problem: Any, batch: Sequence[Tensor], into: Targets, width: int) -> None:
    """The kernel's blocks, in bands of at most `width` rows where all at once would be too many."""
    if getattr(kernel, "CHUNKS_ITSELF", False):
        kernel.jacobian(problem, batch, None, into, width)
        return
    if width >= problem.rows and not begun(into):
        kernel.jacobian(problem, batch, None, into)
        return
    for rows in spans(range(begun(into), problem.rows), width):
        band = kernel.jacobian(problem, batch, rows)
        for target, part in zip(into, band, strict=True):
            target[:, rows.start : rows.stop] = part
        reach(into, rows.stop)


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

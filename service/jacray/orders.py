"""What is submitted to a client, its arguments read and checked, and how its plan is cut into units of work."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from jacray_workers.engine import Prepared, run_shard
from jacray_workers.errors import RequestError
from jacray_workers.plan import Plan, Shard
from jacray_workers.request import Request
from jacray_workers.sources.loaded import Loaded
from jacray_workers.sources.ranged import Rows
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from jacray.failures import OnError
from jacray.target import Target

# How long a worker may be deaf: nothing ends a kernel between two passes.
DEAF_SECONDS = 1.0
# How much work a lost worker, or a job that is stopped, may take along.
SHARD_SECONDS = 20.0
# Workers are not equally fast, so the last shards decide how long some of them stand idle: shards this short, where
# that makes no more of them than so many per worker.
EVEN_SECONDS, EVEN_SHARDS = 0.25, 64
# Every shard carries its own part of each sum: where that is larger, fewer shards are better.
PART_SIZE = 1 << 17
# Methods whose passes over some output rows (tangent columns for `forward`) can be made shorter at no cost.
BANDED = ("reverse", "forward", "layerwise")


@dataclass(frozen=True)
class Order:
    """What was submitted.

    Attributes:
        model: the module.
        loaded: the inputs, and what is known of the samples.
        request: with the defaults of jobs.
        target: where the results go; None for memory.
        key: the idempotency key, or None.
        on_error: what a shard that always fails does.
        user: whose it is.
    """

    model: Any
    loaded: Loaded
    request: Request
    target: Target | None
    key: str | None
    on_error: OnError
    user: str

    @property
    def nbytes(self) -> int:
        """Bytes of the model and the inputs; samples that workers read themselves take none here."""
        module, x = self.model, () if isinstance(self.loaded.inputs, Rows) else self.loaded.inputs
        held = [*module.parameters(), *module.buffers()] if isinstance(module, nn.Module) else []
        leaves = [leaf for leaf in pytree.tree_leaves(x) if hasattr(leaf, "nbytes") or isinstance(leaf, Tensor)]
        return sum(int(part.nbytes) for part in [*held, *leaves])


def loaded(x: Any) -> Loaded:
    """What was submitted as inputs, with what is known of the samples."""
    if isinstance(x, Rows):
        return Loaded(x, start=x.start)
    return x if isinstance(x, Loaded) else Loaded(x)


def in_units(plan: Plan, request: Request, size: int | None, pace: Callable[[], float], workers: int = 1) -> Plan:
    """The plan with chunks and shards no longer than a job should be deaf, or may lose.

    Chunks of about a second where their size is not asked for, passes of about a second where a chunk takes longer,
    and shards of some twenty, by what the method took in the planner's trial; shorter ones where several workers share
    the job, so that none waits long for the others at its end. The first call in a process may take
    many times what the next ones do: where the trial says that something is too long, a sample is timed again.

    Args:
        plan: as it was made.
        request: fixes the chunk size where it names one.
        size: samples per shard as the client fixed them: whole chunks each, or smaller chunks where these are larger.
        pace: times one sample.
        workers: that share the job.
    """
    if plan.row_cuts:
        return plan
    chunk = plan.chunk_size if size is None else min(plan.chunk_size, size)
    shard, band = size or plan.shard_size, plan.row_chunk
    # The pairs of samples of an NTK are computed anew by every shard: more of them would be more work.
    each = 0.0 if "ntk" in request.returns else _seconds(plan)
    if each * chunk > DEAF_SECONDS or each * shard > SHARD_SECONDS:
        each = min(each, pace())
    if request.chunk_size is None:
        chunk = min(chunk, _power(_most(DEAF_SECONDS, each)))
    if size is None:
        shard = min(shard, _most(SHARD_SECONDS, each), _even(plan, workers, each))
    if plan.method in BANDED and each * chunk > DEAF_SECONDS:
        band = max(1, int(band * DEAF_SECONDS / (each * chunk)))
    shard = min(plan.samples, max(chunk, shard // chunk * chunk))
    return replace(plan, chunk_size=chunk, shard_size=shard, row_chunk=band)


def _even(plan: Plan, workers: int, each: float) -> int:
    """Samples per shard that let several workers end a job at about the same time."""
    if workers == 1 or any(array.axis < 0 and array.size > PART_SIZE for array in plan.arrays):
        return plan.samples
    return max(_most(EVEN_SECONDS, each), math.ceil(plan.samples / (workers * EVEN_SHARDS)))


def pace(prepared: Prepared) -> float:
    """Seconds of everything that the first sample takes; infinity where it cannot be computed alone."""
    request = prepared.request.model_copy(update={"verify": False, "nan_policy": "propagate"})
    alone = replace(prepared, request=request, plan=replace(prepared.plan, chunk_size=1))
    began = time.perf_counter()
    try:
        run_shard(alone, Shard(0, 0, 1))
    except Exception:  # noqa: BLE001 - what a model raises is told where its job meets it
        return math.inf
    return time.perf_counter() - began


def check_shards(timeout: Any, size: Any) -> None:
    """A client's patience with a shard, and a shard's size.

    Raises:
        RequestError: one of them is none.
    """
    if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0):
        raise RequestError("shard_timeout", "must be a number of seconds above 0, or None", timeout)
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise RequestError("shard_size", "must be a whole number of samples, at least 1, or None", size)


def _seconds(plan: Plan) -> float:
    """What a sample takes, where the method was timed; 0 where nobody knows."""
    chosen = next((c for c in plan.candidates if c.method == plan.method and c.measured), None)
    return 0.0 if chosen is None else chosen.seconds / max(plan.samples, 1)


def _most(seconds: float, each: float) -> int:
    """How many samples take so long."""
    return max(1, int(min(seconds / each, 1 << 62))) if each > 0 else 1 << 62


def _power(count: int) -> int:
    """The power of two at or below: a time is never measured twice alike, and the plan should be."""
    return 1 << (count.bit_length() - 1)

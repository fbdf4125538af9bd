"""One shard, computed and, where the job has a store, written."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from jacray_workers.engine import Prepared, run_shard
from jacray_workers.plan import Plan, Shard
from jacray_workers.shard import ShardResult
from torch import Tensor

from jacray.target import Target

if TYPE_CHECKING:
    from jacray.store import Writer


def writer_for(target: Target | None, plan: Plan) -> Writer | None:
    """What writes a job's shards, where it has a store.

    Raises:
        StorageError: the store cannot be reached from here.
    """
    if target is None:
        return None
    from jacray.store import Writer

    return Writer(target, plan)


def compute(
    prepared: Prepared,
    writer: Writer | None,
    shard: Shard,
    cancelled: Callable[[], bool],
    into: dict[str, Tensor] | None = None,
) -> ShardResult:
    """Compute a shard and write its blocks.

    Args:
        prepared: the job.
        writer: of the job's store, or None.
        shard: which.
        cancelled: asked between chunks.
        into: memory to compute into, where there is no writer; see `run_shard`.

    Raises:
        Exception: as `run_shard`.
        StorageError: the store takes no more.
    """
    memory = into if writer is None else writer.into(shard)
    result = run_shard(prepared, shard, cancelled=cancelled, into=memory)
    return result if writer is None else writer.write(result)

"""How a job's shards become its result: in the client's memory, or in a store that workers write to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jacray_workers.engine import Prepared, assemble
from jacray_workers.plan import Plan
from torch import Tensor

from jacray.gather import Gather, Gathering
from jacray.result import Result
from jacray.target import Target
from jacray.trees import to_json

if TYPE_CHECKING:
    from jacray.store import Store

Receipt = Callable[[], Mapping[str, Any]]


def begin_store(
    target: Target, prepared: Prepared, plan: Plan, fields: Mapping[str, Tensor] | None = None, start: int = 0
) -> Store:
    """Make the store that a job writes to, or open the same job's as it was left.

    Args:
        target: where.
        prepared: the job, for the structure of its results.
        plan: as its workers follow it.
        fields: what else is known of each sample, by name.
        start: the number of the first sample in its source.

    Raises:
        StorageError: another job's results are there, or it cannot be written.
    """
    from jacray import store

    if store.exists(target):
        return store.reopen(target, plan)
    keys = {array.key: array.key for array in plan.arrays}
    trees = assemble(replace(prepared, plan=plan), keys)
    structure = {name: to_json(tree, str) for name, tree in trees.items()}
    return store.create(target, plan, structure, fields, start)


def gathering(plan: Plan, target: Target | None) -> Gathering:
    """What takes the shards of a job.

    Args:
        plan: the job's.
        target: whose store was begun; None for memory.
    """
    if target is None:
        return Gather(plan)
    from jacray import store

    return store.Collector(store.open_store(target, write=True))


def outcome(prepared: Prepared, gathered: Gathering, plan: Plan, receipt: Receipt) -> Result:
    """The result of a job whose shards have all come.

    The receipt of a job in memory is written when somebody reads it: a small call should not pay for it.
    """
    blocks = gathered.finish()
    if isinstance(gathered, Gather):
        prepared = prepared if prepared.plan is plan else replace(prepared, plan=plan)
        return Result(assemble(prepared, blocks), plan, receipt)
    from jacray import store
    from jacray.folders import RECEIPT
    from jacray.stored import StoredResult

    opened: Store = gathered.store  # type: ignore[attr-defined]  # the other kind of gathering has one
    written = receipt()
    with store.writing(opened.target):
        opened.target.write(RECEIPT, json.dumps(store.plain(dict(written)), indent=1, default=str) + "\n")
    return StoredResult(opened, lambda: written)

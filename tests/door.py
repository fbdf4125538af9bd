"""The engine as a test uses it: one call from a request to the results and the plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jacray_workers.engine import Prepared, assemble, combine, prepare, run_shard
from jacray_workers.plan import Plan
from jacray_workers.request import make_request
from jacray_workers.shard import ShardResult


@dataclass(frozen=True)
class Answer:
    """The results by name, and how they came about."""

    found: dict[str, Any]
    plan: Plan
    shards: tuple[ShardResult, ...]
    prepared: Prepared

    def __getattr__(self, name: str) -> Any:
        found = object.__getattribute__(self, "found")
        if name not in found:
            raise AttributeError(name)
        return found[name]


def compute(
    model: Any,
    inputs: Any,
    *,
    plan: Plan | None = None,
    workers: int = 1,
    change: Callable[[Plan], Plan] | None = None,
    **fields: Any,
) -> Answer:
    """Prepare, run every shard and put the parts together. `change` may alter the plan before it is run."""
    request = make_request(**fields)
    prepared = prepare(model, inputs, request, plan=plan, workers=workers)
    if change is not None:
        prepared = prepare(model, inputs, request, plan=change(prepared.plan), workers=workers)
    results = tuple(run_shard(prepared, shard) for shard in prepared.plan.shards())
    return Answer(assemble(prepared, combine(prepared.plan, results)), prepared.plan, results, prepared)

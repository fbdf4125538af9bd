"""The receipt of a job: how its numbers came about, as plain JSON data."""

from __future__ import annotations

import functools
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch
from jacray_workers.plan import Plan
from jacray_workers.request import Request
from jacray_workers.shard import NonFinite, ShardResult

import jacray
from jacray.executors.base import Failed, Retried

LIBRARIES = ("numpy", "ray")
# A receipt is read whole; of more shards than this the journal tells.
MOST = 2000


@dataclass
class Ledger:
    """What is noted while a job runs.

    Attributes:
        executor: name, workers and threads of what computes it.
        job: the job's id; empty for a call in the caller's own process.
        started: when, in UTC.
        seconds: wall time by station.
        shards: per shard its samples, worker, time, and what else it had to say; of the first `MOST` shards.
        shards_done: how many were done in all.
        kept, kept_samples: how many of them an earlier run of the same job had computed, and their samples.
        retries: shards that were lost and computed again; the first `MOST`.
        skipped: shards that were given up, with their samples and errors.
    """

    executor: Mapping[str, Any]
    job: str = ""
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    seconds: dict[str, float] = field(default_factory=dict)
    shards: list[dict[str, Any]] = field(default_factory=list)
    shards_done: int = 0
    kept: int = 0
    kept_samples: int = 0
    retries: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    nonfinite: dict[str, NonFinite] = field(default_factory=dict)

    def done(self, result: ShardResult, worker: str, *, kept: bool = False) -> None:
        """Note a shard, perhaps one that an earlier run had computed."""
        shard = result.shard
        self.shards_done += 1
        if kept:
            self.kept, self.kept_samples = self.kept + 1, self.kept_samples + shard.stop - shard.start
        if len(self.shards) < MOST:
            self.shards.append(
                {
                    "index": shard.index, "start": shard.start, "stop": shard.stop, "worker": worker, "kept": kept,
                    "seconds": result.seconds, "chunk_size": result.chunk_size, **result.facts,
                }
            )  # fmt: skip
        self.checks.extend(asdict(check) for check in result.checks)
        for bad in result.nonfinite:
            self.nonfinite[bad.key] = _merge(self.nonfinite.get(bad.key), bad)

    def retried(self, step: Retried) -> None:
        """Note a loss."""
        if len(self.retries) < MOST:
            self.retries.append({"index": step.shard.index, "attempt": step.attempt, "reason": step.reason})

    def skip(self, step: Failed) -> None:
        """Note a shard that is given up."""
        shard, told = step.shard, f"{type(step.error).__name__}: {step.error}"
        self.skipped.append({"index": shard.index, "start": shard.start, "stop": shard.stop, "error": told})


def build(plan: Plan, request: Request, ledger: Ledger) -> dict[str, Any]:
    """The receipt. Everything in it passes `json.dumps(receipt, allow_nan=False)`."""
    compute = ledger.seconds.get("compute", 0.0)
    checks = sorted(ledger.checks, key=lambda check: check["sample"])
    receipt = {
        "job": ledger.job,
        "started": ledger.started.isoformat(timespec="milliseconds"),
        "versions": {**library_versions(), "python": platform.python_version()},
        "machine": {"system": platform.platform(), "processor": platform.machine()},
        "executor": ledger.executor,
        "device": plan.device,
        "threads": plan.threads or torch.get_num_threads(),
        "seed": request.seed,
        "request": {name: getattr(request, name) for name in sorted(request.model_fields_set)},
        "plan": plan.to_dict(),
        "plan_digest": plan.digest,
        "seconds": ledger.seconds,
        "samples_per_second": (plan.samples - ledger.kept_samples) / compute if compute else None,
        "verified": {
            "checks": len(checks),
            "passed": all(check["passed"] for check in checks),
            "worst_error": max((check["error"] for check in checks), default=None),
            "details": checks,
        },
        "nonfinite": [asdict(bad) for bad in ledger.nonfinite.values()],
        "shards": sorted(ledger.shards, key=lambda shard: shard["index"]),
        "shards_done": ledger.shards_done,
        "shards_kept": ledger.kept,
        "retries": ledger.retries,
        "skipped": ledger.skipped,
    }
    return {key: plain(value) for key, value in receipt.items()}


@functools.cache
def library_versions() -> dict[str, str]:
    """The versions of what computes, without importing what is not needed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"jacray": jacray.__version__, "torch": str(torch.__version__)}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def plain(value: Any) -> Any:
    """A value as JSON data: tensors as shapes, non-finite numbers as text, everything unknown as its text."""
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, Sequence):
        return [plain(part) for part in value]
    if hasattr(value, "model_dump"):
        return plain(value.model_dump())
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {list(value.shape)}"
    return str(value)


def _merge(known: NonFinite | None, new: NonFinite) -> NonFinite:
    if known is None:
        return new
    first = min((n for n in (known.first, new.first) if n >= 0), default=-1)
    return NonFinite(known.key, known.count + new.count, first)

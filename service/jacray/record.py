"""One job's lines in a journal, as the coordinator writes them and reads them again when it resumes the job."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from jacray_workers.plan import Plan, Shard
from jacray_workers.shard import Check, NonFinite, ShardResult, Written

from jacray.entries import ShardRow
from jacray.executors.base import Done, Failed, Retried
from jacray.journal import Journal

Intact = Callable[[ShardResult], bool]
"""Tells whether what a shard wrote is still there, bit for bit."""


class Record:
    """What becomes of one job's shards.

    Args:
        journal: where to.
        job: the job's id.
        plan: how it is computed.
        intact: looks at what a finished shard has written; None where nothing is written and nothing can be kept.
        still_ours: raises where another coordinator has taken the job over.
    """

    def __init__(
        self,
        journal: Journal,
        job: str,
        plan: Plan,
        intact: Intact | None,
        still_ours: Callable[[], None] | None = None,
    ) -> None:
        self.journal, self.job, self.plan = journal, job, plan
        self._intact, self._still_ours = intact, still_ours

    @property
    def keeps(self) -> bool:
        """Whether a shard that is done stays done when the job is run again."""
        return self._intact is not None

    def kept(self) -> Iterator[tuple[ShardResult, str]]:
        """The shards that need not be computed again, each with its worker: those whose blocks are intact."""
        if self._intact is None:
            return
        for row in self.journal.shards(self.job, ["done"]):
            result = _result(row, self.plan.shard(row.shard))
            if self._intact(result):
                yield result, row.worker

    def done(self, step: Done) -> None:
        """Note a shard that is done.

        Raises:
            JobError: another coordinator has taken the job over.
        """
        if self._still_ours is not None:
            self._still_ours()
        result = step.result
        row = ShardRow(
            result.shard.index, "done", step.attempt, step.worker, seconds=result.seconds, detail=_detail(result)
        )
        self.journal.put(self.job, row)

    def retried(self, step: Retried) -> None:
        """Note a loss."""
        self.journal.put(self.job, ShardRow(step.shard.index, "again", step.attempt, error=step.reason))

    def failed(self, step: Failed) -> None:
        """Note a shard that is given up."""
        told, trace = f"{type(step.error).__name__}: {step.error}", str(step.error.__cause__ or "")
        row = ShardRow(step.shard.index, "failed", step.attempt, step.worker, error=told, trace=trace)
        self.journal.put(self.job, row)


def _detail(result: ShardResult) -> dict[str, Any]:
    return {
        "checks": [asdict(check) for check in result.checks],
        "nonfinite": [asdict(bad) for bad in result.nonfinite],
        "chunk_size": result.chunk_size,
        "facts": result.facts,
        "written": [asdict(written) for written in result.written],
    }


def _result(row: ShardRow, shard: Shard) -> ShardResult:
    detail = row.detail
    return ShardResult(
        shard,
        {},
        tuple(Check(**check) for check in detail["checks"]),
        tuple(NonFinite(**bad) for bad in detail["nonfinite"]),
        row.seconds,
        detail["chunk_size"],
        dict(detail["facts"]),
        written_by(row),
    )


def written_by(row: ShardRow) -> tuple[Written, ...]:
    """What a shard that is done has written into its job's store."""
    return tuple(Written(**{**w, "rows": w["rows"] and tuple(w["rows"])}) for w in row.detail["written"])

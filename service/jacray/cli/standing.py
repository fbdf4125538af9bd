"""How the run in a folder stands: its job and its shards, from the journal."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import click
from jacray_workers.errors import Plain, UserError
from rich.console import Console
from rich.table import Table

from jacray.entries import Counts, JobRow, ShardRow
from jacray.journal import Journal
from jacray.mirror import reading
from jacray.target import as_target
from jacray.url_lease import Holder, busy

_MOST_FAILED = 10
_WIDE = 200  # where there is no terminal, nothing should be broken into lines


def show_run(place: str, *, shards: bool = False, as_json: bool = False) -> None:
    """Print how the run in a folder or behind a URL stands.

    Args:
        place: the run's. Behind a URL is a copy of its journal, a few seconds old while the job runs.
        shards: list every shard that something has happened to.
        as_json: as one JSON object a line: the job, then its shards.

    Raises:
        UserError: there is no journal.
    """
    target = as_target(place)
    with reading(target) as journal:
        if journal is None:
            raise UserError("path", "must hold a journal", Plain(target.url), "a run writes one into its folder")
        holder = None if target.path is not None else busy(target)
        alone = journal.alone if target.path is not None else holder is None
        for job in journal.jobs():
            if as_json:
                _print_json(journal, job, alone, shards, holder)
            else:
                _print_table(_rows(journal, job, alone, target.url, holder))
                if shards:
                    _print_shards(journal.shards(job.id))


def state_of(job: JobRow, *, alone: bool) -> str:
    """A job's state in a word: what its process left running was interrupted."""
    return "interrupted" if alone and job.state in ("queued", "running") else job.state


def _rows(journal: Journal, job: JobRow, alone: bool, place: str, holder: Holder | None) -> Iterator[tuple[str, str]]:
    counts, state = journal.counts(job.id), state_of(job, alone=alone)
    yield "job", job.id
    yield "state", f"{state}: {job.error}" if job.error else state
    if holder is not None:
        yield "held by", f"{holder}, heard of {max(0.0, time.time() - holder.at):.0f} s ago by its clock"
    yield "shards", _shards(counts, job)
    yield "samples", f"{job.samples:,}"
    yield "method", str(job.plan.get("method", ""))
    yield "began", _time(job.began)
    if job.began is not None:
        until = job.ended or (_last(journal, job) if alone else time.time())
        yield "took" if state != "running" else "runs for", f"{max(0.0, until - job.began):.1f} s"
    for row in _first(journal.shards(job.id, ["failed"]), _MOST_FAILED):
        yield f"shard {row.shard}", f"failed after {row.attempt} attempts: {row.error}"
    if state not in ("done", "running", "queued"):
        yield "to go on", f"run the same command again: shards that are finished in {place} are kept"


def _shards(counts: Counts, job: JobRow) -> str:
    parts = [f"{counts.done:,} of {job.shards:,} done"]
    parts += [f"{n:,} {word}" for n, word in ((counts.again, "to be tried again"), (counts.failed, "failed")) if n]
    return ", ".join([*parts, f"{counts.retries:,} retries"] if counts.retries else parts)


def _last(journal: Journal, job: JobRow) -> float:
    """When something last happened to a shard."""
    return max((row.at for row in journal.shards(job.id)), default=job.began or job.created)


def _first(rows: Iterator[ShardRow], most: int) -> Iterator[ShardRow]:
    for row, _ in zip(rows, range(most), strict=False):
        yield row


def _time(seconds: float | None) -> str:
    return "not yet" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _print_table(rows: Iterator[tuple[str, str]]) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(name, text)
    _print(table)


def _print_shards(rows: Iterator[ShardRow]) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("shard", "state", "attempt", "worker", "seconds", "error"):
        table.add_column(name, justify="right" if name in ("shard", "attempt", "seconds") else "left")
    for row in rows:
        table.add_row(str(row.shard), row.state, str(row.attempt), row.worker, f"{row.seconds:.3f}", row.error)
    _print(table)


def _print(table: Table) -> None:
    console = Console(highlight=False, markup=False)
    console = console if console.is_terminal else Console(width=_WIDE, highlight=False, markup=False)
    with console.capture() as printed:
        console.print(table)
    click.echo("\n".join(line.rstrip() for line in printed.get().splitlines()))


def _print_json(journal: Journal, job: JobRow, alone: bool, shards: bool, holder: Holder | None) -> None:
    told: dict[str, Any] = {
        "job": job.id, "state": state_of(job, alone=alone), "error": job.error, "samples": job.samples,
        "shards": job.shards, **{f"shards_{name}": n for name, n in asdict(journal.counts(job.id)).items()},
        "created": job.created, "began": job.began, "ended": job.ended, "digests": dict(job.digests),
    }  # fmt: skip
    told["retries"] = told.pop("shards_retries")
    told |= {} if holder is None else {"held_by": {"host": holder.host, "pid": holder.pid, "at": holder.at}}
    click.echo(json.dumps(told))
    for row in journal.shards(job.id) if shards else ():
        click.echo(json.dumps(asdict(row)))

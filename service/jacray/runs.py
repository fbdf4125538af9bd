"""Runs on disk: begun before the first shard, finished with a receipt and a page, and opened again at any time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jacray_workers.errors import Plain, RequestError, UserError
from jacray_workers.plan import Plan
from jacray_workers.problem.far import far_inputs
from jacray_workers.sources.ranged import Rows

from jacray import emit, store, url_runs
from jacray.folders import RECEIPT, REPORT, SPEC
from jacray.plans import pins
from jacray.result import Result
from jacray.spec import Run, resolved
from jacray.stored import StoredResult
from jacray.target import Target, as_target
from jacray.work import Work

__all__ = ["StoredResult", "begin", "load", "pins", "save", "target"]


def target(run: Run) -> Target:
    """Where a run's workers write."""
    if run.folder is None:
        return url_runs.target(run)
    return Target(str(run.folder.expanduser().absolute()), compression=run.spec.output.compression)


def begin(run: Run, plan: Plan) -> None:
    """Write `spec.yaml`, by which a place is a run's, while its job computes."""
    text = emit.dump(resolved(run, pins(plan)), f"Replays this run: jacray run {run.place}/{SPEC}")
    where = target(run)
    with store.writing(where):
        where.write(SPEC, text)


def save(run: Run, work: Work, result: Result) -> None:
    """Finish a run: `receipt.json` and, if asked for, `report.html`. The numbers are there already."""
    where = target(run)
    receipt = {**result.receipt, "spec": resolved(run, pins(result.plan)), "digests": work.digests}
    where.write(RECEIPT, json.dumps(store.plain(receipt), indent=1, default=str) + "\n")
    if run.spec.output.report:
        _write_report(where, run, work, receipt)


def _bytes(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise RequestError(name, "must be a number of bytes, 0 or more", value)
    return value


def _write_report(where: Target, run: Run, work: Work, receipt: Mapping[str, Any]) -> None:
    from jacray.report import page

    result = StoredResult(store.open_store(where), lambda: receipt)
    inputs = work.loaded.inputs
    shown = far_inputs(inputs) if isinstance(inputs, Rows) else inputs
    text = page(result, inputs=shown, fields=work.loaded.fields, title=run.title, beside=set(where.names()))
    where.write_bytes(REPORT, text.encode("utf-8", errors="replace"))  # a folder need not be named in UTF-8


def load(path: str | Path | Target, *, small: int | None = None) -> StoredResult:
    """Open a run's folder, or the URL that a job wrote to.

    Args:
        path: the folder, or a URL such as `s3://BUCKET/RUN`; or the target that a job was given.
        small: up to how many bytes an attribute is read whole, as tensors; 64 MiB by default, 0 for none.

    Returns:
        A result whose attributes are read when they are first asked for: as tensors where they are small, else as
        arrays that read what a slice needs. A run that has not finished can be opened too: `complete` is False,
        `written` lists the samples that are there, and only those can be read.

    Raises:
        UserError: there is no run at this path.
    """
    where = as_target(path)
    if small is not None:
        where = replace(where, small=_bytes("small", small))
    if not store.exists(where):
        raise UserError(
            "path", f"must be a run's folder, which holds {where.results.rpartition('/')[2]}", Plain(str(path))
        )
    return StoredResult(store.open_store(where))

"""Bring a job's result into a run folder, some megabytes at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from jacray_workers.errors import Plain, UserError
from jacray_workers.plan import ArrayPlan, Plan

from jacray.documents import Document
from jacray.http import wire
from jacray.http.connection import Connections
from jacray.http.problems import HttpError
from jacray.http.remote_job import RemoteJob
from jacray.plans import pins, read_plan
from jacray.target import Target

PIECE = 1 << 26


def fetch(job: RemoteJob, connections: Connections, to: Path) -> Path:
    """Write `results.zarr`, `receipt.json` and, of a job from a file, `spec.yaml`; `jacray.load(to)` opens them.

    The folder appears whole or not at all.

    Raises:
        UserError: the folder is there already.
        JacrayError: the job has no result.
    """
    from jacray.store import create, finish, write_block, write_whole

    if to.exists() and any(to.iterdir() if to.is_dir() else (to,)):
        raise UserError("to", "must be a new folder or an empty one", Plain(str(to)))
    receipt = connections.json("GET", f"/v1/jobs/{job.id}/receipt")
    plan = read_plan(receipt["plan"])
    structure = _structure(job, connections)
    beside = to.with_name(f".{to.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        made = create(Target(str(beside.absolute())), plan, structure)
        for array in plan.arrays:
            if array.factored:
                write_whole(made, array, job.array(array.key))
                continue
            for start, stop in _ranges(array, plan.samples):
                write_block(made, array, job.array(array.key, start, stop), start)
        finish(made)
        (beside / "receipt.json").write_text(json.dumps(receipt, indent=1), encoding="utf-8")
        _write_spec(job, connections, plan, beside, to)
        if to.exists():
            to.rmdir()
        beside.rename(to)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return to


def _write_spec(job: RemoteJob, connections: Connections, plan: Plan, beside: Path, to: Path) -> None:
    """The file that the job came from, as a run on one's own machine writes it: with what the plan decided."""
    from jacray import emit
    from jacray.spec import Run, RunSpec, resolved

    try:
        found = connections.json("GET", f"/v1/jobs/{job.id}/spec")
    except HttpError as error:
        if error.status == 404:
            return
        raise
    spec = RunSpec.model_validate(found["run"])
    run = Run(spec, Document(found["run"], "spec"), Path(found["base"]), to)
    text = emit.dump(resolved(run, pins(plan)), f"Replays this run: jacray run {to}/spec.yaml")
    (beside / "spec.yaml").write_text(text, encoding="utf-8")


def _structure(job: RemoteJob, connections: Connections) -> dict[str, Any]:
    """The results' trees, from the head of a message that holds one sample."""
    query = {"start": 0, "stop": 1}
    data = connections.download(f"/v1/jobs/{job.id}/result", query)
    found: dict[str, Any] = wire.read_header(data).about["results"]
    return found


def _ranges(array: ArrayPlan, samples: int) -> list[tuple[int, int]]:
    """Samples of some megabytes; all at once where an array has none."""
    if array.axis < 0:
        return [(0, samples)]
    item = int("".join(c for c in array.dtype if c.isdigit())) // 8
    step = max(PIECE // max(array.size // samples * item, 1), 1)
    return [(start, min(start + step, samples)) for start in range(0, samples, step)]

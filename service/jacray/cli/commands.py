"""What the commands do, behind their arguments."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from jacray_workers.errors import Plain, SpecError

from jacray.spec import Run, read_run

if TYPE_CHECKING:
    from jacray.progress import Style
    from jacray.result import Result
    from jacray.work import Work


def plan_file(file: str, overrides: Sequence[str]) -> str:
    """How a file would be computed, in words."""
    run = read_run(file, overrides)
    from jacray_workers.engine import prepare
    from jacray_workers.models import as_model

    from jacray.executors.threads import torch_threads
    from jacray.orders import in_units, pace
    from jacray.work import make

    work, cluster = make(run), run.spec.cluster
    # As a worker would have it: threads decide which method is fastest, workers how many shards there are.
    with run.naming(), torch_threads(max(1, int(cluster.cpus_per_worker))):
        prepared = prepare(as_model(work.model), work.loaded.inputs, work.request, workers=cluster.workers)
        units = in_units(prepared.plan, work.request, cluster.shard_size, lambda: pace(prepared), cluster.workers)
        return units.explain()


def run_file(file: str, overrides: Sequence[str], style: Style = "auto") -> None:
    """Compute what a file describes, write its folder, and print a summary."""
    from jacray.cli.interrupts import stoppable
    from jacray.folders import check_free

    began = time.perf_counter()
    run = read_run(file, overrides)
    goes_on = check_free(run)
    from jacray.cli.show import summary
    from jacray.work import make

    work = make(run)
    with stoppable(), _told_how_to_go_on(run), _room(run, goes_on=goes_on):
        result = compute(run, work, style, goes_on=goes_on)
    write(run, work, result)
    summary(work, result, run, time.perf_counter() - began)


def _room(run: Run, *, goes_on: bool) -> contextlib.AbstractContextManager[None]:
    """Room where the run's results go."""
    from jacray import runs, url_runs
    from jacray.folders import room

    if run.folder is not None:
        return room(run.folder, goes_on=goes_on)
    if run.spec.output.overwrite:
        with run.naming():
            url_runs.clear(runs.target(run))
    return contextlib.nullcontext()


@contextlib.contextmanager
def _told_how_to_go_on(run: Run) -> Iterator[None]:
    """Whoever stops a run, or is stopped, hears what is finished and what to do next."""
    from jacray import runs
    from jacray.cli.failures import Interrupted
    from jacray.folders import finished

    def left() -> str:
        done = None if run.spec.output.overwrite else finished(runs.target(run))
        if done is None:
            return ""
        return (
            f"{done[0]:,} of {done[1]:,} shards are finished and kept in {run.place}: "
            "run the same command again to go on from there"
        )

    try:
        yield
    except KeyboardInterrupt as stopped:
        raise Interrupted(f"interrupted; {left() or 'nothing was left half-written'}") from stopped
    except Exception as error:
        if kept := left():
            error.add_note(kept)
        raise


def compute(run: Run, work: Work, style: Style = "auto", *, goes_on: bool = False) -> Result:
    """Run the job where the spec says, with its progress on stderr; what is finished of it takes room already."""
    from jacray import runs
    from jacray.client import Client
    from jacray.progress import progress

    cluster = run.spec.cluster
    with run.naming():
        client = Client(
            cluster.address,
            workers=cluster.workers,
            cpus_per_worker=cluster.cpus_per_worker,
            gpus_per_worker=cluster.gpus_per_worker,
            resources=cluster.resources,
            runtime_env=run.runtime_env(),
            shard_timeout=cluster.shard_timeout,
            shard_size=cluster.shard_size,
        )
        with client:
            job = client.submit(
                work.model, work.loaded, request=work.request, to=runs.target(run), on_error=cluster.on_error
            )
            if not goes_on:
                _check_room(run, job.plan.bytes_out)
            runs.begin(run, job.plan)
            with progress(job, style=style):
                return job.result()


def _check_room(run: Run, needed: int) -> None:
    """Refuse a result that the disk cannot hold, while nothing much is computed yet."""
    from jacray_workers.planning.explain import size

    if run.folder is None:
        return
    above = next(p for p in (run.folder, *run.folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(above).free
    if needed > free:
        raise SpecError("output.path", f"must lie where {size(needed)} fit", Plain(f"{size(free)} free"))


def write(run: Run, work: Work, result: Result) -> None:
    """Finish the run; what the disk or the store refuses is told as a mistake in `output.path`."""
    from jacray.runs import save, target
    from jacray.store import writing

    with run.naming():
        if run.folder is None:
            with writing(target(run)):
                save(run, work, result)
            return
        try:
            save(run, work, result)
        except OSError as error:
            raise SpecError("output.path", f"could not be written: {error.strerror}", Plain(run.place)) from error

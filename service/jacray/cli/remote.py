"""What the commands about a service do, behind their arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from jacray_workers.errors import SpecError

if TYPE_CHECKING:
    from jacray.http.remote import RemoteClient
    from jacray.spec import Run


def serve_until_stopped(given: Mapping[str, Any]) -> None:
    """Serve, with the address on standard output once it is listening."""
    from jacray.http.serve import serve
    from jacray.http.settings import make_settings

    settings = make_settings(**{**given, "limits": dict(_limits(given["limits"]))})
    serve(settings, click.echo)


def submit_file(file: str, overrides: Sequence[str], url: str) -> None:
    """Submit what a file describes, and print the job's id."""
    from jacray.spec import read_run

    run = read_run(file, overrides)
    from jacray.work import make

    work = make(run, whole=True)
    with run.naming(), _client(url) as client:
        # Whoever fetches the result gets the file as well, with paths that start from where it lies.
        spec = {"run": run.spec.model_dump(mode="json"), "base": str(run.base.absolute())}
        on_error = run.spec.cluster.on_error
        job = client.submit(
            _model(run, work.model), work.loaded.inputs, request=work.request, on_error=on_error, spec=spec
        )
    click.echo(job.id)


def _model(run: Run, module: Any) -> Any:
    """The spec with its files named from anywhere, where a service can build it; else the module, to be exported."""
    spec = run.spec.model.model_dump(mode="json", exclude_none=True)
    if spec["kind"] not in ("layers", "function", "graph"):
        return module
    for name in ("weights", "path"):
        if isinstance(spec.get(name), str):
            spec[name] = str((run.base / Path(spec[name]).expanduser()).absolute())
    return spec


def show_status(identity: str | None, url: str) -> None:
    """Print how far a job is, or the latest jobs."""
    with _client(url) as client:
        if identity is None:
            for shown in client.jobs():
                click.echo(_line(shown))
            return
        shown = client.job(identity).facts()
    click.echo(_line(shown))
    if shown["problem"] is not None:
        click.echo(shown["problem"]["detail"])


def _line(shown: Mapping[str, Any]) -> str:
    samples = f"{shown['samples_done']:,} of {shown['samples']:,} samples" if shown["planned"] else "not planned yet"
    return f"{shown['id']}  {shown['state']:<9}  {samples}, {shown['elapsed']:.1f} s {shown['method']}".rstrip()


def cancel_job(identity: str, url: str) -> None:
    """End a job soon."""
    with _client(url) as client:
        ended = client.job(identity).cancel()
    click.echo("cancelling" if ended else "it had already ended")


def fetch_job(identity: str, to: str, url: str) -> None:
    """Wait for a job and write its run folder."""
    from jacray.http.fetch import fetch

    with _client(url) as client:
        job = client.job(identity)
        job.wait()
        problem = job.facts()["problem"]
        if problem is not None:
            from jacray.http.problems import error_of

            raise error_of(problem)
        click.echo(fetch(job, client.connections, Path(to)))


def _client(url: str) -> RemoteClient:
    from jacray.http.remote import RemoteClient

    return RemoteClient(url)


def _limits(texts: Iterable[str]) -> Iterable[tuple[str, float]]:
    for text in texts:
        name, _, number = text.partition("=")
        try:
            value = float(number)
        except ValueError:
            raise SpecError("limit", "must be NAME=NUMBER", text) from None
        yield name, int(value) if value.is_integer() else value

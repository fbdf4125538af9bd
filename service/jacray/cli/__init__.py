"""The command `jacray`. Each command is a few lines; what it needs is imported when it runs, so that help is fast."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from jacray.cli.failures import guarded

if TYPE_CHECKING:
    from jacray.progress import Style

_FILE = click.argument("file", type=click.Path(dir_okay=False, path_type=str))
_OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
_DEBUG = click.option("--debug", is_flag=True, help="Show the traceback of a failure.")


def _print_version(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(_version())
        context.exit()


def _version() -> str:
    import jacray

    return f"jacray {jacray.__version__}"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Print it.")
def group() -> None:
    """Batched Jacobians of PyTorch models, in one process or over Ray."""


@group.command()
@_FILE
@_OVERRIDES
@click.option(
    "--progress",
    type=click.Choice(["auto", "bar", "json", "lines", "off"]),
    default="auto",
    help="What to show on standard error: auto is a bar on a terminal, and a line of JSON now and then elsewhere.",
)
@_DEBUG
def run(file: str, overrides: tuple[str, ...], progress: Style, debug: bool) -> None:  # noqa: ARG001
    """Compute what FILE describes and write a run folder.

    KEY=VALUE changes a key of FILE, as in `request.method=reverse output.path=runs/try`.
    """
    from jacray.cli.commands import run_file

    run_file(file, overrides, progress)


@group.command()
@_FILE
@_OVERRIDES
@_DEBUG
def plan(file: str, overrides: tuple[str, ...], debug: bool) -> None:  # noqa: ARG001 - `guarded` looks for it
    """Print how FILE would be computed, with its bytes and cost. Nothing is computed or written."""
    from jacray.cli.commands import plan_file

    click.echo(plan_file(file, overrides))


@group.command()
@_FILE
@_OVERRIDES
@click.option("--to", required=True, type=click.Path(dir_okay=False), help="The graph file, NAME.safetensors.")
@click.option("--trust-pt2", "trust", is_flag=True, help="Read a .pt2 of your own, though that can run code from it.")
@_DEBUG
def export(file: str, overrides: tuple[str, ...], to: str, trust: bool, debug: bool) -> None:  # noqa: ARG001 - as above
    """Write the model of FILE as a graph file, which others can read without running its code.

    The inputs of FILE are the example: every axis but the batch keeps its size. FILE may also be a .pt2 of your own.
    """
    from jacray.cli.exports import export_file

    click.echo(export_file(file, overrides, to, trust=trust))


@group.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen.")
@click.option("--port", default=8765, show_default=True, help="0 takes a free one.")
@click.option(
    "--ray-address",
    "address",
    default="local",
    show_default=True,
    help="Where jobs run: inline, local, auto or ray://HOST:PORT.",
)
@click.option("--workers", default=2, show_default=True, help="Workers for jobs, and processes for small work.")
@click.option("--cpus-per-worker", default=1, show_default=True)
@click.option("--gpus-per-worker", default=0.0, show_default=True)
@click.option("--state", default="runs/service", show_default=True, help="A folder for uploads, jobs and results.")
@click.option("--tokens", type=click.Path(), help="A file of lines NAME TOKEN, readable by you alone.")
@click.option("--tls-cert", type=click.Path(), help="A certificate in PEM.")
@click.option("--tls-key", type=click.Path(), help="Its key.")
@click.option("--proxy", is_flag=True, help="A proxy in front of the service does TLS.")
@click.option("--import-prefix", "import_prefixes", multiple=True, help="A package that models may be imported from.")
@click.option("--data", type=click.Path(), help="A folder whose files specs may name.")
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True,
    help="From which level on lines of JSON go to standard error.",
)  # fmt: skip
@click.option(
    "--limit", "limits", multiple=True, metavar="NAME=NUMBER", help="Change a limit, such as body_bytes=1000000."
)
@_DEBUG
def serve(debug: bool, **given: object) -> None:  # noqa: ARG001 - `guarded` looks for it
    """Serve jobs and small work over HTTP until Ctrl-C or SIGTERM."""
    from jacray.cli.remote import serve_until_stopped

    serve_until_stopped(given)


_URL = click.option(
    "--url", default="http://127.0.0.1:8765", envvar="JACRAY_URL", show_default=True,
    help="The service; JACRAY_URL says it too, JACRAY_TOKEN holds the token, JACRAY_CA names its certificate.",
)  # fmt: skip


@group.command()
@_FILE
@_OVERRIDES
@_URL
@_DEBUG
def submit(file: str, overrides: tuple[str, ...], url: str, debug: bool) -> None:  # noqa: ARG001 - as above
    """Submit what FILE describes to a service, and print the job's ID. `cluster` and `output` are the service's."""
    from jacray.cli.remote import submit_file

    submit_file(file, overrides, url)


@group.command()
@click.argument("job", metavar="[RUN_FOLDER | URL | ID]", required=False)
@click.option("--shards", is_flag=True, help="Of a run folder: list every shard that something has happened to.")
@click.option("--json", "as_json", is_flag=True, help="Of a run folder: as one JSON object a line.")
@_URL
@_DEBUG
def status(job: str | None, shards: bool, as_json: bool, url: str, debug: bool) -> None:  # noqa: ARG001 - as above
    """Print how a run in a folder or behind a URL stands, how far a service's job is, or your latest jobs there."""
    from pathlib import Path

    if job is not None and (Path(job).is_dir() or "://" in job):
        from jacray.cli.standing import show_run

        show_run(job, shards=shards, as_json=as_json)
        return
    from jacray.cli.remote import show_status

    show_status(job, url)


@group.command()
@click.argument("path", metavar="RUN_FOLDER | URL")
@click.option("--repair", is_flag=True, help="Compute again what is lost or damaged.")
@_DEBUG
def verify(path: str, repair: bool, debug: bool) -> int:  # noqa: ARG001 - `guarded` looks for it
    """Read all numbers of a run again and compare them with their checksums. Exits 1 where some are damaged."""
    from jacray.cli.checking import verify_run

    return verify_run(path, repair=repair)


@group.command()
@click.argument("job", metavar="ID")
@click.option("--to", required=True, type=click.Path(), help="A new folder.")
@_URL
@_DEBUG
def fetch(job: str, to: str, url: str, debug: bool) -> None:  # noqa: ARG001 - as above
    """Wait for a job of a service and write its run folder."""
    from jacray.cli.remote import fetch_job

    fetch_job(job, to, url)


@group.command()
@click.argument("job", metavar="ID")
@_URL
@_DEBUG
def cancel(job: str, url: str, debug: bool) -> None:  # noqa: ARG001 - as above
    """End a job of a service soon."""
    from jacray.cli.remote import cancel_job

    cancel_job(job, url)


@group.command()
def schema() -> None:
    """Print the JSON Schema of the YAML, for editors."""
    import json

    from jacray.spec import schema as make

    click.echo(json.dumps(make(), indent=2))


@group.command()
def version() -> None:
    """Print the version."""
    click.echo(_version())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Returns:
        0, or 1 for a user's mistake, 2 for a fault of ours, 130 for Ctrl-C.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    return guarded(lambda: group.main(given, prog_name="jacray", standalone_mode=False), debug="--debug" in given)

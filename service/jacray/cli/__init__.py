"""The command `jacray`. Each command is a few lines; what it needs is imported when it runs, so that help is fast."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from jacray.cli.failures import guarded

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
@_DEBUG
def run(file: str, overrides: tuple[str, ...], debug: bool) -> None:  # noqa: ARG001 - `guarded` looks for it
    """Compute what FILE describes and write a run folder.

    KEY=VALUE changes a key of FILE, as in `request.method=reverse output.path=runs/try`.
    """
    from jacray.cli.commands import run_file

    run_file(file, overrides)


@group.command()
@_FILE
@_OVERRIDES
@_DEBUG
def plan(file: str, overrides: tuple[str, ...], debug: bool) -> None:  # noqa: ARG001 - `guarded` looks for it
    """Print how FILE would be computed, with its bytes and cost. Nothing is computed or written."""
    from jacray.cli.commands import plan_file

    click.echo(plan_file(file, overrides))


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

"""What `jacray verify` does: look through a run's blocks, tell what is damaged, and have it computed again."""

from __future__ import annotations

from collections.abc import Iterator

import click
from jacray_workers.errors import Plain, UserError

from jacray.checking import Findings, check
from jacray.cli.failures import MISTAKE
from jacray.folders import SPEC
from jacray.store import Damage
from jacray.target import as_target

_MOST = 20


def verify_run(path: str, *, repair: bool) -> int:
    """Look through a run, and print what was found.

    Args:
        path: the run's folder, or a URL.
        repair: compute again what is damaged or missing, where the run has a spec.

    Returns:
        0 where all is as it was written, or is again; else 1.

    Raises:
        UserError: there is no run, or none that can be repaired from here.
    """
    found = check(as_target(path))
    for line in _told(found, path):
        click.echo(line)
    if not found.damages:
        return 0
    if not repair:
        click.echo(f"`jacray verify {path} --repair` computes these again, and so does the run's own command")
        return MISTAKE
    _compute_again(path)
    left = check(as_target(path))
    for line in _told(left, path):
        click.echo(line)
    return MISTAKE if left.damages else 0


def _told(found: Findings, path: str) -> Iterator[str]:
    finished = f"{found.seen:,} of {found.shards:,} shards are finished"
    if not found.damages:
        yield f"{path}: {finished}, and hold what was written"
        return
    yield f"{path}: {finished}; {len(found.damages):,} blocks are lost or damaged:"
    yield from map(_line, found.damages[:_MOST])
    if len(found.damages) > _MOST:
        yield f"  and {len(found.damages) - _MOST:,} more"


def _line(damage: Damage) -> str:
    where = "the whole array" if damage.start < 0 else f"samples {damage.start} to {damage.stop - 1}"
    return f"  {damage.key}, {where}: {'lost' if damage.lost else 'damaged'} ({' '.join(damage.reason.split())})"


def _compute_again(path: str) -> None:
    """The run's own command, which skips all shards that are intact."""
    from jacray.cli.commands import run_file

    target = as_target(path)
    if SPEC not in target.names():
        rule, way_out = "must hold spec.yaml to be repaired from here", "submit the same job again, with the same `to`"
        raise UserError("path", rule, Plain(path), way_out)
    # The folder may have been moved since.
    run_file(f"{path.rstrip('/')}/{SPEC}", [f"output.path={path}"])

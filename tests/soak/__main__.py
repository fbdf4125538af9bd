"""`python -m tests.soak [--minutes 20] [--clients 32] [--address inline|local]`: exits 1 if anything was amiss."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import click

from tests.soak.run import Report, soak
from tests.soak.watch import GROWTH, ROOM

MIB = 1 << 20


def show(report: Report) -> None:
    """Print what came of it."""
    total = sum(report.done.values())
    click.echo(f"{total:,} deeds in {report.seconds / 60:.1f} min ({total / report.seconds:.1f} a second)")
    for name, count in report.done.most_common():
        click.echo(f"  {name:<20} {count:>8,}")
    click.echo(
        f"own memory of each process, MiB (may grow by {100 * GROWTH:.0f} % or {ROOM // MIB} MiB, whichever is more):"
    )
    for seen in report.processes:
        before, after = (part / MIB for part in seen.growth())
        files = f"{seen.part(0.25, 0.5, seen.files):.0f} -> {seen.part(0.75, 1, seen.files):.0f} descriptors"
        threads = f"{seen.part(0.25, 0.5, seen.threads):.0f} -> {seen.part(0.75, 1, seen.threads):.0f} threads"
        verdict = "flat" if seen.flat() else "GREW"
        click.echo(f"  {seen.name:<44} {before:7.1f} -> {after:7.1f}  {files}, {threads}: {verdict}")
    for name, found in (("errors", report.errors), ("left behind", report.left)):
        click.echo(f"{name}: {len(found) or 'none'}")
        for line in found:
            click.echo(f"  {line}")
    click.echo("passed" if report.passed else "FAILED")


def main() -> int:
    """Read the arguments, soak, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--address", choices=["inline", "local"], default="inline", help="where the jobs run")
    parser.add_argument("--pause", type=float, default=0.2, help="mean seconds that a client rests between deeds")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="jacray-soak-"))
    try:
        report = soak(
            folder,
            minutes=given.minutes,
            clients=given.clients,
            address=given.address,
            pause=given.pause,
            seed=given.seed,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    show(report)
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())

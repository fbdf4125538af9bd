"""The short table at the end of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from jacray.folders import REPORT, RESULTS
from jacray.result import Result
from jacray.spec import Run
from jacray.work import Work

_MOST_ARRAYS = 12
_WIDE = 200  # where there is no terminal, nothing should be broken into lines


def summary(work: Work, result: Result, run: Run, seconds: float) -> None:
    """Print what was computed, how, how well it was checked, and where it lies."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, text in _rows(work, result, run, seconds):
        table.add_row(name, text)
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(width=_WIDE, highlight=False)
    with console.capture() as printed:
        console.print(table, markup=False)
    click.echo("\n".join(line.rstrip() for line in printed.get().splitlines()))


def _rows(work: Work, result: Result, run: Run, seconds: float) -> Iterator[tuple[str, str]]:
    plan, receipt = result.plan, result.receipt
    wrt = ", ".join(w if isinstance(w, str) else w.key for w in work.request.wrt_list)
    yield "computed", f"{', '.join(result.names)} wrt {wrt} at {plan.samples:,} samples"
    for array in plan.arrays[:_MOST_ARRAYS]:
        yield f"  {array.key}", f"{array.shape} {array.dtype}{' in factors' if array.factored else ''}"
    if len(plan.arrays) > _MOST_ARRAYS:
        yield "", f"and {len(plan.arrays) - _MOST_ARRAYS} more arrays"
    yield "method", f"{plan.method}: {plan.reason}"
    yield "speed", _speed(receipt, seconds)
    if receipt.get("shards_kept"):
        yield "kept", f"{receipt['shards_kept']:,} of {plan.shard_count:,} shards were finished before and are kept"
    yield "check", _check(receipt)
    for gap in receipt.get("skipped", ())[:_MOST_ARRAYS]:
        yield "skipped", f"samples {gap['start']} to {gap['stop'] - 1} are NaN: {gap['error']}"
    if receipt["nonfinite"]:
        yield "warning", "; ".join(map(_bad, receipt["nonfinite"]))
    yield "results", f"{run.place}/{RESULTS}"
    if run.spec.output.report:
        yield "report", f"{run.place}/{REPORT}"


def _speed(receipt: Any, seconds: float) -> str:
    rate = receipt["samples_per_second"]
    computing = receipt["seconds"].get("compute", 0.0)
    return f"{rate:,.0f} samples per second ({computing:.2f} s of computing, {seconds:.1f} s in all)"


def _check(receipt: Any) -> str:
    verified = receipt["verified"]
    if not verified["checks"]:
        return "none: request.verify is off"
    worst = max(verified["details"], key=lambda check: float(check["error"]) / (float(check["tolerance"]) or 1.0))
    outcome = "passed" if verified["passed"] else "FAILED"
    return (
        f"{verified['checks']} {outcome}; the largest relative error is {float(worst['error']):.1e}"
        f" of {float(worst['tolerance']):.1e} allowed ({worst['what']})"
    )


def _bad(found: Any) -> str:
    where = f", first at sample {found['first']:,}" if found["first"] >= 0 else ""
    return f"{found['key']} holds {found['count']:,} non-finite numbers{where}"

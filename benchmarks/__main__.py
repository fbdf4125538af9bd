"""`python -m benchmarks`: every row of the table, each in a process of its own, merged into RESULTS.md."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import table
from benchmarks.page import page
from benchmarks.works import WORKS, Work

HERE = Path(__file__).parent
# Huge pages for torch's allocator, and for the C library's, which JAX and numpy use.
TUNED = {"THP_MEM_ALLOC_ENABLE": "1", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
# What a process needs to start at all; nothing here tunes anything.
PLAIN = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV", "SYSTEMROOT", "LD_LIBRARY_PATH")
BUDGET, QUICK = 10.0, 1.5  # seconds of timing per row
TRIALS = 4.0  # seconds of timing per row for our own methods, for the regret


def environment(threads: int, *, bare: bool) -> dict[str, str]:
    """A child's variables: the caller's own without anything that tunes, and huge pages and threads unless bare."""
    kept = {name: os.environ[name] for name in PLAIN if name in os.environ}
    return kept if bare else {**kept, **TUNED, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def run_child(work: Work, options: argparse.Namespace) -> dict[str, Any]:
    """One row, measured in a fresh process.

    Raises:
        RuntimeError: the process failed; its last words are in the text.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        command = [sys.executable, "-m", "benchmarks.child", work.name, str(out), "--threads", str(options.threads)]
        command += ["--quick"] if options.quick else []
        command += ["--no-regret"] if options.no_regret else []
        command += ["--peers", options.peers] if options.peers is not None else []
        done = subprocess.run(  # noqa: S603 - our own module, by our own interpreter
            command, env=environment(options.threads, bare=work.bare), cwd=HERE.parent, text=True, check=False,
            stderr=None if options.verbose else subprocess.PIPE,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{work.name} failed:\n{(done.stderr or '').strip()[-2000:]}")
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def selected(names: str) -> list[Work]:
    """The works whose short name or title contains one of these, separated by commas; all where none is given."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = {work.name for work in WORKS}
    exact = [name for name in wanted if name in known]
    return [
        w for w in WORKS
        if not wanted or w.name in exact or any(n not in exact and n in f"{w.name} {w.shown}" for n in wanted)
    ]  # fmt: skip


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", default="", help="short names of rows, or parts of them, separated by commas")
    parser.add_argument("--peers", help="only these peers: parts of their names, separated by commas")
    parser.add_argument("--quick", action="store_true", help="short timings: a look, not a measurement")
    parser.add_argument("--no-regret", action="store_true", help="leave out our own methods one by one")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="for every side; all cores by default")
    parser.add_argument("--json", type=Path, help="also write the measurements as JSON here")
    parser.add_argument(
        "--merge", type=Path, action="append", default=[], help="rows measured before, as JSON; the new ones win"
    )
    parser.add_argument("--out", type=Path, help="the page; benchmarks/RESULTS.md for a whole run, else nothing")
    parser.add_argument("--page-only", action="store_true", help="measure nothing: write the page of the merged rows")
    parser.add_argument("--verbose", action="store_true", help="say what is being done")
    parser.add_argument("--list", action="store_true", help="only list the rows")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print as it goes, write the page. 1 where a row could not be measured."""
    options = parse(arguments)
    works = [] if options.page_only else selected(options.only)
    if options.list or not (works or options.page_only):
        print("\n".join(f"{work.name:<14} {work.shown}" for work in WORKS))
        return 0 if options.list else 1
    rows = {row["work"]: row for path in options.merge for row in json.loads(path.read_text())}
    failed = []
    for work in works:
        try:
            row = run_child(work, options)
        except RuntimeError as error:
            failed.append(work.name)
            print(error, file=sys.stderr)
            continue
        rows[work.name] = row
        print(table.line(row), flush=True)
        if options.json:
            options.json.write_text(json.dumps(list(rows.values())))
    ordered = [rows[work.name] for work in WORKS if work.name in rows]
    whole = not options.quick and options.peers is None and len(ordered) == len(WORKS)
    out = options.out or (HERE / "RESULTS.md" if whole else None)
    if ordered and out:
        out.write_text(page(ordered))
        print(f"written: {out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

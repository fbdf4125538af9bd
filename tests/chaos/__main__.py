"""Every fault, many times, counted: `python -m tests.chaos [--seeds 20] [--shards 200] [--only NAME] [--first 0]`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jacray
from rich.console import Console
from rich.table import Table

from tests.chaos import faults, nodes
from tests.chaos.ground import Ground, Verdict, orphans

Fault = Callable[[Ground, int], Verdict]


def all_faults(client: jacray.Client) -> dict[str, Fault]:
    """By name; those that kill the coordinator's process compute without Ray, the last ones with one of their own."""
    on_workers = [
        faults.workers_killed, faults.workers_die, faults.worker_hangs, faults.memory_runs_out, faults.poisoned,
        faults.cancelled, faults.cancelled_in_a_call, faults.scaled, faults.store_read_only,
    ]  # fmt: skip

    def with_client(fault: Callable[[Ground, jacray.Client, int], Verdict]) -> Fault:
        return lambda ground, seed: fault(ground, client, seed)

    found: dict[str, Fault] = {fault.__name__: with_client(fault) for fault in on_workers}
    found |= {
        "coordinator_killed": faults.coordinator_killed,
        "coordinator_killed_at_url": lambda ground, seed: faults.coordinator_killed(_other(ground, far=True), seed),
        "coordinator_killed_with_ray": lambda ground, seed: faults.coordinator_killed(
            _other(ground, address="local"), seed, times=1
        ),
        "block_truncated": faults.block_truncated,
        "interrupted_once": faults.interrupted,
        "interrupted_twice": functools.partial(faults.interrupted, times=2),
        "disk_full": faults.disk_full,
        "disk_read_only": faults.disk_read_only,
    }
    return found


def _other(ground: Ground, **changes: Any) -> Ground:
    return dataclasses.replace(ground, began=time.monotonic(), **changes)


def rows(seeds: Sequence[int], shards: int, only: str | None) -> Iterator[tuple[str, list[Verdict]]]:
    """Each fault's verdicts."""
    folder = Path(tempfile.mkdtemp(prefix="jacray-chaos-"))
    mounts = faults.can_mount(folder / "probe")
    try:
        with jacray.Client("local", workers=2, shard_size=4, shard_timeout=10) as client:
            for name, fault in all_faults(client).items():
                if only in (None, name) and (mounts or not name.startswith(("disk", "store"))):
                    yield name, [fault(Ground(folder / f"{name}-{seed}", shards), seed) for seed in seeds]
        yield "afterwards", [Verdict(0, 0, 0, 0.0, tuple(orphans()))]
        if only in (None, "node_killed"):
            # The first one leaves this process's Ray before a cluster of several nodes is made. Long enough for the
            # late node to come.
            longer = max(shards, 100)
            yield (
                "node_killed",
                [nodes.node_killed(Ground(folder / f"node-{seed}", longer, 0.05), seed) for seed in seeds[:2]],
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """Print the table; 1 where something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--shards", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="the first seed: many seeds can be tried in pieces")
    parser.add_argument("--only")
    given = parser.parse_args()
    table = Table("fault", "runs", "injected", "retries", "kept", "seconds", "wrong")
    wrong = 0
    for name, verdicts in rows(range(given.first, given.first + given.seeds), given.shards, given.only):
        found = [fault for verdict in verdicts for fault in verdict.faults]
        wrong += len(found)
        counts = [
            len(verdicts), *(sum(getattr(v, what) for v in verdicts) for what in ("injected", "retries", "kept"))
        ]  # fmt: skip
        table.add_row(name, *map(str, counts), f"{sum(v.seconds for v in verdicts):.0f}", "; ".join(found) or "nothing")
        print(f"{name}: {len(verdicts)} runs, {found or 'nothing wrong'}", file=sys.stderr, flush=True)  # noqa: T201
    Console().print(table)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

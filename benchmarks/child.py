"""`python -m benchmarks.child WORK OUT`: one row in this process, as JSON. `python -m benchmarks` starts it."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.__main__ import BUDGET, QUICK, TRIALS
from benchmarks.works import Work, find

REGRET_ROUNDS = (3, 40)


def bind(threads: int) -> None:
    """Keep this process to as many cores as it has threads: JAX sizes its pool by them. Before anything is loaded."""
    with contextlib.suppress(AttributeError, OSError):
        allowed = sorted(os.sched_getaffinity(0))
        if threads < len(allowed):
            os.sched_setaffinity(0, allowed[:threads])


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work")
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--no-regret", action="store_true")
    parser.add_argument("--peers")
    options = parser.parse_args()
    bind(options.threads)
    row = measured(find(options.work), options)
    options.out.write_text(json.dumps(row))


def measured(work: Work, options: argparse.Namespace) -> dict[str, Any]:
    """The row, with the planner's regret unless it was not asked for."""
    import jacray
    import torch

    from benchmarks.measure import measure
    from benchmarks.sides import everybody
    from benchmarks.sides.ours import OURS

    began = time.perf_counter()

    def log(text: str) -> None:
        print(f"{time.perf_counter() - began:7.1f} s  {text}", file=sys.stderr, flush=True)

    jacray.compute  # noqa: B018 - loads what a first call would
    torch.set_num_threads(options.threads)
    budget = QUICK if options.quick else BUDGET
    rates = 0.3 if options.quick else 1.0
    asked = [side for side in everybody(options.peers) if work.peers is None or side.name in work.peers]
    row = measure(
        work,
        OURS,
        asked,
        budget=budget,
        rates=rates,
        log=log,
        rounds=(3, 400) if options.quick else (7, 400),
    )
    if not options.no_regret and not work.bare:
        row["regret"] = regret(work, TRIALS if not options.quick else QUICK, row["sides"]["jacray"]["median"])
        log("regret")
    return row


def regret(work: Work, budget: float, one: float) -> dict[str, Any]:
    """The planner's choice against our best method, by `benchmarks.regret`; `one` is the seconds of one call."""
    measure_regret: Callable[..., Any] = importlib.import_module("benchmarks.regret").measure
    # Some methods are slower than the chosen one, and about half of the five take part.
    rounds = int(max(REGRET_ROUNDS[0], min(REGRET_ROUNDS[1], budget / (5 * one))))
    chosen, medians, out = measure_regret(work.case, rounds)
    best = min(medians, key=medians.__getitem__)
    ratio = medians[chosen] / medians[best]
    return {"chosen": chosen, "best": best, "ratio": ratio, "medians": medians, "priced_out": out}


if __name__ == "__main__":
    main()

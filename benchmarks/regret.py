"""How much slower the planner's choice is than the best of our own methods, on every net: `make regret`.

Each method computes the whole batch in the same process under the same threads; after one call to warm up, calls
alternate between the methods and the median of each is taken. A method that takes far longer than the best is measured
once, and one that is priced still further behind is left out and named. Answers are compared in the table's rows.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from typing import Any

import jacray
import torch

from benchmarks.nets import CASES, Case
from benchmarks.works import PRICED_OUT

METHODS = ("layerwise", "chain", "reverse", "forward", "backward_loop")
# A first call slower than the best one so far by this much is not repeated.
HOPELESS = 10.0


def seconds(case: Case, model: Any, x: Any, method: str) -> float:
    """One call."""
    began = time.perf_counter()
    jacray.compute(model, x, returns=[case.returns], method=method, **case.request)
    return time.perf_counter() - began


def measure(case: Case, repeats: int) -> tuple[str, dict[str, float], dict[str, float]]:
    """The planner's method, the median seconds of each method that serves, and the price of those left out.

    A price is how many times the best price it is.
    """
    torch.manual_seed(0)
    model, x = case.make()
    model.eval()
    chosen = jacray.plan(model, x, returns=[case.returns], **case.request)
    slow = {c.method: c.seconds for c in chosen.candidates if not c.refused}
    best = min(slow.values())
    out = {method: price / best for method, price in slow.items() if price > PRICED_OUT * best}
    able = {}
    for method in METHODS:
        if method not in slow or method in out:
            continue
        try:
            able[method] = [seconds(case, model, x, method), seconds(case, model, x, method)][1:]
        except jacray.UserError:
            continue
    quick = [m for m in able if able[m][0] <= HOPELESS * min(t[0] for t in able.values())]
    for _ in range(repeats):
        for method in quick:
            able[method].append(seconds(case, model, x, method))
    return chosen.method, {method: statistics.median(times) for method, times in able.items()}, out


def main() -> None:
    """Print a table, a row per net."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'chosen':<14} {'best':<14} {'regret':>7}  net; milliseconds by method")
    worst = 1.0
    for case in CASES:
        if options.only not in case.name:
            continue
        chosen, found, out = measure(case, options.repeats)
        best = min(found, key=lambda method: found[method])
        regret = found[chosen] / found[best]
        worst = max(worst, regret)
        times = [f"{m} {1e3 * t:.2f}" for m, t in sorted(found.items(), key=lambda item: item[1])]
        times += [f"{m} left out, priced {price:.0f}x" for m, price in out.items()]
        print(f"{chosen:<14} {best:<14} {regret:>6.2f}x  {case.name}; {', '.join(times)}", flush=True)
    print(f"largest regret {worst:.2f}x")


if __name__ == "__main__":
    main()

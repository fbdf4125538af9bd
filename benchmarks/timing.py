"""Time several ways of doing one thing, turn by turn, so that a busy moment of the machine meets them all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# A way whose call is this much slower than the fastest takes part in few rounds: its median needs no more, and the
# contest is between the others.
FAR = 8.0
FAR_SHARE = 0.4  # of the budget
FEW = 9
WARM, WARM_CALLS = 0.2, 10  # seconds and calls


@dataclass(frozen=True)
class Times:
    """Seconds per call.

    Attributes:
        first: the very first call, with whatever it prepares.
        calls: the later ones, in order.
    """

    first: float
    calls: tuple[float, ...]

    @property
    def median(self) -> float:
        """Half of the calls were faster."""
        return statistics.median(self.calls)

    @property
    def minimum(self) -> float:
        """The fastest call."""
        return min(self.calls)

    @property
    def quartiles(self) -> tuple[float, float]:
        """A quarter of the calls were faster, three quarters were."""
        if len(self.calls) < 2:
            return self.calls[0], self.calls[0]
        low, _, high = statistics.quantiles(self.calls, n=4, method="inclusive")
        return low, high


def timed(call: Callable[[], Any], settle: Callable[[], Any] = lambda: None) -> float:
    """One call; its result is dropped after the clock has stopped. `settle` waits for work that a call left running."""
    began = time.perf_counter()
    result = call()
    settle()
    seconds = time.perf_counter() - began
    del result
    return seconds


def interleaved(
    ways: Mapping[str, Callable[[], Any]],
    budget: float,
    firsts: Mapping[str, float],
    settle: Callable[[], Any] = lambda: None,
    rounds: tuple[int, int] = (5, 400),
) -> dict[str, Times]:
    """Seconds of every way, each called once per round.

    Args:
        ways: what to call, by name.
        budget: about how many seconds to spend.
        firsts: the seconds of each way's very first call, made before.
        settle: waits for what a call left running.
        rounds: the fewest and the most rounds.
    """
    warm = {name: warmed(call, settle) for name, call in ways.items()}
    fastest = min(warm.values())
    near = [name for name in ways if warm[name] <= FAR * fastest]
    far = [name for name in ways if name not in near]
    few = _fitting(FAR_SHARE * budget, [warm[name] for name in far], (0, FEW)) if far else 0
    left = budget - few * sum(warm[name] for name in far)
    count = max(few, _fitting(left, [warm[name] for name in near], rounds))
    found: dict[str, list[float]] = {name: [warm[name]] if name in far else [] for name in ways}
    seldom = {round(i * count / few) for i in range(few)} if few else set()
    for turn in range(count):
        order = [*near, *far] if turn in seldom else near
        # Another starts each round: what follows a large call meets its caches.
        for name in (*order[turn % len(order) :], *order[: turn % len(order)]):
            found[name].append(timed(ways[name], settle))
    return {name: Times(firsts[name], tuple(calls)) for name, calls in found.items()}


def warmed(call: Callable[[], Any], settle: Callable[[], Any]) -> float:
    """The shortest of a few calls: the second and third still meet cold caches, allocators and sleeping threads."""
    shortest, spent, count = float("inf"), 0.0, 0
    while count < 1 or (spent < WARM and count < WARM_CALLS):
        seconds = timed(call, settle)
        shortest, spent, count = min(shortest, seconds), spent + seconds, count + 1
    return shortest


def _fitting(budget: float, each: list[float], bounds: tuple[int, int]) -> int:
    return max(bounds[0], min(bounds[1], int(budget / sum(each))))

"""What a row's measurements say: ours, the best peer, the ratio, the limit, and whether a promise holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.works import BEST

Row = Mapping[str, Any]
OURS = "jacray"


def seconds(value: float) -> str:
    """A time with three figures and its unit."""
    for scale, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if value * scale >= 1 or unit == "us":
            return f"{value * scale:.3g} {unit}" if value * scale < 1000 else f"{value * scale:.0f} {unit}"
    return f"{value:.3g} s"


def size(value: float | None) -> str:
    """Bytes with three figures and their unit."""
    if value is None:
        return "?"
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"


def times(value: float | None) -> str:
    """A ratio."""
    if value is None:
        return ""
    return f"{value:.0f}x" if value >= 100 else f"{value:.3g}x"


def best_peer(row: Row) -> str | None:
    """The fastest side that is not ours, by its median; None where no peer did the work."""
    timed = {n: s["median"] for n, s in row["sides"].items() if n != OURS and "median" in s}
    return min(timed, key=timed.__getitem__) if timed else None


def limit(row: Row) -> float | None:
    """The fewest seconds that the machine's measured rates allow; None where they were not measured."""
    rates, least = row["rates"], row["least"]
    if not rates:
        return None
    return max(least["operations"] / rates["operations_per_second"], least["bytes"] / rates["bytes_per_second"])


def verdict(row: Row) -> dict[str, Any]:
    """What was promised, what came of it, and whether it holds, by medians."""
    target, sides = row["target"], row["sides"]
    ours, peer, least = sides[OURS], best_peer(row), limit(row)
    against = peer if target["against"] == BEST else target["against"]
    other = sides.get(against or "", {})
    ratio = other["median"] / ours["median"] if "median" in other else None
    by_minimum = other["minimum"] / ours["minimum"] if "median" in other else None
    fewer = row["dense_bytes"] / max(ours["bytes_out"], 1)
    to_limit = ours["median"] / least if least else None
    promised = [
        (target["speed"], ratio, lambda found, asked: found >= asked),
        (target["limit"], to_limit, lambda found, asked: found <= asked),
        (target["bytes"], fewer, lambda found, asked: found >= asked),
        (target["seconds"], ours["median"], lambda found, asked: found <= asked),
    ]
    kept = [found is not None and holds(found, asked) for asked, found, holds in promised if asked is not None]
    return {
        "against": against, "ratio": ratio, "by_minimum": by_minimum, "to_limit": to_limit, "limit": least,
        "fewer_bytes": fewer, "met": all(kept) if kept else None,
    }  # fmt: skip


def promise(target: Mapping[str, Any]) -> str:
    """A target in words."""
    parts = []
    if target["speed"] is not None:
        fast = target["speed"]
        parts.append(
            f"{times(fast)} {target['against']}" if fast >= 1 else f"within {times(1 / fast)} of {target['against']}"
        )
    if target["limit"] is not None:
        parts.append(f"within {times(target['limit'])} of the limit")
    if target["bytes"] is not None:
        parts.append(f"{times(target['bytes'])} fewer bytes")
    if target["seconds"] is not None:
        parts.append(f"at most {seconds(target['seconds'])}")
    return ", ".join(parts) or "none"


def spread(side: Mapping[str, Any]) -> str:
    """A median with its minimum and quartiles."""
    if "median" not in side:
        return side.get("cannot") or side.get("wrong") or side.get("failed") or "not measured"
    return f"{seconds(side['median'])} ({seconds(side['minimum'])}; {seconds(side['low'])} to {seconds(side['high'])})"


def line(row: Row) -> str:
    """A row in one line, for the terminal."""
    found, ours, peer = verdict(row), row["sides"][OURS], best_peer(row)
    other = f"{peer} {seconds(row['sides'][peer]['median'])}" if peer else "no peer"
    met = {True: "met", False: "NOT MET", None: ""}[found["met"]]
    parts = [
        f"{row['work']:<12} jacray {seconds(ours['median'])}", other,
        f"{times(found['ratio'])} over {found['against']}" if found["ratio"] is not None else "",
        f"{times(found['to_limit'])} of the limit" if found["to_limit"] else "",
        f"regret {times(row['regret']['ratio'])}" if row.get("regret") else "", met,
    ]  # fmt: skip
    return "; ".join(part for part in parts if part)

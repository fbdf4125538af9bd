"""The page `RESULTS.md` from the measured rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from benchmarks.table import OURS, Row, best_peer, promise, seconds, size, spread, times, verdict
from benchmarks.works import PRICED_OUT, REGRET


def page(rows: Sequence[Row], about: str = "") -> str:
    """The whole page."""
    return "\n".join([*_head(rows, about), *summary(rows), *_regrets(rows), *details(rows), ""])


def _head(rows: Sequence[Row], about: str) -> list[str]:
    machine = rows[0]["machine"]
    versions = ", ".join(f"{n} {v}" for n, v in machine["versions"].items())
    lines = [
        "# Results",
        "",
        about or "Written by `make bench` (`python -m benchmarks`); do not edit.",
        "",
        (f"{machine['date']}; {machine['processor']}, {machine['cores']} cores, {size(machine['memory_bytes'])}, "
        f"{machine['system']}, transparent huge pages: {machine['huge_pages']}; {machine['threads']} threads for every "
        f"side; Python {machine['python']}; {versions}."),
        "",
        (f"One-minute load when each row ended: {_range(r['machine']['load'] for r in rows)} (above the thread count "
        "means that something else was running)."),
        "",
        ("Every row ran in its own process, all sides in that one, turn by turn, each on its own copy of the model. "
        "Before anything was timed our answer was compared with float64 autograd and every peer's with ours (1e-4 of "
        "the largest entry); what disagreed was not timed. Environment of every row but the marked one: "
        f"`{_settings(rows)}`: torch and the C library (JAX, numpy) then ask for huge pages, for everybody alike."),
        "",
    ]  # fmt: skip
    rates = [r["rates"] for r in rows if r["rates"]]
    if rates:
        lines += [
            ("The limit is the larger of operations over the best measured matrix rate "
            f"({_rate(rates, 'operations_per_second', 1e9)} Gflop/s, float32 products of 2048 x 2048) and bytes over "
            f"the best measured write rate ({_rate(rates, 'bytes_per_second', 1e9)} GB/s, torch's fill of 512 MiB "
            "already mapped; a fresh result's memory takes "
            f"{_rate(rates, 'fresh_bytes_per_second', 1e9)} GB/s), both measured in the row's own process. How the "
            "operations are counted stands in `benchmarks/limits.py`."),
            "",
        ]  # fmt: skip
    return lines


def _settings(rows: Sequence[Row]) -> str:
    every = [r["machine"]["settings"] for r in rows if r["machine"]["settings"]]
    return " ".join(f"{n}={v}" for n, v in every[0].items()) if every else "nothing set"


def _range(values: Iterable[float]) -> str:
    found = list(values)
    low, high = f"{min(found):.3g}", f"{max(found):.3g}"
    return low if low == high else f"{low} to {high}"


def _rate(rates: Sequence[Mapping[str, float]], name: str, unit: float) -> str:
    return _range(r[name] / unit for r in rates)


def summary(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| work | ours | best peer | ratio | promised | limit, ours over it | bytes out | peak memory | met |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        found, ours = verdict(row), row["sides"][OURS]
        peer = best_peer(row)
        other = row["sides"][peer] if peer else {}
        shown = f"{seconds(other['median'])} {peer}" if peer else "none can"
        ratio = times(found["ratio"])
        if found["against"] and found["against"] != peer and found["ratio"] is not None:
            ratio += f" over {found['against']} ({times(other['median'] / ours['median'])} over the best)"
        bound = f"{seconds(found['limit'])}, {times(found['to_limit'])}" if found["limit"] else ""
        bytes_out = size(ours["bytes_out"])
        if found["fewer_bytes"] > 1.5 and row["target"]["bytes"]:
            bytes_out += f" ({times(found['fewer_bytes'])} fewer than dense)"
        met = {True: "yes", False: "**no**", None: ""}[found["met"]]
        peaks = (
            f"{size(ours.get('peak_bytes'))}, peer {size(other.get('peak_bytes'))}"
            if peer
            else size(ours["peak_bytes"])
        )
        lines.append(
            f"| {row['title']} | {seconds(ours['median'])} | {shown} | {ratio} | {promise(row['target'])} | {bound} "
            f"| {bytes_out} | {peaks} | {met} |"
        )
    return [*lines, ""]


def _regrets(rows: Sequence[Row]) -> list[str]:
    found = [row for row in rows if row.get("regret")]
    if not found:
        return []
    worst = max(found, key=lambda row: row["regret"]["ratio"])
    met = "yes" if worst["regret"]["ratio"] <= REGRET else "**no**"
    lines = [
        "## The planner's regret",
        "",
        (
            f"The chosen method's time over the best own method's: at most {times(worst['regret']['ratio'])} "
            f"({worst['title']}); promised at most {times(REGRET)}; met: {met}."
        ),
        "",
        f"A method priced at more than {PRICED_OUT:.0f} times the best is not run; the last column has its price.",
        "",
        "| work | chosen | best | regret | medians by method | priced out |",
        "|---|---|---|---|---|---|",
    ]
    for row in found:
        regret = row["regret"]
        medians = ", ".join(f"{n} {seconds(t)}" for n, t in sorted(regret["medians"].items(), key=lambda p: p[1]))
        out = ", ".join(f"{n} {price:.0f}x" for n, price in regret.get("priced_out", {}).items())
        shown = f"{regret['chosen']} | {regret['best']} | {times(regret['ratio'])} | {medians} | {out}"
        lines.append(f"| {row['title']} | {shown} |")
    return [*lines, ""]


def details(rows: Sequence[Row]) -> list[str]:
    lines = ["## Every side", "", "Times are medians (minimum; quartiles).", ""]
    for row in rows:
        lines += [f"### {row['title']}", "", "| side | time | first call | peak memory | bytes out | error | calls |"]
        lines.append("|---|---|---|---|---|---|---|")
        sides = sorted(row["sides"].items(), key=lambda item: (item[0] != OURS, item[1].get("median", 1e9)))
        for name, side in sides:
            if "median" not in side:
                kind = next((k for k in ("cannot", "wrong", "failed") if k in side), "not measured")
                text = f"{kind}: {side.get(kind, '')}".replace("|", "\\|")
                lines.append(f"| {name} | {text} | | | | | |")
                continue
            lines.append(
                f"| {name} | {spread(side)} | {seconds(side['first'])} | {size(side.get('peak_bytes'))} "
                f"| {size(side['bytes_out'])} | {side['error']:.0e} | {side['calls']} |"
            )
        found = verdict(row)
        if found["by_minimum"] is not None:
            by_median, by_minimum = times(found["ratio"]), times(found["by_minimum"])
            lines += ["", f"Ratio over {found['against']}: {by_median} by medians, {by_minimum} by minima."]
        lines.append("")
    return lines

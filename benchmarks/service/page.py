"""The page `SERVICE.md` from what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.service.ours import CLIENTS, DEPTHS, GENERATORS, PROBES
from benchmarks.table import seconds, size, times

GRADIENT, RESULT, HEALTH = 2.5e-3, 0.400, 0.050  # seconds at most
JACOBIANS, GAIN = 20.0, 8.0  # times at least
DISTURBED = 1.1  # what "do not disturb" is taken to mean: the job's time under load over its time alone
KEPT_UP = 0.95  # of the rate that was asked for


def row(work: str, measured: str, peer: str = "", promised: str = "", met: bool | None = None) -> str:
    """A line of the table."""
    shown = {True: "yes", False: "**no**", None: ""}[met]
    return f"| {work} | {measured} | {peer} | {promised} | {shown} |"


def percentile(values: Sequence[float], share: float) -> float:
    """The value that this share of them does not exceed."""
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


def spread(values: Sequence[float]) -> str:
    """A median of times, its quartiles and the 99th percentile where there are enough to speak of one."""
    low, high = (seconds(percentile(values, share)) for share in (0.25, 0.75))
    last = f"p99 {seconds(percentile(values, 0.99))}" if len(values) >= 100 else f"most {seconds(max(values))}"
    return f"{seconds(statistics.median(values))} ({low} to {high}; {last}; {len(values)} calls)"


def within(values: Sequence[float], shown: Any = lambda value: f"{value:.4g}") -> str:
    """A median of few values and their range."""
    return f"{shown(statistics.median(values))} ({shown(min(values))} to {shown(max(values))})"


def page(found: Mapping[str, Any]) -> str:
    """The whole page."""
    lines = ["# The service's figures", "", *_head(found)]
    lines += ["| work | ours: median (spread) | peer | promised | met |", "|---|---|---|---|---|"]
    lines += [*_latency(found), *_batching(found), *_health(found), *_job(found)]
    return "\n".join([*lines, "", *_notes(), ""])


def _head(found: Mapping[str, Any]) -> list[str]:
    machine = found["machine"]
    peers = [f"{p['package']} {p['version']}" if "version" in p else p["absent"] for p in found["peers"].values()]
    versions = ", ".join([*(f"{n} {v}" for n, v in machine["versions"].items()), *dict.fromkeys(peers)])
    return [
        "Written by `make bench-service` (`python -m benchmarks.service`); do not edit.",
        "",
        (f"{machine['date']}; {machine['processor']}, {machine['cores']} cores, {size(machine['memory_bytes'])}, "
         f"{machine['system']}; Python {machine['python']}; {versions}. One-minute load when it began: "
         f"{found['load']:.2g}."),
        "",
        ("Everything on loopback: server, compute processes, clients, load and probes share these cores. One thread "
         "for every process. The time of a call is the client's, from its arguments to its numbers."),
        "",
    ]  # fmt: skip


def _latency(found: Mapping[str, Any]) -> list[str]:
    ours = found["latency"]
    tesseract, umbridge = (found["peers"][name].get("times") for name in ("tesseract", "umbridge"))
    half = {name: statistics.median(values) for name, values in ours.items()}
    ratio = statistics.median(tesseract["jacobians"]) / half["jacobians"] if tesseract else None
    jacobians = f"{spread(tesseract['jacobians'])} Tesseract: {times(ratio)}" if tesseract else "not installed"
    return [
        row("weighted gradient, 8 samples 3 -> 64 -> 2", spread(ours["gradient"]),
            f"{spread(tesseract['gradient'])} Tesseract" if tesseract else "not installed",
            f"p50 at most {seconds(GRADIENT)}", half["gradient"] <= GRADIENT),
        row("weighted gradient, 1 sample 3 -> 64 -> 2", spread(ours["gradient of one"]),
            f"{spread(umbridge['gradient of one'])} UM-Bridge" if umbridge else "not installed",
            f"p50 at most {seconds(GRADIENT)}", half["gradient of one"] <= GRADIENT),
        row("Jacobians, 512 samples 3 -> 64 -> 2", spread(ours["jacobians"]), jacobians,
            f"{times(JACOBIANS)} Tesseract", None if ratio is None else ratio >= JACOBIANS),
        row("80 MB of result (100 Jacobians 200 -> 1000)", spread(ours["result"]), "",
            f"at most {seconds(RESULT)}", half["result"] <= RESULT),
    ]  # fmt: skip


def _batching(found: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, sides in found["batching"].items():
        gains = [a / b for a, b in zip(sides["batched"], sides["single"], strict=True)]
        measured = (
            f"{within(gains, times)}: {within(sides['batched'])} requests/s batched, "
            f"{within(sides['single'])} one by one"
        )
        work = f"gain of batching, {CLIENTS} clients, {name} model ({DEPTHS[name]} layers of 64)"
        lines.append(row(work, measured, "", times(GAIN), statistics.median(gains) >= GAIN))
    return lines


def _health(found: Mapping[str, Any]) -> list[str]:
    names = {"batched": "batched", "single": "one by one"}
    return [
        row(f"health check while {CLIENTS} clients saturate every worker, {names[side]}", spread(values), "",
            f"p99 under {seconds(HEALTH)}", percentile(values, 0.99) < HEALTH)
        for side, values in found["health"].items()
    ]  # fmt: skip


def _job(found: Mapping[str, Any]) -> list[str]:
    job = found["job"]
    ratios = [loaded / alone for loaded, alone in zip(job["loaded"], job["alone"], strict=True)]
    kept = statistics.median(job["rates"]) >= KEPT_UP * job["asked"]
    measured = (
        f"{within(ratios, times)} its time alone: {within(job['loaded'], seconds)} with, "
        f"{within(job['alone'], seconds)} without; {within(job['rates'])} requests/s answered, "
        f"p99 {seconds(percentile(job['answers'], 0.99))}"
    )
    promised = f"at most {times(DISTURBED)}, at {job['asked']:.0f} requests/s"
    met = statistics.median(ratios) <= DISTURBED and kept
    return [row(f"a job under {job['asked']:.0f} requests/s of health and status", measured, "", promised, met)]


def _notes() -> list[str]:
    return [
        ("Batching: the same clients, one request each at a time, to two services turn by turn, one of which has "
         f"`window_seconds=0`; they live in {GENERATORS} processes of their own and name a model that was sent ahead. "
         "What a batch saves is computing; what a request costs besides (HTTP, checks, the frames between processes, "
         "the clients themselves on the same cores) stays, and bounds the gain, the more so the cheaper the model."),
        "",
        (f"Health is asked {PROBES:.0f} times a second from one more process; an answer's time runs from the moment "
         "at which its request was due."),
        "",
        ("The job runs on one worker with one thread, so that a core is left for the service. \"Do not disturb\" is "
         f"read as at most {times(DISTURBED)} the time alone, with at least {KEPT_UP:.0%} of the requests answered."),
        "",
        ("Peers run in an environment of their own, server and client, each with what its pages say; UM-Bridge knows "
         "one sample a call."),
    ]  # fmt: skip

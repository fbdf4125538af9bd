"""What the page says in words and tables, from the plan and the receipt.

The receipt is read tolerantly, as an old or a partial one should still give a page. Looked for are `spec` (or its
blocks `model`, `inputs`, `request` themselves), `seconds` by station, `samples_per_second`, `verified.details`,
`nonfinite`, `versions`, and where and when it ran. What is missing is said to be missing, or left out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jacray_workers.plan import ArrayPlan, Candidate, Plan
from jacray_workers.planning.explain import count, size

from jacray.report.texts import describe, duration, number, plural, sentence, shape, words

Row = tuple[str, str]
ARRAYS = 60  # rows of the table of results; a model may have thousands of parameters
_RATES = ("samples_per_second", "rate", "timings.samples_per_second", "timings.rate")
_SECONDS = ("seconds.compute", "timings.compute", "seconds.total", "timings.total", "seconds", "timings")


@dataclass(frozen=True)
class Verdict:
    """What the checks say.

    Attributes:
        good: whether all passed; None where there was none.
        text: the same in words.
    """

    good: bool | None
    text: str


@dataclass(frozen=True)
class Facts:
    """Everything on the page that is text.

    Attributes:
        headline: the job in a line.
        computed: what was computed, by name.
        arrays: a row per array: result, shape, dimensions, type, size.
        more_arrays: how many arrays have no row.
        plan: what was planned, by name.
        candidates: a row per method: name, mark, refusal, and its prices.
        notes: what a reader of the plan should know.
        timings: seconds by name.
        rate: samples per second, in words, or empty.
        verdict: of the checks.
        checks: a row per kind of check: what, samples, error, tolerance, outcome, note.
        nonfinite: a row per array with NaN or infinity; None where nobody counted.
        versions: by name.
        provenance: seed, executor and what else tells one run from another.
    """

    headline: str
    computed: tuple[Row, ...]
    arrays: tuple[tuple[str, ...], ...]
    more_arrays: int
    plan: tuple[Row, ...]
    candidates: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...]
    timings: tuple[Row, ...]
    rate: str
    verdict: Verdict
    checks: tuple[tuple[str, ...], ...]
    nonfinite: tuple[tuple[str, ...], ...] | None
    versions: tuple[Row, ...]
    provenance: tuple[Row, ...]


def collect(plan: Plan | None, receipt: Mapping[str, Any], inputs: Any = None) -> Facts:
    """Everything to be said about a job."""
    checks = _checks(receipt)
    return Facts(
        headline=_headline(plan, _rate(plan, receipt)),
        computed=tuple(_computed(plan, receipt, inputs)),
        arrays=tuple(_array(a) for a in plan.arrays[:ARRAYS]) if plan else (),
        more_arrays=max(len(plan.arrays) - ARRAYS, 0) if plan else 0,
        plan=tuple(_plan(plan)) if plan else (),
        candidates=tuple(_candidate(c, plan) for c in plan.candidates) if plan else (),
        notes=(*plan.cuts, *plan.notes) if plan else (),
        timings=tuple(_timings(receipt)),
        rate=_rate(plan, receipt),
        verdict=_verdict(checks),
        checks=tuple(_check_rows(checks)),
        nonfinite=_nonfinite(receipt),
        versions=tuple((str(k), describe(v, 120)) for k, v in _mapping(look(receipt, "versions")).items()),
        provenance=tuple(_provenance(plan, receipt)),
    )


def _headline(plan: Plan | None, rate: str) -> str:
    if plan is None:
        return ""
    held = plan.array("jacobian")
    of = f", Jacobian {shape(held[0].shape)}" if len(held) == 1 else f", {len(held)} Jacobian blocks" if held else ""
    return f"{plural(plan.samples, 'sample')}{of}, method {plan.method}" + (f", {rate}." if rate else ".")


def look(receipt: Mapping[str, Any], *paths: str) -> Any:
    """The first of these dotted paths that the receipt has, or None."""
    for path in paths:
        at: Any = receipt
        for step in path.split("."):
            at = at.get(step) if isinstance(at, Mapping) else None
        if at is not None:
            return at
    return None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _computed(plan: Plan | None, receipt: Mapping[str, Any], inputs: Any) -> Iterator[Row]:
    model = look(receipt, "spec.model", "model")
    if model is not None:
        yield "Model", describe(model)
    source = look(receipt, "spec.inputs", "inputs")
    sizes = _shapes(inputs)
    if source is not None or sizes:
        yield "Inputs", ", ".join(part for part in (describe(source) if source is not None else "", sizes) if part)
    if plan is not None:
        yield "Samples", f"{plan.samples:,}, each with {plural(plan.rows, 'output number')}"
    request = _mapping(look(receipt, "spec.request", "request"))
    for key, label in (("wrt", "Derivatives by"), ("returns", "Results"), ("weights", "Weights")):
        if request.get(key) is not None:
            yield label, _listed(request[key])


def _listed(value: Any) -> str:
    plain = isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(v, str) for v in value)
    return ", ".join(map(words, value)) if plain else describe(value, 200)


def _shapes(inputs: Any) -> str:
    """The shapes of a tensor or of tensors by name."""
    if hasattr(inputs, "shape"):
        return f"shape {shape(inputs.shape)}"
    if isinstance(inputs, Mapping):
        return ", ".join(f"{name} {shape(x.shape)}" for name, x in inputs.items() if hasattr(x, "shape"))
    return ", ".join(shape(x.shape) for x in inputs if hasattr(x, "shape")) if isinstance(inputs, list | tuple) else ""


def _array(array: ArrayPlan) -> tuple[str, ...]:
    width = int("".join(c for c in array.dtype if c.isdigit()) or 32) // 8
    kept = f"{array.dtype}, in factors" if array.factored else array.dtype
    return array.key, shape(array.shape), ", ".join(array.dims), kept, size(array.size * width)


def _plan(plan: Plan) -> Iterator[Row]:
    yield "Method", f"{plan.method}: {plan.reason}"
    yield "Precision and device", f"{plan.dtype} on {plan.device}"
    yield "Chunks", f"{plural(plan.chunk_size, 'sample')} and {plural(plan.row_chunk, 'output row')} at a time"
    yield "Shards", f"{plan.shard_count:,}, of up to {plural(plan.shard_size, 'sample')}"
    yield "Result", size(plan.bytes_out)
    yield "Memory", f"{size(plan.peak_bytes)} predicted at the peak, of {size(plan.budget_bytes)} allowed"


def _candidate(c: Candidate, plan: Plan | None) -> dict[str, Any]:
    priced = (count(c.operations), size(c.bytes_moved), size(c.peak_bytes), count(c.launches))
    seconds = duration(c.seconds) if c.measured else f"about {duration(c.seconds)}"
    chosen = plan is not None and c.method == plan.method
    return {"method": c.method, "chosen": chosen, "refused": c.refused, "prices": (*priced, seconds)}


def _timings(receipt: Mapping[str, Any]) -> Iterator[Row]:
    found = look(receipt, "seconds", "timings")
    if isinstance(found, int | float):
        found = {"total": found}
    for name, value in _flat(_mapping(found), ""):
        if "per_second" not in name and not name.endswith("rate"):
            yield sentence(words(name.removesuffix("_seconds"))), duration(value)


def _flat(values: Mapping[str, Any], stem: str) -> Iterator[tuple[str, float]]:
    """The numbers of nested mappings, by their names in a row."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{stem}{name}, ")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{stem}{name}", value


def _rate(plan: Plan | None, receipt: Mapping[str, Any]) -> str:
    rate = look(receipt, *_RATES)
    if isinstance(rate, int | float):
        return f"{number(float(rate))} samples per second"
    seconds = look(receipt, *_SECONDS)
    if plan is None or not isinstance(seconds, int | float) or seconds <= 0:
        return ""
    return f"{number(plan.samples / seconds)} samples per second"


def _checks(receipt: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The checks as a list of mappings, however the receipt holds them."""
    found = look(receipt, "verified.details", "checks", "check")
    if isinstance(found, Mapping):
        found = [found] if "error" in found else []
    if not isinstance(found, Sequence) or isinstance(found, str):
        return []
    plain = [dataclasses.asdict(c) if dataclasses.is_dataclass(c) and not isinstance(c, type) else c for c in found]
    return [check for check in plain if isinstance(check, Mapping)]


def _verdict(checks: Sequence[Mapping[str, Any]]) -> Verdict:
    if not checks:
        return Verdict(None, "No independent check ran.")
    failed = [check for check in checks if not check.get("passed", True)]
    samples = _sampled(checks)
    if failed:
        return Verdict(False, f"{len(failed)} of {plural(len(checks), 'check')} {samples}failed.")
    worst = max((_error(check) for check in checks), default=0.0)
    passed = "The check" if len(checks) == 1 else f"All {len(checks):,} checks"
    return Verdict(True, f"{passed} {samples}passed; the largest relative error is {number(worst)}.")


def _sampled(checks: Sequence[Mapping[str, Any]]) -> str:
    """On how many samples, with a space behind; a check of the whole batch has no sample."""
    found = {check.get("sample", -1) for check in checks} - {-1, None}
    return f"on {plural(len(found), 'sample')} " if found else ""


def _error(check: Mapping[str, Any]) -> float:
    error = check.get("error")
    return float(error) if isinstance(error, int | float) and not math.isnan(error) else 0.0


def _check_rows(checks: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """One row per kind of check, with its worst sample."""
    for what in dict.fromkeys(str(check.get("what", "check")) for check in checks):
        same = [check for check in checks if str(check.get("what", "check")) == what]
        failed = sum(not check.get("passed", True) for check in same)
        worst = max(same, key=lambda check: (not check.get("passed", True), _error(check)))
        notes = dict.fromkeys(str(check["note"]) for check in same if check.get("note"))
        outcome = f"✗ {failed} failed" if failed else "✓ passed"
        error, allowed = (number(worst.get(key, "not recorded")) for key in ("error", "tolerance"))
        yield what, _sampled(same).removeprefix("on ").strip() or "the batch", error, allowed, outcome, "; ".join(notes)


def _nonfinite(receipt: Mapping[str, Any]) -> tuple[tuple[str, ...], ...] | None:
    found = look(receipt, "nonfinite", "non_finite")
    if found is None:
        return None
    if isinstance(found, Mapping):
        found = [
            {"key": key, **(value if isinstance(value, Mapping) else {"count": value})} for key, value in found.items()
        ]
    plain = [dataclasses.asdict(n) if dataclasses.is_dataclass(n) and not isinstance(n, type) else n for n in found]
    return tuple(_nonfinite_row(entry) for entry in plain if isinstance(entry, Mapping) and entry.get("count"))


def _nonfinite_row(entry: Mapping[str, Any]) -> tuple[str, ...]:
    first = entry.get("first", -1)
    place = f"sample {first:,}" if isinstance(first, int) and first >= 0 else "no sample axis"
    return str(entry.get("key", "")), number(entry["count"]), place


def _provenance(plan: Plan | None, receipt: Mapping[str, Any]) -> Iterator[Row]:
    if plan is not None:
        yield "Seed", str(plan.seed)
        yield "Plan digest", plan.digest[:16]
    for key in ("job", "started", "executor", "threads", "machine"):
        value = look(receipt, key)
        if value:
            yield sentence(key), describe(value, 200)
    lost = look(receipt, "retries")
    if isinstance(lost, Sequence) and lost:
        yield "Retries", f"{plural(len(lost), 'shard')} lost and computed again"

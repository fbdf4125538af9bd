"""A plan as text for people."""

from __future__ import annotations

from jacray_workers.plan import Candidate, Plan


def explain_plan(plan: Plan) -> str:
    """The plan as a short text with a table of methods."""
    chunks = f"{plan.chunk_size:,} samples, {plan.row_chunk:,} rows at a time"
    shards = f"{plan.shard_count:,} shard{'s' * (plan.shard_count > 1)} of up to {plan.shard_size:,} samples"
    memory = f"{size(plan.bytes_out)} out; {size(plan.peak_bytes)} at the peak"
    lines = [
        f"{plan.samples:,} samples x {plan.rows:,} output rows, {plan.dtype} on {plan.device}",
        f"method    {plan.method}: {plan.reason}",
        f"chunks    {chunks}; {shards}",
        f"memory    {memory}, within a budget of {size(plan.budget_bytes)}",
    ]
    lines += [f"cut       {cut}" for cut in plan.cuts]
    lines += [f"result    {a.key}: {list(a.shape)} {a.dtype}{' in factors' if a.factored else ''}" for a in plan.arrays]
    lines += ["", *_table(plan)]
    if any(not c.measured and not c.refused for c in plan.candidates):
        lines.append("  ~ priced by operations and bytes, which few runs come near; not tried, since it could not pay")
    lines += ["", *(f"note: {note}" for note in plan.notes)] if plan.notes else []
    return "\n".join(lines)


def _table(plan: Plan) -> list[str]:
    head = f"  {'method':<14}{'operations':>12}{'bytes':>12}{'peak':>12}{'launches':>10}{'seconds':>12}"
    return [head, *(_row(candidate, candidate.method == plan.method) for candidate in plan.candidates)]


def _row(c: Candidate, chosen: bool) -> str:
    mark = "*" if chosen else " "
    if c.refused:
        return f"{mark} {c.method:<14}refused: {c.refused}"
    seconds = f"{c.seconds:.3g}" if c.measured else f"~{c.seconds:.3g}"
    peak = size(c.peak_bytes) if c.peak_bytes else "-"
    return (
        f"{mark} {c.method:<14}{count(c.operations):>12}{size(c.bytes_moved):>12}{peak:>12}"
        f"{count(c.launches):>10}{seconds:>12}"
    )


def size(n: float) -> str:
    """Bytes with a binary prefix."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def count(n: float) -> str:
    """A number with a decimal prefix."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(n) < 1000:
            return f"{n:.0f}{unit}" if not unit else f"{n:.1f}{unit}"
        n /= 1000
    return f"{n:.1f}P"

"""Numbers, names and nested values as short text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

MINUS = "\N{MINUS SIGN}"  # as wide as a plus, and read out as minus


def number(value: Any) -> str:
    """A number with three digits that matter."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if math.isnan(value):
        return "NaN"
    if isinstance(value, int) or (math.isfinite(value) and value == int(value) and abs(value) < 1e6):
        return f"{int(value):,}".replace("-", MINUS)
    if math.isfinite(value) and 1000 <= abs(value) < 1e6:
        return f"{value:,.0f}".replace("-", MINUS)
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e").replace("-", MINUS)


def duration(seconds: Any) -> str:
    """Seconds in a unit that keeps the number short."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return str(seconds)
    if seconds and abs(seconds) < 1e-3:
        return f"{seconds * 1e6:.3g} µs"
    if seconds and abs(seconds) < 1:
        return f"{seconds * 1e3:.3g} ms"
    if abs(seconds) < 120:
        return f"{seconds:.3g} s"
    return f"{int(seconds // 60)} min {seconds % 60:.0f} s"


def shape(sizes: Sequence[int]) -> str:
    """A shape as torch prints it."""
    return f"({', '.join(str(n) for n in sizes)}{',' if len(sizes) == 1 else ''})"


def words(name: str) -> str:
    """An identifier as words."""
    return name.replace("_", " ").strip()


def sentence(text: str) -> str:
    """The text with a capital at its start and nothing else changed."""
    return text[:1].upper() + text[1:]


def describe(value: Any, most: int = 600) -> str:
    """A nested setting in one line: `kind` first, then the rest by name."""
    text = _describe(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        kind = str(value.get("kind", ""))
        rest = [f"{key} {_describe(part)}" for key, part in value.items() if key != "kind" and part is not None]
        inner = ", ".join(rest)
        return f"{kind} ({inner})" if kind and inner else kind or inner
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        flat = all(isinstance(part, int | float) for part in value)
        return f"[{', '.join(_describe(part) for part in value)}]" if flat else " · ".join(map(_describe, value))
    return str(value)


def plural(count: int, word: str) -> str:
    """A count with its noun."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"

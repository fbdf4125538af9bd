"""Plain data as YAML that `documents` reads back to equal data, laid out for people."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

WIDTH = 100
LONG_KEY = 100  # readers need not look further for the colon of a key without a question mark
_PLAIN = re.compile(r"(\.{0,2}/)*[A-Za-z_][A-Za-z0-9_./*+@-]*|(\.\./)+|\.")
# The last six: other readers know YAML 1.1 only.
_TAKEN = frozenset(("null", "true", "false", "yes", "no", "on", "off", "y", "n"))


def dump(data: Mapping[str, Any], header: str = "") -> str:
    """YAML with blocks outside, and inline what fits into a line.

    Args:
        data: dicts with texts as keys, lists, texts, numbers, true, false and null.
        header: put before it as comments.
    """
    comments = [f"# {line}" for line in header.splitlines()]
    return "\n".join([*comments, *_block(data)]) + "\n"


def _block(value: Any) -> Iterator[str]:
    """Lines of a value, without indentation."""
    if isinstance(value, Mapping) and value:
        for key, part in value.items():
            text = _text(key)
            if len(text) > LONG_KEY:
                yield f"? {text}"
            yield from _entry(":" if len(text) > LONG_KEY else f"{text}:", part)
    elif isinstance(value, list | tuple) and value:
        for part in value:
            yield from _entry("-", part)
    else:
        yield _inline(value)


def _entry(lead: str, part: Any) -> Iterator[str]:
    inline = _inline(part)
    if not isinstance(part, Mapping | list | tuple) or not part or _is_short(part, inline):
        yield f"{lead} {inline}"
        return
    lines = list(_block(part))
    if lead in ("-", ":"):
        yield f"{lead} {lines[0]}"
        yield from (f"  {line}" for line in lines[1:])
    else:
        yield lead
        yield from (f"  {line}" for line in lines)


def _is_short(part: Any, inline: str) -> bool:
    inner = part.values() if isinstance(part, Mapping) else part
    flat = all(not isinstance(p, Mapping | list | tuple) or not p for p in inner)
    return len(inline) <= WIDTH or (flat and not isinstance(part, Mapping))


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_flow_key(key)}: {_inline(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_inline, value)) + "]"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    if isinstance(value, float):
        # Without a point, readers of YAML 1.1 take 1e-05 for a text.
        return repr(value) if "." in repr(value) else repr(value).replace("e", ".0e")
    return _text(value) if isinstance(value, str) else repr(value)


def _flow_key(key: str) -> str:
    text = _text(key)
    return f"? {text} " if len(text) > LONG_KEY else text


def _text(text: str) -> str:
    if _PLAIN.fullmatch(text) and text.lower() not in _TAKEN:
        return text
    return '"' + "".join(map(_character, text)) + '"'


def _character(c: str) -> str:
    if c in '"\\':
        return f"\\{c}"
    if c.isascii() and c.isprintable():
        return c
    # A letter beyond ASCII stays readable; what editors hide or readers fold is written out.
    if c.isalnum() and ord(c) > 0xA0:
        return c
    return f"\\x{ord(c):02x}" if ord(c) < 0x100 else f"\\u{ord(c):04x}" if ord(c) < 0x10000 else f"\\U{ord(c):08x}"

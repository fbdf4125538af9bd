"""Dotted overrides such as `request.method=reverse`, applied to a document before it is checked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jacray_workers.errors import Plain, SpecError

from jacray import documents
from jacray.documents import Document


def override(document: Document, assignments: Iterable[str]) -> Document:
    """The document with each `KEY=VALUE` put in, later ones over earlier ones.

    Keys are dotted, list places are numbers, values are YAML. Whether a key is known is decided when the document
    is checked, so that an unknown one is refused with the nearest known name as everywhere.

    Raises:
        SpecError: naming the override and the rule.
    """
    data, places = document.data, dict(document.places)
    for text in assignments:
        key, path, given = _split(text)
        data = _put(data, path, given, key, text)
        # What stood below the key has gone, and its lines with it.
        places = {p: line for p, line in places.items() if p[: len(path)] != path}
        for depth in range(1, len(path) + 1):
            places.setdefault(path[:depth], f"{document.name}, override {text}")
    return Document(data, document.name, places)


def _split(text: str) -> tuple[str, tuple[str, ...], Any]:
    if not documents.is_text(text):
        raise SpecError("override", "must be UTF-8 text", text)
    key, equals, given = text.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise SpecError(f"override {text}", "must be KEY=VALUE with a dotted key", None, "as in request.method=reverse")
    if len(path) > documents.MAX_DEPTH:
        raise SpecError(f"override {text}", f"must reach at most {documents.MAX_DEPTH} deep", len(path))
    return key.strip(), path, documents.value(given, f"override {text}")


def _put(data: Any, path: tuple[str, ...], given: Any, key: str, text: str) -> Any:
    """A copy of the data with one value replaced; nothing that aliases share is written to."""
    if not path:
        return given
    here, rest = path[0], path[1:]
    if isinstance(data, list):
        place = _place(data, here, key, text)
        return [*data[:place], _put(data[place], rest, given, key, text), *data[place + 1 :]]
    if data is not None and not isinstance(data, dict):
        inner = f"a value, not a mapping: {data!r}"
        raise SpecError(f"override {text}", f"{key} reaches into what is no mapping or list", Plain(inner))
    known = data or {}
    return {**known, here: _put(known.get(here), rest, given, key, text)}


def _place(data: list[Any], here: str, key: str, text: str) -> int:
    if not here.isascii() or not here.isdigit() or int(here) >= len(data):
        rule = (
            f"{key} must give a place from 0 to {len(data) - 1} in the list"
            if data
            else f"{key} reaches into an empty list"
        )
        raise SpecError(f"override {text}", rule, Plain(here))
    return int(here)

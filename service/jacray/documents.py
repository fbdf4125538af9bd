"""YAML as plain data that remembers where each key stood.

YAML 1.2 with its core schema. Refused: tags, duplicate keys, several documents, a document that is too large or too
deep, and aliases that multiply into too many values. Reading runs no code and builds no objects.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jacray_workers.errors import Plain, SpecError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

MAX_BYTES = 1 << 22
MAX_VALUES = 250_000
MAX_DEPTH = 64

Path_ = tuple[str, ...]
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}


@dataclass(frozen=True)
class Document:
    """A mapping read from YAML.

    Attributes:
        data: nested dicts, lists and scalars.
        name: what errors call the source.
        places: for a key's path, the source and the line it came from.
    """

    data: dict[str, Any]
    name: str
    places: Mapping[Path_, str] = field(default_factory=dict, repr=False)

    def place(self, dotted: str) -> str:
        """Where a dotted key stands: `FILE, line 12`, or the nearest key above it that stands anywhere."""
        path = tuple(dotted.split("."))
        while path:
            if path in self.places:
                return self.places[path]
            path = path[:-1]
        return self.name


def read(path: Path) -> Document:
    """Read a file.

    Raises:
        SpecError: naming the file, the line and the rule.
    """
    name = str(path)
    try:
        found = path.stat()
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            raise SpecError(name, "must be a readable YAML file", Plain("a pipe or a device"))
        if found.st_size > MAX_BYTES:
            raise SpecError(name, f"must be at most {MAX_BYTES:,} bytes", found.st_size, "put numbers into a file")
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        if isinstance(error, SpecError):
            raise
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SpecError(name, f"must be a readable YAML file, but {reason}") from None
    return parse(text, name)


def fetch(url: str) -> Document:
    """Read a file behind a URL, such as the spec of a run there.

    Raises:
        SpecError: naming the URL and the rule.
    """
    from fsspec.core import url_to_fs

    try:
        files, path = url_to_fs(url)
        size = int(files.size(path) or 0)
        if size > MAX_BYTES:
            raise SpecError(url, f"must be at most {MAX_BYTES:,} bytes", size, "put numbers into a file")
        text = bytes(files.cat_file(path)).decode("utf-8-sig")
    except SpecError:
        raise
    except Exception as error:  # noqa: BLE001  (every store has errors of its own, and none of them is a fault of ours)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SpecError(url, f"must be a readable YAML file, but {reason}") from None
    return parse(text, url)


def parse(text: str, name: str) -> Document:
    """Read a text that must hold one mapping.

    Raises:
        SpecError: naming the source, the line and the rule.
    """
    builder = _Builder(name)
    data = builder.build(text)
    if not isinstance(data, dict):
        found = Plain("an empty document") if data is None else data
        raise SpecError(name, "must be a mapping of the blocks model, inputs, request, cluster, output", found)
    return Document(data, name, builder.places)


def value(text: str, name: str) -> Any:
    """Read a text that may hold any value, as after the `=` of an override.

    Raises:
        SpecError: naming the source and the rule.
    """
    return _Builder(name).build(text)


def is_text(value: str) -> bool:
    """Whether a text can be written as UTF-8, which halves of a surrogate pair cannot."""
    return value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value)


@dataclass
class _Open:
    """A list or mapping that is being filled.

    Attributes:
        items: what it holds so far.
        path: its own.
        key: of a mapping, the key whose value comes next.
        weight: how many values it holds when its aliases are written out.
    """

    items: Any
    path: Path_
    anchor: str | None
    key: str | None = None
    weight: int = 1


class _Builder:
    """Builds plain data from YAML's events, without recursion."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.places: dict[Path_, str] = {}
        self.stack: list[_Open] = []
        self.anchors: dict[str, tuple[Any, int]] = {}
        self.root: Any = None
        self.documents = 0

    def build(self, text: str) -> Any:
        try:
            for event in _events(text):
                self._take(event)
        except MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 0
            raise SpecError(f"{self.name}, line {line}", f"is not YAML: {error.problem or error.context}") from None
        except (YAMLError, ValueError, RecursionError) as error:
            if isinstance(error, SpecError):
                raise
            raise SpecError(self.name, f"is not YAML: {str(error).splitlines()[0]}") from None
        return self.root

    def _take(self, event: Any) -> None:
        kind = type(event).__name__
        if getattr(event, "tag", None) is not None:
            raise self._refuse(event, "must not use tags", str(event.tag))
        if kind == "DocumentStartEvent":
            self.documents += 1
            if self.documents > 1:
                raise self._refuse(event, "must hold one document", "a second one")
        elif kind in ("MappingStartEvent", "SequenceStartEvent"):
            self._open(event, {} if kind.startswith("Mapping") else [])
        elif kind in ("MappingEndEvent", "SequenceEndEvent"):
            done = self.stack.pop()
            self._put(event, done.items, done.weight, done.anchor)
        elif kind == "ScalarEvent":
            self._scalar(event)
        elif kind == "AliasEvent":
            if event.anchor not in self.anchors:
                raise self._refuse(event, "must use an alias only after its anchor's value has ended", event.anchor)
            self._put(event, *self.anchors[event.anchor], None)

    def _open(self, event: Any, items: Any) -> None:
        if len(self.stack) >= MAX_DEPTH:
            raise self._refuse(event, f"must nest at most {MAX_DEPTH} deep", "a deeper value")
        self._no_key_here(event)
        path = self._path()
        if path:
            self.places.setdefault(path, self._line(event))
        self.stack.append(_Open(items, path, event.anchor))

    def _path(self) -> Path_:
        """The path of the value that comes next."""
        if not self.stack:
            return ()
        top = self.stack[-1]
        return (*top.path, top.key if top.key is not None else str(len(top.items)))

    def _no_key_here(self, event: Any) -> None:
        if self.stack and isinstance(self.stack[-1].items, dict) and self.stack[-1].key is None:
            raise self._refuse(event, "must have texts as keys", "a list or mapping as a key")

    def _scalar(self, event: Any) -> None:
        if not is_text(event.value):
            raise self._refuse(event, "must hold texts of whole characters", "half a surrogate pair")
        top = self.stack[-1] if self.stack else None
        if top is not None and isinstance(top.items, dict) and top.key is None:
            if event.value in top.items:
                dotted = ".".join((*top.path, event.value))
                raise self._refuse(event, f"must not give {dotted} twice", None)
            top.key = event.value
            self.places[(*top.path, event.value)] = self._line(event)
            return
        self._put(event, self._value(event), 1, event.anchor)

    def _value(self, event: Any) -> Any:
        text: str = event.value
        if event.style not in (None, ""):
            return text
        if text in _WORDS:
            return _WORDS[text]
        if _INT.fullmatch(text):
            if len(text) > 400:
                raise self._refuse(event, "must hold whole numbers of at most 400 digits", text)
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        return float(text) if _FLOAT.fullmatch(text) else text

    def _put(self, event: Any, made: Any, weight: int, anchor: str | None) -> None:
        """Place a finished value where it belongs."""
        if anchor is not None:
            self.anchors[anchor] = (made, weight)
        if not self.stack:
            self.root = made
            return
        top = self.stack[-1]
        self._no_key_here(event)
        top.weight += weight
        if top.weight > MAX_VALUES:
            raise self._refuse(event, f"must hold at most {MAX_VALUES:,} values, aliases written out", "more")
        if isinstance(top.items, dict):
            top.items[top.key] = made
            top.key = None
        else:
            top.items.append(made)

    def _line(self, event: Any) -> str:
        return f"{self.name}, line {event.start_mark.line + 1}"

    def _refuse(self, event: Any, rule: str, found: str | None) -> SpecError:
        return SpecError(self._line(event), rule, None if found is None else Plain(found))


def _events(text: str) -> Iterator[Any]:
    yaml = YAML(typ="safe", pure=True)
    yaml.version = (1, 2)
    yield from yaml.parse(text)

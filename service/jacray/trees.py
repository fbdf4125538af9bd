"""The structure of results as plain JSON data, so that what was a dict, list or tuple comes back as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.utils import _pytree as pytree


def to_json(tree: Any, leaf: Callable[[Any], str]) -> Any:
    """The tree with a key in place of each leaf: `{"key": ...}`, `{"dict": [[name, part], ...]}`, `{"list": [...]}`.

    Named tuples and other containers become dicts by the names of their parts.
    """
    if tree is None:
        return None
    if isinstance(tree, Mapping):
        return {"dict": [[str(name), to_json(part, leaf)] for name, part in tree.items()]}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return {"dict": [[name, to_json(part, leaf)] for name, part in zip(tree._fields, tree, strict=True)]}
    if type(tree) in (list, tuple):
        return {type(tree).__name__: [to_json(part, leaf) for part in tree]}
    paths = pytree.tree_flatten_with_path(tree)[0]
    if len(paths) == 1 and not paths[0][0]:
        return {"key": leaf(tree)}
    return {"dict": [[_dotted(path), to_json(part, leaf)] for path, part in paths]}


def from_json(data: Any, read: Callable[[str], Any]) -> Any:
    """The tree that `to_json` described, with `read(key)` for each leaf."""
    if data is None:
        return None
    if "key" in data:
        return read(data["key"])
    if "dict" in data:
        return {name: from_json(part, read) for name, part in data["dict"]}
    kind = list if "list" in data else tuple
    return kind(from_json(part, read) for part in data[kind.__name__])


def _dotted(path: Any) -> str:
    return ".".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)

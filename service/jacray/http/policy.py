"""What a spec from elsewhere may name: uploads of its own user, and files only in the folder the operator allows.

A spec that stays on the user's machine may read any file of his. One that was sent must not read the service's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jacray_workers.errors import InputError, ModelError, Plain, UserError
from jacray_workers.validation import nearest

DIGEST = re.compile(r"^sha256:[0-9a-f]{64}$")
Find = Callable[[str, str], Path]
"""The file of an upload, by its digest; the second argument is the key that names it, for errors."""
_PLAIN_INPUTS = ("random", "digits", "sklearn", "inline")
_FILE_INPUTS = ("npy", "npz", "safetensors", "csv", "zarr", "parquet", "datasets", "images")
MODELS = ("layers", "function", "graph", "import", "huggingface", "timm", "torchvision")


@dataclass(frozen=True)
class Policy:
    """What may be named.

    Attributes:
        find: finds the uploads of the user whose spec it is.
        data: a folder whose files may be named, or None.
        import_prefixes: packages that models may be imported from.
    """

    find: Find
    data: Path | None = None
    import_prefixes: tuple[str, ...] = ()

    def model(self, found: Any) -> dict[str, Any]:
        """A model spec with its paths filled in.

        Raises:
            ModelError: it names what it may not.
        """
        if not isinstance(found, Mapping):
            rule = 'must be a model spec, or {"digest": "sha256:..."} of an uploaded one'
            raise ModelError("model", rule, found, "the client exports an nn.Module by itself")
        if set(found) == {"digest"}:
            return self._uploaded(found["digest"])
        kind = found.get("kind")
        if kind not in MODELS:
            allowed = f"must be one of {', '.join(MODELS)} over HTTP"
            raise ModelError("model.kind", allowed, kind, nearest(str(kind), MODELS))
        spec = dict(found)
        if kind == "import":
            self._check_import(spec)
        for name in ("weights", "path"):
            if spec.get(name) is not None and not (kind == "import" and name == "path"):
                spec[name] = self._file(spec[name], f"model.{name}", ModelError)
        return spec

    def inputs(self, found: Any) -> tuple[Any, str | None]:
        """Inputs with their paths filled in, and the file of uploaded ones.

        Raises:
            InputError: they name what they may not.
        """
        if not isinstance(found, Mapping):
            return found, None
        if set(found) == {"digest"}:
            return None, str(self.find(_digest(found["digest"], "inputs.digest"), "inputs.digest"))
        kind = found.get("kind")
        if kind is None or kind in _PLAIN_INPUTS:
            return found, None
        if kind not in _FILE_INPUTS:
            kinds = (*_PLAIN_INPUTS, *_FILE_INPUTS)
            raise InputError("inputs.kind", f"must be one of {', '.join(kinds)}", kind, nearest(str(kind), kinds))
        return {**found, "path": self._file(found.get("path"), "inputs.path", InputError)}, None

    def _uploaded(self, digest: Any) -> dict[str, Any]:
        path = self.find(_digest(digest, "model.digest"), "model.digest")
        return {"kind": "graph", "path": str(path)}

    def _check_import(self, spec: Mapping[str, Any]) -> None:
        if not self.import_prefixes:
            way_out = "send layers, a function or an exported graph, or ask the operator for --import-prefix"
            raise ModelError("model.kind", "may not be import on this service", "import", way_out)
        if spec.get("path", ".") != ".":
            raise ModelError("model.path", "may not be given over HTTP", spec["path"], "leave it out")

    def _file(self, path: Any, argument: str, error: type[UserError]) -> str:
        """The file that a path or a digest names."""
        if not isinstance(path, str):
            raise error(argument, "must be a text", path)
        if DIGEST.match(path):
            return str(self.find(path, argument))
        way_out = "upload it and give its digest, sha256:..."
        if self.data is None:
            raise error(argument, "may not name a file of the service", Plain(path), way_out)
        folder = self.data.resolve()
        try:
            whole = (folder / path).resolve()
        except (OSError, RuntimeError, ValueError):  # links in a circle, or characters that no file system takes
            raise error(argument, "must be a path", path, way_out) from None
        if not whole.is_relative_to(folder):
            raise error(argument, "must lie within the folder of data that the service shares", Plain(path), way_out)
        return str(whole)


def _digest(found: Any, argument: str) -> str:
    if not isinstance(found, str) or not DIGEST.match(found):
        raise InputError(argument, "must be sha256: and 64 hexadecimal digits", found)
    return found

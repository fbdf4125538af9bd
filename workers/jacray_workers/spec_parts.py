"""What specs of models, inputs and runs share: their base class, seeds, and paths relative to the spec's file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from jacray_workers.errors import Plain, SpecError, UserError

_BLOCK = 1 << 20


class Spec(BaseModel):
    """Frozen, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Seed = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Whole = Annotated[int, Field(strict=True)]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]


def _printable(path: str) -> str:
    if not path.isprintable():
        raise SpecError("", "must be a path of printable characters", path)
    return path


SpecPath = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_printable)]
"""A path in a spec, as text; relative to the file that the spec stands in."""


def is_url(path: str) -> bool:
    """Whether a spec's path names a place by a URL rather than by a path."""
    return "://" in path


def find(path: str, base: Path, argument: str, error: type[UserError], suffixes: tuple[str, ...] = ()) -> Path:
    """The file or folder that a spec names.

    Raises:
        UserError: of the class given; there is none, or its suffix is not one of `suffixes`.
    """
    found = Path(path).expanduser() if Path(path).is_absolute() or path.startswith("~") else base / path
    if suffixes and found.suffix.lower() not in suffixes:
        raise error(argument, f"must end in {' or '.join(suffixes)}", Plain(path))
    if not found.exists():
        way_out = f"looked for {found}; relative paths start at the spec's folder" if found != Path(path) else ""
        raise error(argument, "names nothing that exists", Plain(path), way_out)
    return found


def file_digest(path: Path) -> str:
    """The sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()

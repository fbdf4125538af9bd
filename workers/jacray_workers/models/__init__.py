"""Model specs and what builds them. Importing the specs loads no torch; building does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def as_model(model: Any, base: Path | None = None) -> Any:
    """The module that a model spec (an object or a mapping) describes; anything else comes back as it is.

    Args:
        model: a spec, a mapping with the keys of one, a module or a callable.
        base: the folder that relative paths start from; the folder one stands in by default.

    Raises:
        ModelError: the spec breaks a rule, or the model cannot be built.
    """
    from jacray_workers.models.builder import as_model as make

    return make(model, base)


def build(spec: Any, base: Path, import_prefixes: Sequence[str] | None = None) -> nn.Module:
    """Make the module that a checked spec describes; see `jacray_workers.models.builder`."""
    from jacray_workers.models.builder import build as make

    return make(spec, base, import_prefixes)


def digest(spec: Any, base: Path) -> str:
    """A sha256 of a checked spec and of its weights' bytes."""
    from jacray_workers.models.builder import digest as make

    return make(spec, base)

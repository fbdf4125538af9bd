"""Input specs and what reads them. Importing the specs loads no torch; reading does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jacray_workers.sources.loader import Loaded


def load(spec: Any, base: Path) -> Loaded:
    """Read the batch that a checked input spec describes; see `jacray_workers.sources.loader`."""
    from jacray_workers.sources.loader import load as read

    return read(spec, base)


def directions(value: Any, loaded: Loaded, base: Path, classes: Callable[[], int], argument: str) -> Any:
    """The tensors that a spec's `weights` or `vectors` stand for; see `jacray_workers.sources.weighting`."""
    from jacray_workers.sources.weighting import directions as read

    return read(value, loaded, base, classes, argument)

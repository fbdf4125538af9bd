"""Input specs and what reads them. Importing the specs loads no torch; reading does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jacray_workers.sources.loaded import Loaded
    from jacray_workers.sources.places import Reach
    from jacray_workers.sources.ranged import Rows


def rows(spec: Any, base: Path, reach: Reach | None = None) -> Rows:
    """Open the source that a checked input spec describes; see `jacray_workers.sources.loader`."""
    from jacray_workers.sources.loader import rows as open_
    from jacray_workers.sources.places import ANYWHERE

    return open_(spec, base, reach=reach or ANYWHERE)


def load(spec: Any, base: Path, reach: Reach | None = None) -> Loaded:
    """Read the whole batch that a checked input spec describes; see `jacray_workers.sources.loader`."""
    return rows(spec, base, reach).whole()


def directions(value: Any, loaded: Loaded, base: Path, classes: Callable[[], int], argument: str) -> Any:
    """The tensors that a spec's `weights` or `vectors` stand for; see `jacray_workers.sources.weighting`."""
    from jacray_workers.sources.weighting import directions as read

    return read(value, loaded, base, classes, argument)

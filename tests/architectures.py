"""torchvision and timm, where the tests find them: installed, or in the folder that `make test` puts them into."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from jacray_workers.models.architectures import load

FOLDER = Path(sys.prefix) / "architectures"


@pytest.fixture(scope="session")
def architectures() -> Path:
    """Both can be imported from here on, the way our loader does it; the folder that they lie in."""
    missing = [name for name in ("torchvision", "timm") if importlib.util.find_spec(name) is None]
    if missing and not all((FOLDER / name).is_dir() for name in missing):
        pytest.skip(f"needs {' and '.join(missing)}, which `make test` installs into {FOLDER}")
    if missing:
        # It stays: what is imported from there imports more from there later.
        sys.path.append(str(FOLDER))
    # At once, so that nothing else meets torchvision before its operators are declared.
    load("torchvision.models", "torchvision")
    return Path(importlib.util.find_spec("torchvision").origin).parents[1]

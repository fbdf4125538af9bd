"""The sets that ship inside scikit-learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jacray_workers.sources.arrays import from_numpy
from jacray_workers.sources.made import Held, held
from jacray_workers.sources.places import Reach
from jacray_workers.sources.specs import Digits, Sklearn


def digits(_spec: Digits, _base: Path, argument: str, _reach: Reach) -> Held:
    """Images `(1797, 1, 8, 8)` from 0 to 1 and their classes `(1797,)`."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = (found.images / 16).astype(np.float32)[:, None]
    return held({"": torch.from_numpy(images)}, {"target": torch.from_numpy(found.target.astype(np.int64))}, argument)


def sklearn(spec: Sklearn, _base: Path, argument: str, _reach: Reach) -> Held:
    """A set as it is measured, float32 `(N, features)`, and its `target`: int64 classes, or float32 quantities."""
    from sklearn import datasets

    found = getattr(datasets, f"load_{spec.name}")()
    return held(
        {"": torch.from_numpy(found.data.astype(np.float32))}, {"target": _target(found.target, argument)}, argument
    )


def _target(values: np.ndarray[Any, Any], argument: str) -> Tensor:
    return from_numpy(values.astype(np.int64 if values.dtype.kind in "iu" else np.float32), f"{argument}.target")

"""What one shard gives back, as frozen data: blocks by array key, and the small facts that go into the receipt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from jacray_workers.plan import Shard


@dataclass(frozen=True)
class Check:
    """One independent check of one sample.

    Attributes:
        sample: which sample.
        what: what was compared, as in `u.Jv against a float64 central difference`.
        error: the largest relative difference found.
        tolerance: what was allowed.
        passed: whether it held.
        note: why a check was weakened or left out, or the empty string.
    """

    sample: int
    what: str
    error: float
    tolerance: float
    passed: bool
    note: str = ""


@dataclass(frozen=True)
class NonFinite:
    """Non-finite numbers found in one array.

    Attributes:
        key: the array.
        count: how many.
        first: the sample of the first one, in the job's numbering; -1 for an array without a sample axis.
    """

    key: str
    count: int
    first: int


@dataclass(frozen=True)
class ShardResult:
    """What a worker computed for one shard.

    Attributes:
        shard: which samples.
        blocks: by array key, this range's part of the array (along `ArrayPlan.axis`), or its partial sum where that
            axis is -1. Values are CPU tensors or factored blocks.
        checks: the independent checks of those of the job's checked samples that fall in this shard.
        nonfinite: where NaN or infinity stand.
        seconds: wall time of the computation.
        chunk_size: the chunk it ended with; smaller than the plan's after running out of memory.
        facts: anything else worth a line in the receipt (threads, device name, back-offs).
    """

    shard: Shard
    blocks: dict[str, Tensor]
    checks: tuple[Check, ...] = ()
    nonfinite: tuple[NonFinite, ...] = ()
    seconds: float = 0.0
    chunk_size: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

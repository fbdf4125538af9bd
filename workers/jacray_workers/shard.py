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
class Written:
    """A part of an array that a worker wrote into the job's store, so that it need not travel.

    Attributes:
        key: the array.
        start, stop: which part: the shard's samples; for an array that is added up over the shards, the shard's number
            and the one after it.
        rows: which of a sample's output numbers, half open, or None for all of them.
        nbytes: how many bytes of numbers were written.
        checksum: over these bytes in the array's order, with the name of its kind, as in `crc32c:1a2b3c4d`.
    """

    key: str
    start: int
    stop: int
    nbytes: int
    checksum: str
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class ShardResult:
    """What a worker computed for one shard.

    Attributes:
        shard: which samples.
        blocks: by array key, this range's part of the array (along `ArrayPlan.axis`), or its partial sum where that
            axis is -1. Values are CPU tensors or factored blocks. What was written into a store is not here.
        checks: the independent checks of those of the job's checked samples that fall in this shard.
        nonfinite: where NaN or infinity stand.
        seconds: wall time of the computation.
        chunk_size: the chunk it ended with; smaller than the plan's after running out of memory.
        facts: anything else worth a line in the receipt (threads, device name, back-offs).
        written: what the worker wrote into the job's store instead of sending it.
    """

    shard: Shard
    blocks: dict[str, Tensor]
    checks: tuple[Check, ...] = ()
    nonfinite: tuple[NonFinite, ...] = ()
    seconds: float = 0.0
    chunk_size: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    written: tuple[Written, ...] = ()

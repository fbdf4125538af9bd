"""Where a shard stands: which samples come next, and what is done already of those that ran out of memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jacray_workers.plan import Plan, Shard


@dataclass(frozen=True)
class Chunk:
    """Samples that are computed at once.

    Attributes:
        start, stop: which, half open.
        steps: how many steps of the method stand in the result already for every one of them.
        rows: rows of the Jacobian in flight at a time, where the method can choose.
    """

    start: int
    stop: int
    steps: int
    rows: int

    @property
    def size(self) -> int:
        """How many samples."""
        return self.stop - self.start


class Progress:
    """The chunks of one shard, one after the other; halved when memory runs out.

    A chunk that fails after some steps of its method (rows of the Jacobian; columns for `forward`) keeps them: its
    samples come again in smaller chunks that go on behind those steps. Where one sample alone fails, the rows in flight
    are halved.

    Attributes:
        at: the next sample.
        size: samples at a time.
    """

    def __init__(self, plan: Plan, shard: Shard) -> None:
        self.at, self._stop = shard.start, shard.stop
        self.size, self._rows = plan.chunk_size, min(plan.row_chunk, max(plan.rows, 1))
        self._steps: dict[int, int] = {}
        self._backoffs = self._resumed = 0

    def ahead(self) -> Chunk:
        """The next chunk: of as many samples as were left at the same step."""
        stop, steps = min(self.at + self.size, self._stop), self._steps.get(self.at, 0)
        others = (i for i in range(self.at + 1, stop) if self._steps.get(i, 0) != steps) if self._steps else ()
        return Chunk(self.at, next(iter(others), stop), steps, self._rows)

    def done(self, chunk: Chunk) -> None:
        """Everything of a chunk is done."""
        self.at = chunk.stop
        self._resumed += chunk.size if chunk.steps else 0
        self._steps = {i: steps for i, steps in self._steps.items() if i >= self.at}

    def back_off(self, chunk: Chunk, steps: Sequence[int]) -> bool:
        """A chunk ran out of memory, at `steps` of each of its samples; whether there is a smaller way to go on."""
        gained = any(now > chunk.steps for now in steps)
        self._steps |= {i: now for i, now in zip(range(chunk.start, chunk.stop), steps, strict=False) if now}
        if chunk.size > 1:
            self.size = chunk.size // 2
        elif chunk.rows > 1:
            self._rows = chunk.rows // 2
        elif not gained:
            return False
        self._backoffs += 1
        return True

    def facts(self) -> dict[str, Any]:
        """What the receipt should say: nothing where memory sufficed.

        `backoffs` counts how often the chunk was halved, `resumed` the samples that went on behind the rows they had.
        """
        return {"backoffs": self._backoffs, "resumed": self._resumed} if self._backoffs else {}

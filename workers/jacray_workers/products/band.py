"""A shard's rows of the kernel matrix, from the Jacobians of pairs of samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from jacray_workers.plan import Shard
from jacray_workers.products import pairs
from jacray_workers.products.dense import bytes_of, pieces


@dataclass(frozen=True)
class Unit:
    """Some rows of the Jacobians of some samples."""

    start: int
    stop: int
    rows: range


class Band:
    """Fills `out`, `(shard, N, rows, rows)` or `(shard, N)`, from units that are added in order.

    Blocks are kept while they fit: every pair within what is kept costs no further Jacobian. When no more fits, the
    samples outside are gone through once, their blocks computed again, for all that is kept at once. Pairs that lie
    within the shard are computed in one order and written in both.

    Args:
        out: the shard's part of the result, on the CPU.
        shard: which samples are its rows.
        samples: of the job.
        chunk: samples of a unit outside the shard.
        bands: the ranges of rows that units come in.
        trace: whether equal rows are summed.
        limit: bytes of blocks to keep.
        piece: bytes that intermediates may take.
        compute: the blocks of a unit.
        pause: called between units; raises when the job was cancelled.
    """

    def __init__(
        self,
        out: Tensor,
        shard: Shard,
        samples: int,
        chunk: int,
        bands: Sequence[range],
        trace: bool,
        limit: int,
        piece: int,
        compute: Callable[[Unit], Sequence[Tensor]],
        pause: Callable[[], None],
    ) -> None:
        self.out, self.shard, self.samples, self.chunk, self.bands = out, shard, samples, chunk, bands
        self.trace, self.limit, self.piece, self.compute, self.pause = trace, limit, piece, compute, pause
        self.kept: list[tuple[Unit, Sequence[Tensor]]] = []
        self.earlier: list[Unit] = []
        if not bands:
            out.zero_()

    def add(self, unit: Unit, blocks: Sequence[Tensor]) -> None:
        """Pair a unit with all that is kept, and keep it."""
        # A chunk that ran out of memory comes again, smaller.
        known = [*self.earlier, *(u for u, _ in self.kept)]
        stale = {u for u in known if u.start >= unit.start and u.stop != unit.stop}
        self.kept = [(u, b) for u, b in self.kept if u not in stale]
        self.earlier = [u for u in self.earlier if u not in stale]
        for other, others in [*self.kept, (unit, blocks)]:
            self._put(other, others, unit, blocks)
        self.kept.append((unit, blocks))
        size = sum(bytes_of(block) for block in blocks)
        if self._held() + size > self.limit:
            self._flush()

    def finish(self) -> None:
        """Pair what is still kept with the samples outside."""
        self._flush()

    def _held(self) -> int:
        return sum(bytes_of(block) for _, blocks in self.kept for block in blocks)

    def _flush(self) -> None:
        for unit in self._outside() if self.kept else ():
            self.pause()
            blocks = self.compute(unit)
            for own, mine in self.kept:
                self._put(own, mine, unit, blocks)
        self.earlier += [unit for unit, _ in self.kept]
        self.kept = []

    def _outside(self) -> Iterator[Unit]:
        """The units of other shards, and those of this one that were kept before."""
        for low, high in ((0, self.shard.start), (self.shard.stop, self.samples)):
            for start in range(low, high, self.chunk):
                for rows in self.bands:
                    yield Unit(start, min(start + self.chunk, high), rows)
        yield from self.earlier

    def _put(self, a: Unit, mine: Sequence[Tensor], b: Unit, others: Sequence[Tensor]) -> None:
        """Write the products of a, of this shard, with b, and their mirror image where b is of this shard too."""
        if self.trace:
            if a.rows == b.rows:
                self._put_trace(a, b, pairs.traces(mine, others))
            return
        each = (b.stop - b.start) * len(a.rows) * len(b.rows) * 16
        for piece in pieces(a.stop - a.start, each, self.piece):
            here = Unit(a.start + piece.start, a.start + piece.stop, a.rows)
            found = pairs.products([block[piece] for block in mine], others)
            self._view(here, b).copy_(found)
            if self._inside(b) and a != b:
                self._view(b, here).copy_(found.permute(1, 0, 3, 2))

    def _put_trace(self, a: Unit, b: Unit, found: Tensor) -> None:
        here = self.out[self._own(a), b.start : b.stop]
        mirror = self.out[self._own(b), a.start : a.stop].T if self._inside(b) and a != b else None
        for target in (here, mirror):
            if target is not None and a.rows.start == 0:
                target.copy_(found)
            elif target is not None:
                target.add_(found.to(target.device))

    def _view(self, a: Unit, b: Unit) -> Tensor:
        rows, others = slice(a.rows.start, a.rows.stop), slice(b.rows.start, b.rows.stop)
        return self.out[self._own(a), b.start : b.stop, rows, others]

    def _own(self, unit: Unit) -> slice:
        return slice(unit.start - self.shard.start, unit.stop - self.shard.start)

    def _inside(self, unit: Unit) -> bool:
        return self.shard.start <= unit.start < self.shard.stop

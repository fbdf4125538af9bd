"""A shard's rows of the kernel matrix, from the Jacobians of pairs of samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from jacray_workers.plan import Shard
from jacray_workers.products import pairs
from jacray_workers.products.dense import bytes_of, factored, pieces, plain

# Rows of dense blocks that are gathered before they are multiplied: each pass over what is held should serve many.
WIDE = 128


@dataclass(frozen=True)
class Unit:
    """Some rows of the Jacobians of some samples."""

    start: int
    stop: int
    rows: range

    def before(self, other: Unit) -> Unit | None:
        """The samples before another unit's; all of them where the two are bands of rows of the same samples."""
        stop = self.stop if self.stop == other.stop else min(self.stop, other.start)
        return Unit(self.start, stop, self.rows) if stop > self.start else None


@dataclass(frozen=True)
class Kept:
    """Blocks of a unit that are held.

    Attributes:
        unit: which.
        blocks: by leaf.
        stores: where dense blocks stand, with room for the samples that follow; empty for factored ones.
        paired: the samples before this one are paired with everything that is held.
    """

    unit: Unit
    blocks: Sequence[Tensor]
    stores: Sequence[Tensor]
    paired: int

    @staticmethod
    def new(unit: Unit, blocks: Sequence[Tensor], room: int) -> Kept:
        """Keep blocks; dense ones are copied to where `room` samples fit."""
        if any(factored(block) for block in blocks):
            return Kept(unit, [block if factored(block) else block.clone() for block in blocks], (), unit.start)
        dense = [plain(block) for block in blocks]
        stores = [block.new_empty(room, *block.shape[1:]) for block in dense]
        empty = Kept(Unit(unit.start, unit.start, unit.rows), [store[:0] for store in stores], stores, unit.start)
        return empty.with_more(unit, dense) or empty

    def with_more(self, unit: Unit, blocks: Sequence[Tensor]) -> Kept | None:
        """These blocks and those of the samples that follow; None where they do not follow or do not fit."""
        follows = self.stores and self.unit.stop == unit.start and self.unit.rows == unit.rows
        size = unit.stop - self.unit.start
        if not follows or size > self.stores[0].shape[0] or any(factored(block) for block in blocks):
            return None
        for store, block in zip(self.stores, blocks, strict=True):
            store[unit.start - self.unit.start : size] = plain(block)
        whole = Unit(self.unit.start, unit.stop, unit.rows)
        return Kept(whole, [store[:size] for store in self.stores], self.stores, self.paired)

    def before(self, unit: Unit) -> Kept | None:
        """What is kept of the samples before this unit's."""
        left = self.unit.before(unit)
        return None if left is None else self.between(left.start, left.stop)

    def between(self, start: int, stop: int) -> Kept:
        """What is kept of these samples."""
        if (start, stop) == (self.unit.start, self.unit.stop):
            return self
        part = slice(start - self.unit.start, stop - self.unit.start)
        stores = self.stores if start == self.unit.start else ()
        blocks = [block[part] for block in self.blocks]
        return Kept(Unit(start, stop, self.unit.rows), blocks, stores, min(self.paired, stop))

    @property
    def old(self) -> Kept:
        """The samples that are paired."""
        return self.between(self.unit.start, self.paired)

    @property
    def fresh(self) -> Kept:
        """The samples that are not."""
        return self.between(self.paired, self.unit.stop)


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
        self.kept: list[Kept] = []
        self.earlier: list[Unit] = []
        if not bands:
            out.zero_()

    def add(self, unit: Unit, blocks: Sequence[Tensor]) -> None:
        """Keep a unit, and pair it with all that is kept. The blocks' memory is the caller's again afterwards."""
        self._drop_from(unit)
        kept = self._keep(unit, blocks)
        if not kept.stores or (kept.unit.stop - kept.paired) * len(unit.rows) >= WIDE:
            self._pair()
        if self._held() + sum(bytes_of(block) for block in blocks) > self.limit:
            self._flush()

    def finish(self) -> None:
        """Pair what is still kept with the samples outside."""
        self._flush()

    def _pair(self) -> None:
        """Pair what is fresh with all that is kept."""
        for i, kept in enumerate(self.kept):
            fresh = kept.fresh
            if fresh.unit.stop == fresh.unit.start:
                continue
            # What stands behind is itself fresh in part, and meets this one when its turn comes.
            for other in [*self.kept[:i], kept.old, *(later.old for later in self.kept[i + 1 :])]:
                if other.unit.stop > other.unit.start:
                    self._put(other, fresh)
            self._put(fresh, fresh)
        self.kept = [dataclasses.replace(kept, paired=kept.unit.stop) for kept in self.kept]

    def _drop_from(self, unit: Unit) -> None:
        """A chunk that ran out of memory comes again, smaller: forget its first coming."""
        self.kept = [found for kept in self.kept if (found := kept.before(unit)) is not None]
        self.earlier = [cut for u in self.earlier if (cut := u.before(unit)) is not None]

    def _keep(self, unit: Unit, blocks: Sequence[Tensor]) -> Kept:
        """Dense blocks of samples that follow each other stand in one tensor, so that few products are large ones."""
        for i, kept in enumerate(self.kept):
            longer = kept.with_more(unit, blocks)
            if longer is not None:
                self.kept[i] = longer
                return longer
        size = sum(bytes_of(block) for block in blocks) // (unit.stop - unit.start)
        taken = sum(bytes_of(block) for kept in self.kept for block in kept.stores or kept.blocks)
        room = (self.limit - taken) // max(size, 1)
        room = max(unit.stop - unit.start, min(room, self.shard.stop - unit.start))
        self.kept.append(Kept.new(unit, blocks, room))
        return self.kept[-1]

    def _held(self) -> int:
        return sum(bytes_of(block) for kept in self.kept for block in kept.blocks)

    def _flush(self) -> None:
        self._pair()
        for unit in self._outside() if self.kept else ():
            self.pause()
            other = Kept(unit, self.compute(unit), (), unit.start)
            for kept in self.kept:
                self._put(kept, other)
        for kept in self.kept:
            first, last, rows = kept.unit.start, kept.unit.stop, kept.unit.rows
            self.earlier += [Unit(at, min(at + self.chunk, last), rows) for at in range(first, last, self.chunk)]
        self.kept = []

    def _outside(self) -> Iterator[Unit]:
        """The units of other shards, and those of this one that were kept before."""
        for low, high in ((0, self.shard.start), (self.shard.stop, self.samples)):
            for start in range(low, high, self.chunk):
                for rows in self.bands:
                    yield Unit(start, min(start + self.chunk, high), rows)
        yield from self.earlier

    def _put(self, mine: Kept, other: Kept) -> None:
        """Write the products of samples of this shard with others, and the mirror image where those are of it too."""
        a, b = mine.unit, other.unit
        if self.trace:
            if a.rows == b.rows:
                self._put_trace(a, b, pairs.traces(mine.blocks, other.blocks))
            return
        each = (b.stop - b.start) * len(a.rows) * len(b.rows) * 16
        for piece in pieces(a.stop - a.start, each, self.piece):
            here = Unit(a.start + piece.start, a.start + piece.stop, a.rows)
            found = pairs.products([block[piece] for block in mine.blocks], other.blocks)
            self._view(here, b).copy_(found)
            if self._inside(b) and a != b:
                self._view(b, here).copy_(found.permute(1, 0, 3, 2))
        for piece in pieces(a.stop - a.start, each, self.piece) if a == b else ():
            _even_out(self._view(a, a), piece)

    def _put_trace(self, a: Unit, b: Unit, found: Tensor) -> None:
        found = (found + found.T) / 2 if a == b else found
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


def _even_out(square: Tensor, piece: slice) -> None:
    """Make some samples' rows and columns of `(n, n, rows, rows)` the mean of both: symmetric to the bit."""
    here, there = square[piece, piece.start :], square[piece.start :, piece]
    mean = (here + there.permute(1, 0, 3, 2)).div_(2)
    here.copy_(mean)
    there.copy_(mean.permute(1, 0, 3, 2))

"""Products of one chunk while the rows of its Jacobian come in, all at once or band by band."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from jacray_workers.kernels.common import per_sample
from jacray_workers.problem.problem import Problem
from jacray_workers.products import contract, curvature, spectrum
from jacray_workers.products.dense import plain
from jacray_workers.products.needs import columns
from jacray_workers.products.sums import Gram

# Values by output and leaf, as `ArrayPlan` numbers them.
Found = dict[tuple[int, int], Tensor]


class Part(abc.ABC):
    """One product of one chunk."""

    looks = False

    def look(self, rows: range, blocks: Sequence[Tensor]) -> None:  # noqa: B027  # most need no look
        """See some rows before any is taken, where `looks`."""

    @abc.abstractmethod
    def take(self, rows: range, blocks: Sequence[Tensor]) -> None:
        """Take some rows: blocks `(b, len(rows), *leaf)` by leaf."""

    @abc.abstractmethod
    def found(self) -> Found:
        """The chunk's values."""


class Pairs(Part):
    """`gram`, `ggn` or `fisher` as a matrix."""

    def __init__(self, problem: Problem, p: Tensor | None, piece: int) -> None:
        self.problem, self.gram = problem, Gram(columns(problem), p, piece)
        self.looks = p is not None

    def look(self, rows: range, blocks: Sequence[Tensor]) -> None:
        """Gather the mean rows."""
        self.gram.look(rows, blocks)

    def take(self, rows: range, blocks: Sequence[Tensor]) -> None:
        """Add what the rows contribute."""
        self.gram.take(rows, blocks)

    def found(self) -> Found:
        """By pairs of leaves."""
        return self.gram.pairs(self.problem)


class Pushed(Part):
    """`jvp`, from blocks."""

    def __init__(self, problem: Problem, vectors: Sequence[Tensor]) -> None:
        self.problem, self.vectors = problem, vectors
        self.parts: list[Tensor] = []

    def take(self, rows: range, blocks: Sequence[Tensor]) -> None:
        """Push forward to these rows."""
        del rows
        self.parts.append(contract.push(blocks, self.vectors))

    def whole(self) -> Tensor:
        """`(K, b, rows)`."""
        return torch.cat(self.parts, dim=2)

    def found(self) -> Found:
        """By output."""
        return {(o, -1): part for o, part in enumerate(self.problem.split(self.whole(), axis=2))}


class Pulled(Part):
    """`weighted_gradient`, from blocks; `summed` over samples for the leaves where that is asked for."""

    def __init__(self, cotangents: Callable[[], Tensor], summed: Sequence[bool]) -> None:
        self.cotangents, self.summed = cotangents, summed
        self.totals: list[Tensor] = []

    def take(self, rows: range, blocks: Sequence[Tensor]) -> None:
        """Add what is pulled back from these rows."""
        u = self.cotangents()[:, :, rows.start : rows.stop]
        parts = contract.pull(blocks, u, self.summed)
        self.totals = [a + b for a, b in zip(self.totals, parts, strict=True)] if self.totals else parts

    def found(self) -> Found:
        """By leaf."""
        return {(-1, i): total for i, total in enumerate(self.totals)}


class TimesVectors(Part):
    """`gram`, `ggn` or `fisher` times vectors, from blocks: pushed forward in the look, pulled back in the taking."""

    looks = True

    def __init__(self, problem: Problem, vectors: Sequence[Tensor], p: Tensor | None) -> None:
        self.p = p
        self.leaves = problem.leaves
        self.forth = Pushed(problem, vectors)
        # Summed over samples below, in float64, for leaves that each sample has its own of.
        self.back = Pulled(self._weighted, [not per_sample(leaf) for leaf in problem.leaves])

    def look(self, rows: range, blocks: Sequence[Tensor]) -> None:
        """Push forward to these rows."""
        self.forth.take(rows, blocks)

    def take(self, rows: range, blocks: Sequence[Tensor]) -> None:
        """Pull back from these rows."""
        self.back.take(rows, blocks)

    def found(self) -> Found:
        """By leaf."""
        pulled = [
            total.sum(dim=1, dtype=torch.float64) if per_sample(leaf) else total
            for leaf, total in zip(self.leaves, self.back.totals, strict=True)
        ]
        return {(-1, i): total for i, total in enumerate(pulled)}

    def _weighted(self) -> Tensor:
        return curvature.times(self.p, self.forth.whole())


class Mean(Part):
    """`mean_jacobian`, of a job of `samples`."""

    def __init__(self, problem: Problem, samples: int) -> None:
        self.problem, self.samples = problem, samples
        self.sums: list[list[Tensor]] = [[] for _ in problem.leaves]

    def take(self, rows: range, blocks: Sequence[Tensor]) -> None:
        """Sum these rows over the samples."""
        del rows
        for parts, block in zip(self.sums, blocks, strict=True):
            parts.append(plain(block).sum(dim=0, dtype=torch.float64))

    def found(self) -> Found:
        """By output and leaf."""
        return by_output(self.problem, [torch.cat(parts) for parts in self.sums], self.samples)


class Numbers(Part):
    """`norms`, `singular_values` or `logabsdet` of `size` samples."""

    def __init__(self, name: str, problem: Problem, size: int, top_k: int | None, seed: int, piece: int) -> None:
        self.name, self.top_k, self.seed, self.piece = name, top_k, seed, piece
        self.value = torch.zeros(size, dtype=torch.float64, device=problem.device)

    def take(self, rows: range, blocks: Sequence[Tensor]) -> None:
        """Norms grow with the rows; the others come with all rows at once."""
        del rows
        if self.name == "norms":
            self.value += spectrum.squares(blocks)
        elif self.name == "logabsdet":
            self.value = spectrum.logabsdet(blocks, self.piece)
        else:
            self.value = spectrum.singular_values(blocks, self.top_k, self.seed, self.piece)

    def found(self) -> Found:
        """One array."""
        return {(-1, -1): self.value.sqrt() if self.name == "norms" else self.value}


def by_output(problem: Problem, sums: Sequence[Tensor], samples: int) -> Found:
    """Sums over samples, per leaf `(rows, *leaf)`, as means by output and leaf."""
    return {
        (o, i): part for i, total in enumerate(sums) for o, part in enumerate(problem.split(total / samples, axis=0))
    }

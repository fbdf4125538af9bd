"""What is made from a chunk's Jacobian where it is, so that the Jacobian itself never travels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jacray_workers.errors import RequestError
from jacray_workers.problem import Problem
from jacray_workers.request import Request

# Results that are computed from the Jacobian's blocks; the others have cheaper ways of their own.
FROM_JACOBIAN = frozenset(
    ("jacobian", "mean_jacobian", "norms", "singular_values", "logabsdet", "gram", "ntk", "ggn", "fisher")
)


@dataclass(frozen=True)
class Chunk:
    """The Jacobian of a few samples.

    Attributes:
        blocks: per leaf, `(b, rows, *leaf)`.
        y: the outputs `(b, rows)`, where a product needs them.
        vectors: per leaf `(K, b, *leaf)`, where the request has some.
        samples: how many samples the whole job has.
    """

    blocks: Sequence[Tensor]
    y: Tensor | None
    vectors: Sequence[Tensor] | None
    samples: int


def check(problem: Problem, request: Request) -> None:
    """Refuse products that this problem cannot have.

    Raises:
        RequestError: a log-determinant of a Jacobian that is not square, or a loss that the outputs cannot have.
    """
    columns = sum(leaf.size for leaf in problem.leaves)
    if "logabsdet" in request.returns and columns != problem.rows:
        raise RequestError(
            "returns",
            "logabsdet needs a square Jacobian",
            f"{problem.rows} rows by {columns} columns",
            "choose outputs or wrt so that both have the same size",
        )


def flat(blocks: Sequence[Tensor]) -> Tensor:
    """The Jacobian over all leaves side by side: `(b, rows, columns)`."""
    parts = [block.reshape(*block.shape[:2], -1) for block in blocks]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def norms(chunk: Chunk) -> Tensor:
    """The Frobenius norm of each sample's Jacobian: `(b,)`."""
    squares = [block.reshape(block.shape[0], -1).square().sum(dim=1) for block in chunk.blocks]
    return torch.stack(squares).sum(dim=0).sqrt()


def singular_values(chunk: Chunk, top_k: int | None) -> Tensor:
    """The singular values of each sample's Jacobian, largest first: `(b, rank)`."""
    found: Tensor = torch.linalg.svdvals(flat(chunk.blocks))
    return found if top_k is None else found[:, :top_k]


def logabsdet(chunk: Chunk) -> Tensor:
    """log|det J| of each sample: `(b,)`; minus infinity where J is singular."""
    found: Tensor = torch.linalg.slogdet(flat(chunk.blocks)).logabsdet
    return found


def pair_sums(chunk: Chunk, weight: Tensor | None) -> dict[tuple[int, int], Tensor]:
    """Sum over samples of J_a^T W J_b for every pair of leaves; W is `(b, rows, rows)` or None for the identity."""
    left = [b.reshape(*b.shape[:2], -1) for b in chunk.blocks]
    right = left if weight is None else [weight @ b for b in left]
    shapes = [b.shape[2:] for b in chunk.blocks]
    return {
        (i, j): torch.einsum("brc,brd->cd", a, b).reshape(*shapes[i], *shapes[j])
        for i, a in enumerate(left)
        for j, b in enumerate(right)
    }


def pair_products(chunk: Chunk, weight: Tensor | None) -> list[Tensor]:
    """Sum over samples of J^T W J v, per leaf `(K, *leaf)`, without forming the matrix."""
    if chunk.vectors is None:
        raise RequestError("vectors", "are required for a product with vectors")
    pushed = torch.stack(
        [
            torch.einsum("brc,kbc->kbr", block.reshape(*block.shape[:2], -1), v.reshape(*v.shape[:2], -1))
            for block, v in zip(chunk.blocks, chunk.vectors, strict=True)
        ]
    ).sum(dim=0)
    if weight is not None:
        pushed = torch.einsum("brs,kbs->kbr", weight, pushed)
    return [torch.einsum("kbr,br...->k...", pushed, block) for block in chunk.blocks]


def output_hessian(y: Tensor, loss: str) -> Tensor | None:
    """The Hessian of the loss wrt the outputs, `(b, rows, rows)`, which is also the Fisher matrix of its likelihood.

    `cross_entropy`: diag(p) - p p^T of the softmax over all rows. `mse` (half the squared error, a Gaussian of unit
    variance): the identity, given as None.

    Source: J. Martens, "New insights and perspectives on the natural gradient method", JMLR 2020, section 9.
    """
    if loss == "mse":
        return None
    p = torch.softmax(y, dim=1)
    return torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)


def ntk(a: Sequence[Tensor], b: Sequence[Tensor], trace: bool) -> Tensor:
    """J_a J_b^T summed over leaves: `(n, m, rows, rows)`, or `(n, m)` summed over the diagonal of the outputs."""
    pairs = zip(a, b, strict=True)
    if trace:
        return sum_of(torch.einsum("nrc,mrc->nm", x.flatten(2), y.flatten(2)) for x, y in pairs)
    return sum_of(torch.einsum("nrc,msc->nmrs", x.flatten(2), y.flatten(2)) for x, y in pairs)


def sum_of(parts: object) -> Tensor:
    """The sum of tensors of one shape."""
    found = list(parts)  # type: ignore[call-overload]
    return found[0] if len(found) == 1 else torch.stack(found).sum(dim=0)


def bytes_of_pairs(problem: Problem, item: int) -> int:
    """Bytes of the matrices over all pairs of leaves."""
    columns = sum(leaf.size for leaf in problem.leaves)
    return math.prod((columns, columns, item))

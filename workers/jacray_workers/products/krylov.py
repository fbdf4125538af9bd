"""The largest singular values of many Jacobians at once, from products with vectors alone.

Block Golub-Kahan-Lanczos bidiagonalisation with full reorthogonalisation of both bases and thick restarts. It never
squares the Jacobian, so that small values keep the accuracy that a dense decomposition gives them: an error of a few
units of rounding times the largest value.

Sources: G. Golub, F. Luk and M. Overton, "A block Lanczos method for computing the singular values and corresponding
singular vectors of a matrix" (1981); J. Baglama and L. Reichel, "Augmented implicitly restarted Lanczos
bidiagonalization methods" (2005); for the bound that ends it B. Parlett, "The Symmetric Eigenvalue Problem" (1998),
section 11.7.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from jacray_workers.problem.problem import Problem
from jacray_workers.products.dense import inner
from jacray_workers.unwanted import look

Operator = Callable[[Tensor], Tensor]

# Vectors beyond the k asked for: a block this wide sees every copy of a k-fold value, and converges in few passes.
EXTRA = 4
# Blocks in the basis before a restart.
BLOCKS = 8
# A small side of this many blocks makes a Jacobian large: finding its top values costs about as many passes.
LARGE = 24
# How far beyond one unit of rounding, times the largest value, an error may lie.
UNITS = 32


def block(k: int) -> int:
    """Vectors in flight for the k largest values."""
    return k + EXTRA


def pays(rows: int, columns: int, k: int | None) -> bool:
    """Whether the k largest values are cheaper to find this way than from a dense Jacobian."""
    return k is not None and min(rows, columns) >= LARGE * block(k)


def numbers(rows: int, columns: int, k: int) -> int:
    """How many numbers the bases and their images hold for one sample."""
    return (BLOCKS + 2) * block(k) * (2 * min(rows, columns) + max(rows, columns))


def of_dense(jacobian: Tensor, k: int, seed: int) -> Tensor:
    """The k largest singular values of `(b, rows, columns)`, by products with the dense matrix."""
    unit = torch.finfo(jacobian.dtype).eps

    def push(v: Tensor) -> Tensor:
        columns = v.to(jacobian.dtype).mT.contiguous()
        return torch.stack([inner(j, c) for j, c in zip(jacobian, columns, strict=True)])

    def pull(u: Tensor) -> Tensor:
        return jacobian.mT @ u.to(jacobian.dtype)

    found, good = largest(push, pull, tuple(jacobian.shape), k, jacobian.device, unit, seed)
    found = found.to(jacobian.dtype)
    for i in (~good).nonzero().flatten().tolist():
        found[i] = torch.linalg.svdvals(jacobian[i])[:k]
    return found


def of_problem(problem: Problem, kernel: Any, batch: Sequence[Tensor], k: int, seed: int) -> tuple[Tensor, Tensor]:
    """The k largest singular values of a chunk's Jacobians, and which samples' have converged, by passes alone."""
    size, leaves = batch[0].shape[0], problem.leaves
    columns = sum(leaf.size for leaf in leaves)

    def push(v: Tensor) -> Tensor:
        parts = v.permute(2, 0, 1).split([leaf.size for leaf in leaves], dim=2)
        shaped = [p.reshape(*p.shape[:2], *leaf.shape).to(leaf.dtype) for p, leaf in zip(parts, leaves, strict=True)]
        found: Tensor = kernel.jvp(problem, batch, shaped)
        return found.permute(1, 2, 0)

    def pull(u: Tensor) -> Tensor:
        found = kernel.vjp(problem, batch, u.permute(2, 0, 1).to(problem.dtype), per_sample_params=True)
        flat = [part.reshape(*part.shape[:2], part.shape[2:].numel()) for part in found]
        return torch.cat(flat, dim=2).permute(1, 2, 0)

    unit = max(torch.finfo(dtype).eps for dtype in (problem.dtype, *(leaf.dtype for leaf in leaves)))
    return largest(push, pull, (size, problem.rows, columns), k, problem.device, unit, seed)


def largest(
    push: Operator, pull: Operator, shape: tuple[int, ...], k: int, device: torch.device, unit: float, seed: int
) -> tuple[Tensor, Tensor]:
    """The k largest singular values, and which samples' have converged.

    Args:
        push: `(b, columns, w)` to `(b, rows, w)`, the product with J.
        pull: `(b, rows, w)` to `(b, columns, w)`, the product with J^T.
        shape: b, rows, columns.
        k: how many.
        device: where to work, in float64 whatever the products are in: in float32 the bases' long vectors would lose
            their orthogonality.
        unit: the rounding of the products.
        seed: of the first block, which is the same for every sample.

    Returns:
        `(b, k)`, largest first, and `(b,)`. A sample whose products are not finite has NaN, and counts as converged.
    """
    batch, rows, columns = shape
    forth, back = (pull, push) if rows <= columns else (push, pull)
    space = _Space(forth, back, batch, min(rows, columns), max(rows, columns), k, device, seed)
    done = space.bad
    # Twice the passes that a dense Jacobian takes: what has not converged by then is found from one.
    for _ in range(2 * space.side // space.width + BLOCKS):
        look()
        space.grow()
        done = space.converged(unit)
        if bool(done.all()):
            break
    return torch.where(space.bad.unsqueeze(1), torch.nan, space.values[:, :k]), done


class _Space:
    """Bases Q `(b, side, m)` and V `(b, other, m)` with A Q = V T, and the images Z = A^T V `(b, side, m)`."""

    def __init__(
        self,
        forth: Operator,
        back: Operator,
        batch: int,
        side: int,
        other: int,
        k: int,
        device: torch.device,
        seed: int,
    ) -> None:
        self.forth, self.back, self.k, self.side = forth, back, k, side
        self.width = min(block(k), side)
        self.random = torch.Generator().manual_seed(seed)
        like = torch.empty(0, dtype=torch.float64, device=device)
        self.q, self.z = like.new_zeros(batch, side, 0), like.new_zeros(batch, side, 0)
        self.v = like.new_zeros(batch, other, 0)
        self.t = like.new_zeros(batch, 0, 0)
        self.bad = torch.zeros(batch, dtype=torch.bool, device=device)
        self.values, self.residuals = like.new_zeros(batch, 0), like.new_zeros(batch, 0)

    def grow(self) -> None:
        """Add one block to each basis; before that, where they are full, keep only what matters of them."""
        if self.q.shape[2] >= self.side:
            return
        width = min(self.width, self.side - self.q.shape[2])
        start = self.z[:, :, -width:] if self.z.shape[2] else self.z.new_zeros(*self.z.shape[:2], width)
        fresh = self._orthonormal(start, self.q)
        if self.q.shape[2] + width > BLOCKS * self.width:
            self._restart()
        images = self._finite(self.forth(fresh))
        other = self._orthonormal(images, self.v)
        self.q, self.v = torch.cat([self.q, fresh], dim=2), torch.cat([self.v, other], dim=2)
        columns = self.v.mT @ images
        padded = torch.cat([self.t, self.t.new_zeros(self.t.shape[0], width, self.t.shape[2])], dim=1)
        self.t = torch.cat([padded, columns], dim=2)
        self.z = torch.cat([self.z, self._finite(self.back(other))], dim=2)
        self._decompose()

    def converged(self, unit: float) -> Tensor:
        """Which samples' k leading values are right to a few units of rounding of the largest: `(b,)`.

        With R the residuals A^T v - s q of the leading j >= k triplets, their values' error is at most |R|, and at most
        |R|^2 over the gap between the j-th value and those left, for whichever j serves best.
        """
        k, values = self.k, self.values
        allowed = UNITS * unit * values[:, 0]
        plain = self.residuals[:, :k].amax(dim=1)
        whole = self.residuals.square().cumsum(dim=1)[:, k - 1 : -1]
        # The values left are known from below only, as far as their own residuals.
        gaps = values[:, k - 1 : -1] - values[:, k:] - self.residuals[:, k:]
        found = torch.where(gaps > 0, whole / gaps, torch.inf)
        bound = torch.minimum(plain, found.amin(dim=1)) if found.shape[1] else plain
        return (bound <= allowed) | self.bad | (self.q.shape[2] >= self.side)

    def _decompose(self) -> None:
        left, values, right = torch.linalg.svd(self.t)
        self.left, self.values, self.right = left, values, right.mT
        residual = self.z @ left - self.q @ (self.right * values.unsqueeze(1))
        self.residuals = torch.linalg.vector_norm(residual, dim=1)

    def _restart(self) -> None:
        keep = self.width + self.k
        left, right = self.left[:, :, :keep], self.right[:, :, :keep]
        self.q, self.v, self.z = self.q @ right, self.v @ left, self.z @ left
        self.t = torch.diag_embed(self.values[:, :keep])

    def _finite(self, images: Tensor) -> Tensor:
        """The images; zeros, from now on, for a sample where one is not finite."""
        self.bad |= ~images.isfinite().all(dim=2).all(dim=1)
        return torch.where(self.bad[:, None, None], 0.0, images.double())

    def _orthonormal(self, block: Tensor, basis: Tensor) -> Tensor:
        """An orthonormal block outside of the basis that spans what the block adds to it.

        A column that adds nothing is replaced by a random direction, the same for every sample.
        """
        found: Tensor = _outside(_outside(block, basis), basis)
        noise = torch.randn(block.shape[1:], generator=self.random, dtype=torch.float64).to(block)
        noise = noise / torch.linalg.vector_norm(noise, dim=0)
        scale = torch.linalg.vector_norm(found, dim=1, keepdim=True)
        found = torch.where(scale > 0, found / scale, 0.0) + torch.finfo(block.dtype).eps * noise
        # Twice is enough for columns that stand; those that the noise made need the third round.
        for _ in range(3):
            found = torch.linalg.qr(_outside(found, basis)).Q
        return found


def _outside(block: Tensor, basis: Tensor) -> Tensor:
    return block - basis @ (basis.mT @ block)

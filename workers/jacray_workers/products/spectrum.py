"""Norms, singular values and log-determinants of each sample's Jacobian.

Accuracy of singular values: like LAPACK's, an error of a few units of rounding of the Jacobian's precision times the
largest value, whatever the size of the value itself; with `top_k` found by passes alone, up to `krylov.UNITS` of them.
NaN or infinity in a sample's Jacobian makes that sample's numbers NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jacray_workers.blocks.block import Block, as_block
from jacray_workers.products import krylov
from jacray_workers.products.dense import factored, flat, flat_pieces, matrix, pieces

# From this ratio of the sides on, the small one is worked on; LAPACK's own drivers change their way at about 1.8.
TALL = 2
# Columns that are made float64 at a time.
STRIPE = 4096


def squares(blocks: Sequence[Tensor]) -> Tensor:
    """The sum of squares over rows and columns, of each sample: `(b,)` in float64."""
    return torch.stack([_squares(block) for block in blocks]).sum(dim=0)


def _squares(block: Tensor) -> Tensor:
    if factored(block):
        return block.norms().double().square()
    rows = matrix(block)
    # Row by row in the block's precision, then in float64: no copy of the block, and no sum of millions of float32.
    wide = torch.promote_types(rows.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=2, dtype=wide)
    return norms.double().square().sum(dim=1)


def logabsdet(blocks: Sequence[Tensor], piece: int) -> Tensor:
    """log|det J| of each sample, `(b,)` in float64: minus infinity where J is singular to the bit.

    The factorisation is in float64 whatever the Jacobian's precision; `piece` bounds the bytes of its copies.
    """
    parts = flat_pieces(blocks, piece, 3)
    return torch.cat([torch.linalg.slogdet(part.double()).logabsdet for _, part in parts])


def singular_values(blocks: Sequence[Tensor], top_k: int | None, seed: int, piece: int) -> Tensor:
    """Each sample's singular values, largest first: `(b, rank)`, or the first `top_k` of them.

    `piece` bounds the bytes of intermediates, one sample's at least.
    """
    if any(factored(block) for block in blocks) and all(block.dtype != torch.float64 for block in blocks):
        return _from_factors(blocks)[:, :top_k]
    rows, columns = blocks[0].shape[1], sum(block.shape[2:].numel() for block in blocks)
    # From a dense wide matrix all values are about as cheap.
    lanczos = krylov.pays(rows, columns, top_k) and max(rows, columns) < TALL * min(rows, columns)
    found = [
        krylov.of_dense(part, top_k or 1, seed) if lanczos else values(part)
        for _, part in flat_pieces(blocks, piece, 3)
    ]
    return torch.cat(found)[:, :top_k]


def of_blocks(blocks: Sequence[Tensor]) -> Tensor:
    """All singular values, made dense: `(b, rank)`."""
    return values(flat(blocks))


def values(jacobian: Tensor) -> Tensor:
    """All singular values of `(b, rows, columns)`: `(b, rank)`, NaN where a number of the sample is not finite."""
    small, large = sorted(jacobian.shape[1:])
    good = jacobian.isfinite().all(dim=2).all(dim=1)
    if not bool(good.all()):
        # LAPACK refuses the whole batch for one such sample.
        jacobian = torch.where(good[:, None, None], jacobian, 0.0)
    if small == 0:
        return jacobian.new_zeros(jacobian.shape[0], 0)
    if small == 1:
        found = torch.linalg.vector_norm(jacobian, dim=(1, 2)).unsqueeze(1)
    elif large < TALL * small:
        found = torch.linalg.svdvals(jacobian)
    else:
        wide = jacobian if jacobian.shape[1] == small else jacobian.mT
        found = _from_rows(wide)
    return torch.where(good.unsqueeze(1), found, torch.nan)


def _from_rows(wide: Tensor) -> Tensor:
    """Singular values of `(b, small, large)` through its small side.

    In float64 through a QR factorisation, since a Gram matrix squares the condition. In float32 through a Gram matrix
    in float64: what squaring loses there, sqrt(2^-53) of the largest value, is below float32's own rounding.
    """
    if wide.dtype == torch.float64:
        found: Tensor = torch.linalg.svdvals(torch.linalg.qr(wide.mT, mode="r").R)
        return found
    gram = torch.zeros(*wide.shape[:2], wide.shape[1], dtype=torch.float64, device=wide.device)
    for columns in pieces(wide.shape[2], 1, STRIPE):
        part = wide[:, :, columns].double()
        gram.baddbmm_(part, part.mT)
    return _roots(gram).to(wide.dtype)


def _roots(gram: Tensor) -> Tensor:
    """Square roots of the eigenvalues, largest first."""
    found: Tensor = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(1)
    return found


def _from_factors(blocks: Sequence[Tensor]) -> Tensor:
    """The same from factors: sample by sample a Gram matrix over the rows in float64, and no dense block."""
    grams = []
    for i in range(blocks[0].shape[0]):
        parts = [_wide(block[i : i + 1]).gram()[0, :, 0] for block in blocks]
        grams.append(torch.stack(parts).sum(dim=0))
    gram = torch.stack(grams)
    good = gram.isfinite().all(dim=2).all(dim=1)
    found = _roots(torch.where(good[:, None, None], gram, 0.0))
    rank = min(blocks[0].shape[1], sum(block.shape[2:].numel() for block in blocks))
    return torch.where(good.unsqueeze(1), found, torch.nan)[:, :rank].to(
        torch.promote_types(blocks[0].dtype, torch.float32)
    )


def _wide(block: Tensor) -> Block:
    return as_block(block.double(), block.shape[2:])

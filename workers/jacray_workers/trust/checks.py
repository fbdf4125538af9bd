"""Verify a few of a job's samples inside the shard that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jacray_workers.kernels import pick
from jacray_workers.kernels.common import per_sample
from jacray_workers.plan import Shard
from jacray_workers.problem.problem import Problem
from jacray_workers.problem.resolve import place
from jacray_workers.products import FROM_JACOBIAN
from jacray_workers.shard import Check
from jacray_workers.trust import verify
from jacray_workers.trust.alike import alike
from jacray_workers.trust.reference import in_float64
from jacray_workers.trust.verify import Computed

if TYPE_CHECKING:
    from jacray_workers.engine import Prepared

SAMPLES = 3
# A sum over the batch is checked on as many samples as one cheap float64 backward takes.
SUMMED = 8
# A sample's Jacobian that was not kept is computed again for the check up to this many bytes.
RECOMPUTED = 1 << 28


def samples_to_check(wanted: bool | int | None, samples: int) -> list[int]:
    """Which samples of a job are verified: spread evenly, the first and the last among them."""
    if wanted is None or wanted is False:
        return []
    count = SAMPLES if wanted is True else int(wanted)
    if count <= 1 or samples == 1:
        return [0][:count]
    count = min(count, samples)
    return sorted({round(i * (samples - 1) / (count - 1)) for i in range(count)})


def check_shard(prepared: Prepared, shard: Shard, blocks: dict[str, Tensor]) -> tuple[Check, ...]:
    """Check those of the job's chosen samples that fall in this shard; called inside `problem.session()`.

    Raises:
        VerificationError: a check did not hold.
    """
    problem, seed = prepared.problem, prepared.request.seed
    chosen = samples_to_check(prepared.request.verify, prepared.plan.samples)
    mine = [sample for sample in chosen if shard.start <= sample < shard.stop]
    if not mine:
        return ()
    double = in_float64(problem)
    checks: list[Check] = []
    for sample in mine:
        batch = place(problem, [leaf[sample : sample + 1] for leaf in prepared.leaves])
        computed = _computed(prepared, batch, sample, sample - shard.start, blocks)
        checks += verify.check_sample(problem, batch, sample, computed, seed=seed, double=double)
    if shard.index == 0:
        checks += _summed(prepared)
    verify.raise_if_failed(checks)
    return tuple(checks)


def _computed(prepared: Prepared, batch: Sequence[Tensor], sample: int, at: int, blocks: dict[str, Tensor]) -> Computed:
    """What the shard holds for one sample, in the shapes that the check takes."""
    plan, problem = prepared.plan, prepared.problem
    jacobian = gradients = pushed = cotangents = tangents = None
    if arrays := plan.array("jacobian"):
        by_place = {(a.out, a.leaf): blocks[a.key] for a in arrays}
        jacobian = [
            _rows([by_place[o, i][at : at + 1] for o in range(len(problem.outs))], leaf.shape)
            for i, leaf in enumerate(problem.leaves)
        ]
    elif FROM_JACOBIAN.intersection(prepared.request.returns) and _small(problem):
        # Only products were kept: the method that made them is checked on this sample instead.
        jacobian = pick(plan.method).jacobian(problem, batch)
    arrays = plan.array("weighted_gradient")
    if prepared.cotangents is not None and any(a.axis >= 0 for a in arrays):
        # A gradient that was added over the batch has no sample of its own; `_summed` checks those.
        many = prepared.cotangents.many
        gradients = [_one(blocks[a.key], a.axis, at, many) if a.axis >= 0 else None for a in arrays]
        cotangents = _flat(prepared.cotangents.select(sample, sample + 1))[:, 0]
    if (arrays := plan.array("jvp")) and prepared.tangents:
        parts = [_one(blocks[a.key], a.axis, at, prepared.tangents.many) for a in arrays]
        pushed = torch.cat([part.reshape(part.shape[0], -1) for part in parts], dim=1)
        tangents = [part[:, 0] for part in prepared.tangents.select(sample, sample + 1)]
    return Computed(jacobian, cotangents, gradients, tangents, pushed)


def _small(problem: Problem) -> bool:
    return problem.rows * sum(leaf.size for leaf in problem.leaves) * problem.dtype.itemsize <= RECOMPUTED


def _rows(parts: Sequence[Tensor], leaf: tuple[int, ...]) -> Tensor:
    """One sample's blocks of all outputs as `(rows, *leaf)`."""
    dense = [part.dense() if hasattr(part, "dense") else part for part in parts]
    return torch.cat([part.reshape(-1, *leaf) if leaf else part.reshape(-1) for part in dense])


def _one(array: Tensor, axis: int, at: int, many: bool) -> Tensor:
    """One sample of an array, with a leading K."""
    part = array.select(axis, at)
    return part if many else part.unsqueeze(0)


def _flat(parts: Sequence[Tensor]) -> Tensor:
    """Cotangents by output as `(K, B, rows)`."""
    return torch.cat([part.reshape(*part.shape[:2], -1) for part in parts], dim=2)


def _summed(prepared: Prepared) -> tuple[Check, ...]:
    """For gradients that were added over the batch: the same method on the first samples against one plain backward."""
    problem, ks = prepared.problem, prepared.cotangents
    sums = [a for a in prepared.plan.array("weighted_gradient") if a.axis < 0]
    if not sums or ks is None:
        return ()
    count = min(SUMMED, prepared.plan.samples, prepared.plan.chunk_size)
    batch = place(problem, [leaf[:count] for leaf in prepared.leaves])
    if prepared.plan.compared and not alike(problem, batch):
        batch, count = [leaf[:1] for leaf in batch], 1
    rows = _flat(ks.select(0, count))
    found = pick(prepared.plan.method).vjp(problem, batch, rows, per_sample_params=False)
    result = [None if per_sample(leaf) else grad for leaf, grad in zip(problem.leaves, found, strict=True)]
    return verify.check_sum(problem, batch, rows, result, seed=prepared.request.seed)

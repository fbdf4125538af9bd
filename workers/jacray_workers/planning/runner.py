"""The work of a method on a few samples, as a trial runs it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jacray_workers.blocks.block import Block, DenseBlock
from jacray_workers.kernels.common import blocks_for
from jacray_workers.planning import memory
from jacray_workers.planning.case import Case


def kept_as_factors(block: Tensor) -> bool:
    """Whether a block is held in factors."""
    return isinstance(block, Block) and not isinstance(block, DenseBlock)


def runner(
    case: Case, kernel: Any, batch: list[Tensor], trial_rows: range | None = None, *, reuse: bool = False
) -> Callable[[], list[Tensor]]:
    """The kernel's work on these samples, and for methods that go by rows on these rows.

    With `reuse` it writes to one set of buffers again and again, as a shard does.
    """
    trial_rows = case.rows if trial_rows is None else trial_rows
    problem, request = case.problem, case.request
    size = batch[0].shape[0]
    u = torch.ones(case.directions, size, problem.rows, dtype=problem.dtype, device=problem.device)
    if case.known is not None and size == len(case.batch[0]):
        u = case.known.cotangent.expand(case.directions, -1, -1)
    if case.work == "vjp":
        return lambda: kernel.vjp(problem, batch, u, per_sample_params=request.reduction == "none")
    if case.work in ("jvp", "both"):
        vs = [
            torch.ones(case.directions, width, *leaf.shape, dtype=leaf.dtype, device=problem.device).expand(
                -1, size, *leaf.shape
            )
            for leaf, width in zip(problem.leaves, (1 if alike else size for alike in case.alike), strict=True)
        ]
        if case.work == "jvp":
            return lambda: [kernel.jvp(problem, batch, vs)]
        keep = "singular_values" in request.returns or request.reduction == "none"
        return lambda: [kernel.jvp(problem, batch, vs), *kernel.vjp(problem, batch, u, per_sample_params=keep)]
    if case.work == "outputs":
        return lambda: [problem.forward(problem.values(batch), batch)]
    if keeps_factors(case, kernel):
        return lambda: kernel.jacobian(problem, batch, trial_rows, form=request.form)
    rows = None if kernel.__name__.endswith(("chain", "forward")) else trial_rows
    into = blocks_for(problem, size, problem.rows if rows is None else len(rows), None) if reuse else None
    for block in into or ():
        # Mapped now: the first write to fresh memory would count against the method that happens to come first.
        block.zero_()
    return lambda: kernel.jacobian(problem, batch, rows, into)


@dataclass(frozen=True)
class Look:
    """A run that was watched: what it made, the bytes of tensors alive at its peak, and the seconds that it took."""

    blocks: list[Tensor]
    peak: int
    seconds: float


def look(run: Callable[[], list[Tensor]], device: torch.device, given: Sequence[Any]) -> Look:
    """Run once for everything that a run can show; `given` stood before it."""
    blocks: list[Tensor] = []
    began = time.perf_counter()
    peak = memory.measure(lambda: blocks.extend(run()), device, given)
    return Look(blocks, peak, time.perf_counter() - began)


def keeps_factors(case: Case, kernel: Any) -> bool:
    """Whether the kernel may answer with factors."""
    return (
        case.work == "jacobian"
        and case.request.form != "dense"
        and kernel.__name__.endswith("layerwise")
        and any(leaf.side == "param" for leaf in case.problem.leaves)
    )

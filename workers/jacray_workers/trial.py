"""Try a method on a few samples: does it run, does it agree with plain autograd, what does it cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jacray_workers.errors import UserError
from jacray_workers.kernels import backward_loop, pick
from jacray_workers.kernels.common import per_sample
from jacray_workers.memory import out_of_memory
from jacray_workers.problem import Problem
from jacray_workers.resolve import place

# How far two float computations of the same directional number may lie apart, relative to its natural size. A wrong
# formula misses by its whole size; this only has to let rounding through.
AGREEMENT = {torch.float64: 1e-7, torch.float32: 5e-3, torch.bfloat16: 0.2, torch.float16: 0.05}


@dataclass(frozen=True)
class Reference:
    """Plain autograd's answer on the trial samples, one sample at a time.

    Attributes:
        cotangent: `(1, b, rows)`, random.
        grads: per leaf, `(1, b, *leaf)`.
        rows: the rows on which the cotangent is not zero; trials of methods that go row by row need only these.
    """

    cotangent: Tensor
    grads: list[Tensor]
    rows: range


def reference(problem: Problem, batch: Sequence[Tensor], seed: int, rows: range) -> Reference | None:
    """Pull a random cotangent back by plain autograd; None where the model does not let that run."""
    size = batch[0].shape[0]
    random = torch.Generator().manual_seed(seed)
    u = torch.randn(1, size, problem.rows, generator=random, dtype=torch.float64).to(problem.device, problem.dtype)
    u[:, :, rows.stop :] = 0
    try:
        parts = [
            backward_loop.vjp(problem, [leaf[i : i + 1] for leaf in batch], u[:, i : i + 1], per_sample_params=True)
            for i in range(size)
        ]
    except Exception as error:
        if out_of_memory(error):
            raise
        return None
    return Reference(u, [torch.cat(grads, dim=1) for grads in zip(*parts, strict=True)], rows)


def disagreement(found: Sequence[Tensor], known: Reference) -> float:
    """The largest difference between u^T J by the method and by plain autograd, relative to its size.

    `found` holds the method's blocks: `(b, rows, *leaf)`, or only the reference's rows of them.
    """
    worst = 0.0
    for block, grad in zip(found, known.grads, strict=True):
        dense = block.dense() if hasattr(block, "dense") else block
        u = known.cotangent[0, :, : dense.shape[1]]
        mine = torch.einsum("br,br...->b...", u.double(), dense.double())
        worst = max(worst, _relative(mine, grad[0].double(), dense, u))
    return worst


def vjp_disagreement(problem: Problem, found: Sequence[Tensor], known: Reference, summed: bool) -> float:
    """The same for a method's weighted gradients with the reference's cotangent."""
    worst = 0.0
    for leaf, mine, grad in zip(problem.leaves, found, known.grads, strict=True):
        right = grad[0].sum(dim=0) if summed and not per_sample(leaf) else grad[0]
        worst = max(worst, _relative(mine[0].double(), right.double(), right, None))
    return worst


def _relative(a: Tensor, b: Tensor, block: Tensor, cotangent: Tensor | None) -> float:
    """max|a - b| over the size that the terms of the sum have: cancellation is not disagreement."""
    if a.numel() == 0:
        return 0.0
    if not bool(torch.isfinite(b).all()):
        # Where plain autograd has NaN there is nothing to compare.
        return 0.0
    if not bool(torch.isfinite(a).all()):
        return float("inf")
    scale = b.abs().max()
    if cotangent is not None and block.numel():
        scale = torch.maximum(scale, block.double().abs().max() * cotangent.double().abs().max())
    return float((a - b).abs().max() / scale) if scale > 0 else float((a - b).abs().max())


# What torch's longest messages come down to.
_KNOWN = (
    ("data-dependent control flow", "vmap cannot follow .item() or a branch on a tensor's value"),
    ("vmap: inplace arithmetic", "the model writes a sample's values into a tensor shared by all samples"),
    ("setup_context staticmethod", "a custom autograd.Function without setup_context is closed to torch.func"),
    ("generate_vmap_rule", "a custom autograd.Function without a vmap rule is closed to vmap"),
    ("saved tensor hooks", "saved-tensor hooks (as checkpointing uses them) are closed to torch.func"),
    ("_flat_weights", "fused recurrent kernels are closed to vmap"),
)


def why(error: BaseException) -> str:
    """An error as one short line."""
    text = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, UserError):
        return error.rule if error.value is None else f"{error.rule} ({error.value})"
    for known, short in _KNOWN:
        if known in text:
            return short
    return f"{type(error).__name__}: {text[:200]}"


def admits(method: str, problem: Problem, known: Reference | None, run: Callable[[Any], float]) -> str:
    """Why the method must be refused after running it on the trial samples, or the empty string.

    `run` computes with the kernel it is given and returns its disagreement with the reference.
    """
    kernel = pick(method)
    refused: str = kernel.refuse(problem)
    if refused:
        return refused
    try:
        error = run(kernel)
    except Exception as failure:
        if out_of_memory(failure):
            raise
        return why(failure)
    if known is not None and error > AGREEMENT[problem.dtype]:
        return f"disagrees with plain autograd by {error:.1e} of the size of the result"
    return ""


def first_samples(problem: Problem, leaves: Sequence[Tensor], count: int) -> list[Tensor]:
    """The first few samples, placed."""
    return place(problem, [leaf[:count] for leaf in leaves])

"""Try a method on a few samples: does it run, does it agree with plain autograd, what does it cost."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jacray_workers.errors import MethodError, UserError
from jacray_workers.kernels import backward_loop, pick
from jacray_workers.kernels.common import per_sample
from jacray_workers.planning.memory import out_of_memory
from jacray_workers.problem.problem import Problem
from jacray_workers.problem.resolve import place
from jacray_workers.trust.evidence import largest
from jacray_workers.trust.projection import size_of
from jacray_workers.trust.reference import generator, normal, points
from jacray_workers.trust.slope import slope

# How far two float computations of the same directional number may lie apart, relative to its natural size. A wrong
# formula misses by its whole size; this only has to let rounding through.
AGREEMENT = {torch.float64: 1e-7, torch.float32: 5e-3, torch.bfloat16: 0.2, torch.float16: 0.05}
SMALL = 1e-3


@dataclass(frozen=True)
class Reference:
    """Plain autograd's answer on the trial samples, one sample at a time.

    Attributes:
        cotangent: `(1, b, rows)`, random.
        grads: per leaf, `(1, b, *leaf)`.
        rows: the rows on which the cotangent is not zero; trials of methods that go row by row need only these.
        dtype: the coarsest precision that the model passes through, which decides how far answers may lie apart.
    """

    cotangent: Tensor
    grads: list[Tensor]
    rows: range
    dtype: torch.dtype


def reference(
    problem: Problem, batch: Sequence[Tensor], seed: int, rows: range, dtype: torch.dtype
) -> Reference | None:
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
    return Reference(u, [torch.cat(grads, dim=1) for grads in zip(*parts, strict=True)], rows, dtype)


def disagreement(found: Sequence[Tensor], known: Reference) -> float:
    """The largest difference between u^T J by the method and by plain autograd, relative to its size.

    `found` holds the method's blocks: `(b, rows, *leaf)`, or only the reference's rows of them.
    """
    gaps = []
    for block, grad in zip(found, known.grads, strict=True):
        dense = block.dense() if hasattr(block, "dense") else block
        u = known.cotangent[0, :, : dense.shape[1]]
        # The terms of the sum may be larger than the sum: their cancellation is not disagreement.
        terms = largest(dense) * largest(u) if dense.numel() else 0.0
        gaps.append(_gap(_projected(u, dense, terms), grad[0], terms))
    return _worst(gaps, known.dtype)


def _projected(u: Tensor, dense: Tensor, terms: float) -> Tensor:
    """u^T J per sample: in the block's own precision where that is single and has room, for float64 copies are dear."""
    roomy = dense.dtype == torch.float32 and dense.device.type == "cpu" and terms < torch.finfo(torch.float32).max / 128
    dtype = torch.float32 if roomy else torch.float64
    size, rows = dense.shape[:2]
    flat = dense.to(dtype).reshape(size, rows, math.prod(dense.shape[2:]))
    return torch.bmm(u.to(dtype)[:, None], flat).reshape(size, *dense.shape[2:])


def vjp_disagreement(problem: Problem, found: Sequence[Tensor], known: Reference) -> float:
    """The same for a method's weighted gradients `(1, b, *leaf)`, or `(1, *param)`, with the reference's cotangent."""
    gaps = []
    for leaf, mine, grad in zip(problem.leaves, found, known.grads, strict=True):
        right = grad[0].sum(dim=0) if mine.dim() == len(leaf.shape) + 1 else grad[0]
        gaps.append(_gap(mine[0].double(), right.double(), 0.0))
    return _worst(gaps, known.dtype)


def jvp_disagreement(pushed: Tensor, known: Reference) -> float:
    """The same for a method's push-forward `(b, rows)` of ones in every leaf: u^T (J 1) against the sum of u^T J."""
    terms = known.cotangent[0].double() * pushed.double()
    right = torch.stack([grad[0].double().reshape(len(terms), -1).sum(dim=1) for grad in known.grads]).sum(dim=0)
    sizes = [float(grad.double().abs().amax()) for grad in known.grads if grad.numel()]
    size = max([*sizes, float(terms.abs().amax()) if terms.numel() else 0.0])
    return _worst([_gap(terms.sum(dim=1), right, size)], known.dtype)


def _gap(a: Tensor, b: Tensor, terms: float) -> tuple[float, float]:
    """max|a - b| where plain autograd's b is finite, and the size that both have."""
    a, b = (a, b) if a.dtype == b.dtype == torch.float32 else (a.double(), b.double())
    if b.numel() and not math.isfinite(largest(b)):
        finite = torch.isfinite(b)
        a, b = a[finite], b[finite]
    if a.numel() == 0:
        return 0.0, 0.0
    distance = largest(a - b)
    if not math.isfinite(distance):
        return float("inf"), 1.0
    return distance, max(largest(b), terms if math.isfinite(terms) else 0.0)


def _worst(gaps: Sequence[tuple[float, float]], dtype: torch.dtype) -> float:
    """The largest gap by its size.

    A block far smaller than the largest may be zero on paper, and is then all rounding of the others: its gap is
    measured by theirs.
    """
    floor = max(SMALL, 16 * torch.finfo(dtype).eps / AGREEMENT[dtype]) * max((size for _, size in gaps), default=0.0)
    return max((gap / max(size, floor) if max(size, floor) > 0 else gap for gap, size in gaps), default=0.0)


def stray(problem: Problem, batch: Sequence[Tensor]) -> str:
    """A parameter that the model also reads past its modules, from a plain list or a closure; or the empty string.

    Other values are put in a parameter's place where its module keeps it. A use elsewhere does not see them, and its
    share of the derivative would be lost without a word.
    """
    names = [leaf.name for leaf in problem.leaves if leaf.side == "param"]
    own = dict(problem.module.named_parameters())
    watched = {name: own[name] for name in names if own[name].is_leaf}
    if not watched:
        return ""
    values = problem.values(batch)
    try:
        for parameter in watched.values():
            parameter.requires_grad_(True)
        y = problem.forward(values, batch)
        if not y.requires_grad:
            return ""
        grads: tuple[Tensor | None, ...] = torch.autograd.grad(y.sum(), tuple(watched.values()), allow_unused=True)
        return next((name for name, grad in zip(watched, grads, strict=True) if grad is not None), "")
    except Exception as error:
        if out_of_memory(error):
            raise
        return ""
    finally:
        for parameter in watched.values():
            parameter.requires_grad_(False)


def cut_off(problem: Problem, batch_of_one: Sequence[Tensor]) -> bool:
    """Whether the outputs change with the leaves while no derivative leads from them to any: detached, or no grad.

    Zeros would be what torch gives, and nobody's Jacobian. A step function has none of its own and is let through.
    """
    try:
        values = [value.detach().requires_grad_() for value in problem.values(batch_of_one)]
        handed = [v.clone() if per_sample(leaf) else v for leaf, v in zip(problem.leaves, values, strict=True)]
        if problem.rows == 0 or problem.forward(handed, batch_of_one).requires_grad:
            return False
        point = points(problem, batch_of_one, 0, None)[0]
        source = generator(problem.seed)
        found = slope(
            point,
            [
                normal(point.at(leaf, v), source) * size_of(v)
                for leaf, v in zip(problem.leaves, point.values(), strict=True)
            ],
            SMALL,
        )
    except Exception as error:
        if out_of_memory(error):
            raise
        return False
    return found is not None and found.smooth and bool((found.value.abs() > 16 * found.error).any())


# What torch's messages come down to.
_BATCHED = "vmap cannot follow a shape that depends on a tensor's values, as indexing with a mask gives"
_SHAPED = (
    "under vmap a fused recurrent kernel, or a write into a tensor shared by all samples, meets shapes that it was not"
    " made for"
)
_KNOWN = (
    (r"data-dependent control flow", "vmap cannot follow .item() or a branch on a tensor's value"),
    (r"vmap over torch\.(allclose|equal|is_nonzero)", r"vmap cannot follow torch.\1, whose result is a Python value"),
    (r"operators that can support dynamic shape", _BATCHED),
    (r"vmap: inplace arithmetic", "the model writes a sample's values into a tensor shared by all samples"),
    (r"doesn't match the broadcast shape", _SHAPED),
    (r"setup_context staticmethod", "a custom autograd.Function without setup_context is closed to torch.func"),
    (r"generate_vmap_rule", "a custom autograd.Function without a vmap rule is closed to vmap"),
    (r"saved tensor hooks", "saved-tensor hooks (as checkpointing uses them) are closed to torch.func"),
    (r"CheckpointError", "a checkpoint runs its part of the model again, with other calls than were followed"),
    (
        r"would mutate a captured Tensor",
        "the model writes to a buffer, or another tensor of its own, within a derivative",
    ),
    (r"Tensor\.requires_grad_\(\)", "the model takes derivatives itself, by autograd and not by torch.func"),
    (r"is incompatible with \.grad\(\)", "a reentrant checkpoint allows only a whole backward pass"),
    (r"_flat_weights", "fused recurrent kernels are closed to vmap"),
    (r"use forward AD with (\w+) that does not support it", r"torch's \1 has no forward-mode derivative"),
    (
        r"Cannot access data pointer",
        "the model takes a tensor's numbers out of torch (numpy); torch.func forbids that",
    ),
)


def why(error: BaseException) -> str:
    """An error as one short line."""
    text = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, MethodError):
        # Its value is the method, which stands beside the reason already.
        text = re.sub(r"^\w+ cannot do this work: ", "", error.rule)
    elif isinstance(error, UserError):
        return error.rule if error.value is None else f"{error.rule} ({error.value})"
    for known, short in _KNOWN:
        if found := re.search(known, text):
            return found.expand(short)
    if isinstance(error, MethodError):
        return text
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
    if known is not None and math.isinf(error):
        return "gives NaN or infinity where plain autograd gives a finite number"
    if known is not None and error > AGREEMENT[known.dtype]:
        return f"disagrees with plain autograd by {error:.1e} of the size of the result"
    return ""


def first_samples(problem: Problem, leaves: Sequence[Tensor], count: int) -> list[Tensor]:
    """The first few samples, placed."""
    return place(problem, [leaf[:count] for leaf in leaves])

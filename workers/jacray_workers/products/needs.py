"""What a request is made from: whole Jacobians, or only products with vectors; and what cannot be."""

from __future__ import annotations

import torch

from jacray_workers.errors import BudgetError, Plain, RequestError
from jacray_workers.plan import ArrayPlan
from jacray_workers.planning.explain import size as show
from jacray_workers.planning.memory import Line
from jacray_workers.problem.problem import Problem
from jacray_workers.products import krylov
from jacray_workers.request import Request

# Results that are made from the Jacobian, whether or not it is ever formed; the others are passes of their own.
FROM_JACOBIAN = frozenset(
    ("jacobian", "mean_jacobian", "norms", "singular_values", "logabsdet", "gram", "ntk", "ggn", "fisher")
)
PAIRS = frozenset(("gram", "ggn", "fisher"))
# Directions that a product with many vectors pushes at a time.
WIDTH = 64
# Rows up to which singular values wrt parameters come from blocks.
PARAM_ROWS = 4096
# What the products' own intermediates may take, as they go piece by piece: a share of the budget, or this.
PIECE_BYTES = 1 << 26
PIECE_SHARE = 1 / 16


def columns(problem: Problem) -> int:
    """How many columns one sample's Jacobian has, over all leaves."""
    return sum(leaf.size for leaf in problem.leaves)


def passes(problem: Problem, request: Request, name: str) -> frozenset[str]:
    """What one result is made from: `blocks` of the Jacobian, or only `vjp` or `jvp` passes."""
    if name == "outputs":
        return frozenset()
    if name == "weighted_gradient":
        return frozenset(("vjp",))
    if name == "jvp":
        return frozenset(("jvp",))
    if (name in PAIRS and request.vectors is not None) or (
        name == "singular_values" and top_by_passes(problem, request)
    ):
        return frozenset(("jvp", "vjp"))
    if name == "mean_jacobian" and any(leaf.side == "param" for leaf in problem.leaves):
        # Gradients of shared parameters come summed over the batch: one pass per row, and no block per sample.
        return frozenset(("vjp",))
    return frozenset(("blocks",))


def top_by_passes(problem: Problem, request: Request) -> bool:
    """Whether the leading singular values are found without the Jacobian.

    Those wrt parameters lie close together, and one gradient per sample is as large as a row of the Jacobian: factors
    serve them better until there are very many rows.
    """
    params = any(leaf.side == "param" for leaf in problem.leaves)
    return krylov.pays(problem.rows, columns(problem), request.top_k) and (not params or problem.rows > PARAM_ROWS)


def from_blocks(problem: Problem, request: Request) -> tuple[str, ...]:
    """The results for which blocks must be computed."""
    return tuple(name for name in request.returns if "blocks" in passes(problem, request, name))


def work(problem: Problem, request: Request) -> str:
    """The heaviest work of a request: `jacobian`, `both` (jvp and vjp), `vjp`, `jvp` or `outputs`."""
    found = frozenset[str]().union(*(passes(problem, request, name) for name in request.returns))
    if "blocks" in found:
        return "jacobian"
    return "both" if len(found) == 2 else next(iter(found), "outputs")


def width(problem: Problem, request: Request, vectors: int) -> int:
    """How many directions are in flight at a time, for the results that are made from passes; `vectors` were given."""
    found = [1]
    for name in request.returns:
        if name in PAIRS and request.vectors is not None:
            found.append(min(vectors, WIDTH))
        elif name == "mean_jacobian" and "vjp" in passes(problem, request, name):
            found.append(min(problem.rows, WIDTH))
        elif name == "singular_values" and "jvp" in passes(problem, request, name):
            found.append(krylov.block(request.top_k or 1))
    return max(found)


def separable(problem: Problem, request: Request) -> bool:
    """Whether the blocks may come some rows at a time: a determinant and a full spectrum need all rows at once."""
    return not {"logabsdet", "singular_values"}.intersection(from_blocks(problem, request))


def piece(budget: int) -> int:
    """Bytes that intermediates may take at a time."""
    return min(PIECE_BYTES, int(budget * PIECE_SHARE))


def memory(problem: Problem, request: Request, line: Line, budget: int, dense: int) -> Line:
    """A chunk's peak by its samples, from that of computing the blocks or passes alone.

    What results hold beside: sums in the blocks' precision until they are added, copies of one sample's Jacobian at
    least, the second side of `ntk`, the basis of a Krylov space. `dense` counts the columns whose blocks are dense.
    """
    item = max(problem.dtype.itemsize, 4)
    base, slope = line.base, line.slope
    whole = problem.rows * columns(problem)
    for name in request.returns:
        if name in PAIRS and request.vectors is None:
            base += columns(problem) ** 2 * item + max(piece(budget), 2 * item * whole)
        elif name == "singular_values" and dense < columns(problem) and problem.dtype != torch.float64:
            base += 32 * problem.rows**2 + 16 * problem.rows * dense
        elif name in ("singular_values", "logabsdet") and "blocks" in passes(problem, request, name):
            base += max(piece(budget), 24 * whole)
        elif name == "mean_jacobian":
            base += 8 * whole
    if "ntk" in request.returns:
        base += max(piece(budget), 16 * problem.rows**2)
        slope *= 2
    if "singular_values" in request.returns and top_by_passes(problem, request):
        slope += krylov.numbers(problem.rows, columns(problem), request.top_k or 1) * 8
    return Line(base, slope)


def refuse_large(problem: Problem, request: Request, arrays: tuple[ArrayPlan, ...], budget: int) -> None:
    """Refuse matrices over the columns that cannot be held, before anything is computed.

    Raises:
        BudgetError: with both figures.
    """
    names = [name for name in request.returns if name in PAIRS and request.vectors is None]
    if not names:
        return
    # A sum in float64, and beside it the chunk's part, or at the end the sum in its own precision.
    numbers = sum(array.size for array in arrays if array.name in names)
    needed = numbers * (8 + problem.dtype.itemsize)
    if needed > budget:
        what = f"{names[0]} over {columns(problem):,} columns is a matrix of {show(numbers // len(names) * 8)}"
        raise BudgetError(
            "memory_budget",
            f"{what} in float64, {show(needed)} while it is added up",
            Plain(f"a budget of {show(budget)}"),
            "give vectors= for products with them, which never form the matrix, or choose wrt with fewer numbers",
        )


def check(problem: Problem, request: Request) -> None:
    """Refuse products that this problem cannot have.

    Raises:
        RequestError: a log-determinant of a Jacobian that is not square, or a loss that the outputs cannot have.
    """
    if "logabsdet" in request.returns and columns(problem) != problem.rows:
        raise RequestError(
            "returns",
            "logabsdet needs a square Jacobian",
            Plain(f"{problem.rows:,} rows by {columns(problem):,} columns"),
            "choose outputs or wrt so that both have the same size",
        )
    asked = [name for name in request.returns if name in ("ggn", "fisher")]
    if asked and request.loss == "cross_entropy":
        _check_classes(problem, asked[0])


def _check_classes(problem: Problem, name: str) -> None:
    """Cross-entropy needs one output whose last axis holds all classes."""
    rule = f"cross_entropy, which {name} takes by default, needs"
    mse = "or use loss='mse'"
    if len(problem.outs) != 1:
        known = ", ".join(out.key for out in problem.outs)
        raise RequestError(
            "loss", f"{rule} one output to take as logits", Plain(known), f"choose one with outputs=NAME, {mse}"
        )
    out = problem.outs[0]
    if out.pick is not None:
        raise RequestError(
            "loss",
            f"{rule} all classes of the output, as the softmax runs over them",
            Plain(f"{len(out.pick)} chosen entries"),
            f"leave outputs= out, {mse}",
        )
    if not out.shape or out.shape[-1] == 1:
        raise RequestError(
            "loss",
            f"{rule} two or more classes along the output's last axis",
            Plain(f"one sample's output of shape {out.shape}"),
            "a single logit z is the pair (0, z): return both, or use loss='mse'",
        )

"""A plain net's derivatives with respect to its parameters: factors of the Jacobian, and the tangent kernel from them.

The block of a weight is each sample's product of a cotangent `(B, rows, out)` and of what the weight was multiplied
with, `(B, in)`; behind the last weight the cotangents are rows of the identity. One forward pass and one product per
weight between the first and the last make all of them.

Sources: Goodfellow, "Efficient per-example gradient computations" (2015); Novak, Sohl-Dickstein and Schoenholz, "Fast
finite width neural tangent kernel" (2022).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from jacray_workers import pages
from jacray_workers.blocks.block import Block, DenseBlock, dense_block, write_terms
from jacray_workers.blocks.terms import Dense, Outer, Term, View
from jacray_workers.kernels.matmul import mm
from jacray_workers.straight.reading import Line
from jacray_workers.straight.running import Passage


class Factors(NamedTuple):
    """Those of one weight and its bias.

    Attributes:
        acts: `(B, in)`.
        cots: `(B, rows, out)`, or None for rows of the identity.
    """

    acts: Tensor
    cots: Tensor | None


def factors(line: Line, passage: Passage) -> list[Factors]:
    """The factors of every weight, in order; called without gradients.

    Args:
        line: a net that ends in a weight.
        passage: the batch's way through it up to there.
    """
    acts = [h.detach() for h in passage.acts[: len(line.weights)]]
    found = [Factors(acts[-1], None)]
    carried: Tensor | None = None
    for at in range(len(line.weights) - 1, 0, -1):
        carried = _back(line.weights[at], carried, len(acts[0]))
        diagonal = passage.diagonals[at]
        carried = carried if diagonal is None else diagonal.on_columns(carried, fresh=carried.dim() == 3)
        if carried.dim() == 2:
            carried = carried.expand(len(acts[0]), -1, -1).contiguous()
        found.append(Factors(acts[at - 1], carried))
    return found[::-1]


def _back(weight: Tensor, carried: Tensor | None, samples: int) -> Tensor:
    """Cotangents taken through a weight: `(B, rows, in)`, fresh; of the last weight what all samples share."""
    weight = weight.detach()
    if carried is None:
        return weight
    return mm(carried.reshape(-1, weight.shape[0]), weight).view(samples, -1, weight.shape[1])


def blocks(line: Line, found: list[Factors], factored: dict[str, bool]) -> dict[str, Tensor]:
    """The block of each parameter named in `factored`, in that order, `(B, rows, *param)`.

    Args:
        line: the net.
        found: its factors.
        factored: for each parameter's name whether the plan keeps its block in factors.
    """
    rows, made = line.widths[-1], terms(line, found)
    return {name: _block(made[name], rows, kept) for name, kept in factored.items()}


def terms(line: Line, found: list[Factors]) -> dict[str, Term]:
    """The one term of each parameter's block; of a bias that there is not too."""
    made: dict[str, Term] = {}
    rows = line.widths[-1]
    for (weight, bias), tensor, each in zip(line.names, line.weights, found, strict=True):
        made[weight] = _of_weight(each, tuple(tensor.shape), rows)
        made[bias] = _of_bias(each, tensor.shape[0], rows)
    return made


def _of_weight(each: Factors, shape: tuple[int, ...], rows: int) -> Term:
    a = each.acts.unsqueeze(1)
    if each.cots is None:
        return Outer(shape, None, a, None, start=0, count=rows)
    return Outer(shape, None, a, each.cots.unsqueeze(2))


def _of_bias(each: Factors, width: int, rows: int) -> Term:
    if each.cots is not None:
        return Dense((width,), None, each.cots)
    one = each.acts.new_ones(len(each.acts), 1, 1)
    return Outer((width, 1), View((width, 1), (1, 1), 0), one, None, start=0, count=rows)


def _block(term: Term, rows: int, factored: bool) -> Tensor:
    tensors = term.tensors()
    dtype, samples = next(iter(tensors.values())).dtype, term.size[0]
    shape = term.own if term.view is None or len(term.own) == 1 else term.own[:1]
    if factored:
        return (DenseBlock if isinstance(term, Dense) else Block)([term], (rows,), shape, dtype)
    # Memory of its own: the cotangents are a factor of the weight's block too.
    out = pages.empty((samples, rows, *shape), dtype)
    write_terms([term], out)
    return dense_block(out, (rows,), shape)


def kernel_matrix(line: Line, found: list[Factors]) -> Tensor:
    """The tangent kernel of all parameters: `(B, B, rows, rows)`.

    A weight adds the products of its acts times those of its cotangents; a bias is a weight whose act is 1.
    """
    samples, rows = len(found[0].acts), line.widths[-1]
    total: Tensor | None = None
    for products, cots in _parts(line, found):
        if cots is None:
            part = products.view(samples, 1, samples, 1) * torch.eye(rows, dtype=products.dtype).view(1, rows, 1, rows)
        else:
            flat = cots.flatten(0, 1)
            part = (flat @ flat.mT).view(samples, rows, samples, rows).mul_(products.view(samples, 1, samples, 1))
        total = part if total is None else total.add_(part)
    if total is None:
        raise ValueError("at least one weight")
    return total.permute(0, 2, 1, 3).contiguous()


def _parts(line: Line, found: list[Factors]) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Per weight the products of what it was multiplied with, its bias's added, `(B, B)`; and its cotangents."""
    for each, bias in zip(found, line.biases, strict=True):
        products = each.acts @ each.acts.mT
        yield products if bias is None else products.add_(1.0), each.cots

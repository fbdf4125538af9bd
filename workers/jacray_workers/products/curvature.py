"""The output Hessian that stands in the middle of `ggn` and `fisher`.

`ggn` is sum_i J_i^T H_i J_i with H_i the Hessian of the loss of sample i wrt its outputs: the generalised Gauss-Newton
matrix of the summed (not averaged) loss. `fisher` is sum_i J_i^T F_i J_i with F_i the covariance of the gradient of the
log-likelihood wrt the outputs, the expectation over labels that the model itself would draw. Both losses here are
negative log-likelihoods of exponential families in their natural parameters, for which F_i = H_i and neither depends
on labels, so the two results are equal. This is not the "empirical Fisher", which uses labels.

`mse`: half the squared error, 1/2 |y - t|^2 summed over every number of every output (a Gaussian of unit variance):
H is the identity. torch's `mse_loss` averages and has no half: its H is this one times 2 / (how many numbers).

`cross_entropy`: the softmax over the **last** axis of the sample's output, with its other axes as independent
positions whose losses add up: H = diag(p) - p p^T at each position, and 0 between positions. That is
`torch.nn.functional.cross_entropy(y.movedim(-1, 1), labels, reduction="sum")`; torch itself puts the classes on the
first axis behind the batch, which is the same axis for outputs of one axis. A model with logits `(C, H, W)` should
return `y.movedim(1, -1)`.

Sources: N. Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent" (2002); J. Martens,
"New insights and perspectives on the natural gradient method", JMLR 2020, sections 8 and 9; F. Kunstner, L. Balles and
P. Hennig, "Limitations of the empirical Fisher approximation" (2019).
"""

from __future__ import annotations

import torch
from torch import Tensor

from jacray_workers.problem.problem import Problem


def probabilities(problem: Problem, y: Tensor, loss: str) -> Tensor | None:
    """The softmax of each position, `(b, positions, classes)` in float64, from outputs `(b, rows)`; None for `mse`."""
    if loss == "mse":
        return None
    return torch.softmax(y.double().reshape(y.shape[0], -1, problem.outs[0].shape[-1]), dim=2)


def times(p: Tensor | None, u: Tensor) -> Tensor:
    """H u: `u` is `(K, b, rows)`."""
    if p is None:
        return u
    parts = u.double().reshape(u.shape[0], *p.shape)
    mean = (p * parts).sum(dim=3, keepdim=True)
    return (p * (parts - mean)).reshape(u.shape).to(u.dtype)


def add_centre(centre: Tensor, p: Tensor, rows: range, flat: Tensor) -> None:
    """Add what some rows contribute to each position's mean row, sum_r p_r J_r.

    Args:
        centre: `(b, positions, columns)`, added to.
        p: `(b, positions, classes)`.
        rows: which rows.
        flat: these rows of the Jacobian, `(b, len(rows), columns)`.
    """
    classes = p.shape[2]
    weights = p.flatten(1)[:, rows.start : rows.stop].to(flat.dtype)
    for position in range(rows.start // classes, -(-rows.stop // classes)):
        low, high = max(rows.start, position * classes), min(rows.stop, (position + 1) * classes)
        part = slice(low - rows.start, high - rows.start)
        centre[:, position] += (weights[:, None, part] @ flat[:, part]).squeeze(1)


def root_times(p: Tensor, centre: Tensor, rows: range, flat: Tensor) -> Tensor:
    """Rows of a matrix A with A^T A = J^T H J: `sqrt(p_r) (J_r - sum_q p_q J_q)`.

    The covariance written with centred rows: diag(p) - p p^T as a difference would lose what is left of a confident
    prediction to cancellation, and might not be positive semidefinite.

    Args:
        p: `(b, positions, classes)`.
        centre: `(b, positions, columns)`, complete.
        rows: which rows.
        flat: these rows of the Jacobian, `(b, len(rows), columns)`.
    """
    position = torch.arange(rows.start, rows.stop, device=flat.device) // p.shape[2]
    weights = p.flatten(1)[:, rows.start : rows.stop].sqrt().to(flat.dtype)
    return weights.unsqueeze(2) * (flat - centre[:, position])

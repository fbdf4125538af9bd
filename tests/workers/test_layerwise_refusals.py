"""What `layerwise` cannot follow it refuses, and never answers with a wrong number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from jacray_workers.errors import MethodError
from jacray_workers.kernels import layerwise
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.workers.layerwise_cases import Use, lin, r
from tests.workers.test_layerwise import problem_of


class OwnLinear(torch.autograd.Function):
    """A use of a parameter that no mode sees."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w, g.T @ x


def energy(s: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(s.l(x).tanh().sum(), x, create_graph=True)[0]


def reentrant(s: Any, x: Tensor) -> Tensor:
    return s.l(checkpoint(s.m, s.l(x), use_reentrant=True))


def reentrant_first(s: Any, x: Tensor) -> Tensor:
    return s.l(checkpoint(s.m, x, use_reentrant=True))


def overwritten(s: Any, x: Tensor) -> Tensor:
    w = s.l.weight * 1
    y = F.linear(x, w)
    w.mul_(2)
    return y


def kept_from_before(s: Any, x: Tensor) -> Tensor:
    if not hasattr(s, "scaled"):
        s.scaled = s.l.weight * 2
    return F.linear(x, s.scaled)


def batch_norm(s: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, s.p, training=True) if len(x) > 1 else x * s.p


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "custom function": (lambda s, x: OwnLinear.apply(x, s.l.weight), "custom autograd function"),
    "own gradient": (energy, "differentiates within"),
    "own vjp": (lambda s, x: torch.func.vjp(s.l, x)[1](x)[0], "transform|differentiates"),
    "own jvp": (lambda s, x: torch.func.jvp(s.l, (x,), (x,))[1], "transform"),
    "own vmap": (lambda s, x: torch.func.vmap(s.l)(x), "transform"),
    "reentrant checkpoint": (reentrant, "checkpoint"),
    "reentrant checkpoint first": (reentrant_first, "gradients are switched off"),
    "mean over the batch": (lambda s, x: s.l(x - x.mean(0)), "depend on each other"),
    "scale from the batch": (lambda s, x: s.l(x) * (s.p * x.mean()), "depends on the batch"),
    "samples change places": (lambda s, x: s.l(x.flip(0)).flip(0), "change places"),
    "matrix between samples": (lambda s, x: s.l(x @ x.T @ x), "depend on each other"),
    "parameter overwritten": (overwritten, "overwritten"),
    "samples one by one": (lambda s, x: torch.stack([s.l(row) for row in x]), "other functions"),
    "statistics of the batch": (batch_norm, "batch|depend"),
    "renormalised table": (lambda s, x: F.embedding((x > 0).long(), s.l.weight, max_norm=1.0).sum(1), "overwritten"),
    "scaled by frequency": (
        lambda s, x: F.embedding((x > 0).long(), s.l.weight, scale_grad_by_freq=True).sum(1), "scale_grad_by_freq",
    ),
    "another path for more samples": (lambda s, x: s.l(x) + (s.p if len(x) > 3 else 0), "other functions"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    function, reason = REFUSED[name]
    torch.manual_seed(0)
    model = Use(function, l=lin(4, 4)(), m=nn.Sequential(nn.Linear(4, 4), nn.Tanh()), p=torch.randn(4))
    x = torch.randn(4, 4)
    problem, batch = problem_of(model, x)
    with problem.session(), pytest.raises(MethodError, match=reason):
        layerwise.jacobian(problem, batch)


def test_refuses_what_draws_random_numbers() -> None:
    problem, _ = problem_of(nn.Sequential(nn.Linear(4, 4), nn.Dropout()), torch.randn(3, 4), training=True)
    assert "random" in layerwise.refuse(problem)


def test_has_no_forward_mode() -> None:
    problem, batch = problem_of(nn.Linear(4, 2), torch.randn(3, 4))
    with problem.session(), pytest.raises(MethodError, match="forward"):
        layerwise.jvp(problem, batch, [])


def test_gradients_of_its_own_are_fine_without_parameters() -> None:
    def force(x: Tensor) -> Tensor:
        with torch.enable_grad():
            return torch.autograd.grad((x**3).sum(), x if x.requires_grad else x.requires_grad_(), create_graph=True)[0]

    problem, batch = problem_of(force, r(3, 4), "inputs")
    with problem.session():
        (found,) = layerwise.jacobian(problem, batch)
    assert torch.allclose(found, torch.diag_embed(6 * batch[0]))


def test_what_an_earlier_pass_kept_is_made_anew_in_every_pass() -> None:
    """A parameter's use that only the first pass would see: every pass starts from what the session found."""
    torch.manual_seed(0)
    model = Use(kept_from_before, l=lin(4, 4)())
    x = torch.randn(4, 4)
    problem, batch = problem_of(model, x)
    with problem.session():
        found = layerwise.jacobian(problem, batch)
    expected = torch.einsum("oi,bj->boij", 2 * torch.eye(4), x)
    for leaf, block in zip(problem.leaves, found, strict=True):
        right = expected if leaf.shape == (4, 4) else torch.zeros(4, 4, *leaf.shape)
        torch.testing.assert_close(torch.as_tensor(block).reshape(right.shape).float(), right)
    assert not hasattr(model, "scaled")

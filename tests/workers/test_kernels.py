"""The kernels by their own interface, against the reference: blocks, bands of rows, buffers, products."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jacray_workers.chain import chaining
from jacray_workers.errors import MethodError
from jacray_workers.kernels import NAMES, backward_loop, common, lacks, pick
from jacray_workers.problem.problem import Problem
from jacray_workers.problem.resolve import place, resolve
from jacray_workers.request import make_request
from torch import Tensor, nn

from tests import reference
from tests.contraction import by_place, pulled, pushed, rows_of
from tests.door import compute
from tests.workers.nets import drawn

METHODS = pytest.mark.parametrize("method", NAMES)
# Derandomized: the same examples in every run, so that a failure is one for everybody.
EXAMPLES = settings(max_examples=15, deadline=None, derandomize=True)


@pytest.fixture(autouse=True, scope="module")
def cuts_always_pay():
    """`chain` refuses nets as small as these because nothing is gained; here it has to be right, not fast."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chaining, "GAIN", 0.0)
        patch.setattr(chaining, "SAVED", -math.inf)
        yield


def fit(method, data):
    """A case that the method takes on."""
    if method == "chain":
        return data.draw(drawn(dtypes=(torch.float64, torch.float32), params=False))
    return data.draw(drawn())


def dense(block):
    return block.dense() if hasattr(block, "dense") else block


def problem_of(case) -> tuple[Problem, list[torch.Tensor]]:
    problem, leaves = resolve(case.net, case.inputs, make_request(wrt=case.wrt))
    return problem, place(problem, leaves)


def matrix_of(problem, case):
    """By leaf, the reference's rows of all outputs: `(B, rows, *leaf)`."""
    blocks = rows_of(problem, by_place(problem, reference.jacobian(case.net, case.inputs, case.wrt)))
    return [
        torch.cat([blocks[o, i] for o in range(len(problem.outs))], dim=1).unflatten(2, leaf.shape or (1,))
        for i, leaf in enumerate(problem.leaves)
    ]


def close(found, expected, case):
    for a, e in zip(map(dense, found), expected, strict=True):
        assert a.numel() == e.numel()
        if e.numel():
            error = float((a.double().reshape(e.shape) - e).abs().max())
            assert error <= case.tolerance * max(float(e.abs().max()), case.floor), error


@METHODS
@EXAMPLES
@given(data=st.data())
def test_blocks_and_bands_of_rows(method, data):
    case = fit(method, data)
    problem, batch = problem_of(case)
    kernel = pick(method)
    expected = matrix_of(problem, case)
    low = data.draw(st.integers(0, max(problem.rows - 1, 0)))
    rows = range(low, data.draw(st.integers(min(low + 1, problem.rows), problem.rows)))
    with problem.session():
        assume(not kernel.refuse(problem))
        whole = kernel.jacobian(problem, batch)
        assert [dense(b).shape[:2] for b in whole] == [(batch[0].shape[0], problem.rows)] * len(problem.leaves)
        close(whole, expected, case)
        close(kernel.jacobian(problem, batch, rows), [e[:, rows.start : rows.stop] for e in expected], case)


@METHODS
@EXAMPLES
@given(data=st.data())
def test_buffers_are_written_and_returned(method, data):
    case = fit(method, data)
    problem, batch = problem_of(case)
    kernel = pick(method)
    expected = matrix_of(problem, case)
    size = batch[0].shape[0]
    with problem.session():
        assume(not kernel.refuse(problem))
        into = common.blocks_for(problem, size, problem.rows, None)
        if data.draw(st.booleans()):
            # A result's memory need not be contiguous: part of a larger tensor.
            into = [torch.full((size, problem.rows + 1, *t.shape[2:]), 7.0, dtype=t.dtype)[:, 1:] for t in into]
        found = kernel.jacobian(problem, batch, None, into)
    assert all(a is b for a, b in zip(found, into, strict=True))
    close(into, expected, case)


@pytest.mark.parametrize("method", [name for name in NAMES if getattr(pick(name), "CHUNKS_ITSELF", False)])
@EXAMPLES
@given(case=drawn(dtypes=(torch.float64,)), width=st.integers(1, 5))
def test_rows_in_flight_change_nothing(method, case, width):
    problem, batch = problem_of(case)
    with problem.session():
        close(pick(method).jacobian(problem, batch, None, None, width), matrix_of(problem, case), case)


@pytest.mark.parametrize("method", [name for name in NAMES if "vjp" not in lacks(name)])
@EXAMPLES
@given(case=drawn(), k=st.integers(1, 3), kept=st.booleans())
def test_vjp(method, case, k, kept):
    problem, batch = problem_of(case)
    expected = matrix_of(problem, case)
    u = torch.randn(k, batch[0].shape[0], problem.rows).to(problem.dtype)
    with problem.session():
        found = pick(method).vjp(problem, batch, u, per_sample_params=kept)
    for leaf, mine, rows in zip(problem.leaves, found, expected, strict=True):
        wanted = torch.einsum("kbr,br...->kb...", u.double(), rows)
        summed = leaf.side == "param" and not kept
        assert mine.shape == (k, *(() if summed else (batch[0].shape[0],)), *leaf.shape)
        close([mine], [wanted.sum(1) if summed else wanted], case)


@pytest.mark.parametrize("method", [name for name in NAMES if "jvp" not in lacks(name)])
@EXAMPLES
@given(case=drawn(), k=st.integers(1, 3))
def test_jvp(method, case, k):
    problem, batch = problem_of(case)
    size = batch[0].shape[0]
    vs = [torch.randn(k, 1, *leaf.shape).to(leaf.dtype).expand(k, size, *leaf.shape) for leaf in problem.leaves]
    rows = rows_of(problem, by_place(problem, reference.jacobian(case.net, case.inputs, case.wrt)))
    expected = pushed(problem, rows, vs)
    with problem.session():
        found = pick(method).jvp(problem, batch, vs)
    assert found.shape == (k, size, problem.rows)
    close(problem.split(found, axis=2), [expected[o] for o in range(len(problem.outs))], case)


@pytest.mark.parametrize("method", [name for name in NAMES if not lacks(name)])
@EXAMPLES
@given(case=drawn(dtypes=(torch.float64,)))
def test_the_adjoint_identity(method, case):
    """<u, J v> = <J^T u, v>."""
    problem, batch = problem_of(case)
    assume(problem.rows)
    size = batch[0].shape[0]
    u = torch.randn(1, size, problem.rows, dtype=torch.float64)
    vs = [torch.randn(1, size, *leaf.shape, dtype=torch.float64) for leaf in problem.leaves]
    kernel = pick(method)
    with problem.session():
        left = (u * kernel.jvp(problem, batch, vs)).sum(2)
        pulled_back = kernel.vjp(problem, batch, u)
    right = sum((g * v).reshape(1, size, -1).sum(2) for g, v in zip(pulled_back, vs, strict=True))
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


@EXAMPLES
@given(case=drawn(dtypes=(torch.float64,), params=True))
def test_contraction_agrees_with_backward(case):
    """sum_i k_i^T J_i is what `y.backward(gradient=k)` gives: the reference itself against torch."""
    problem, batch = problem_of(case)
    assume(problem.rows)
    ks = [torch.randn(1, batch[0].shape[0], *out.shape, dtype=torch.float64) for out in problem.outs]
    rows = rows_of(problem, by_place(problem, reference.jacobian(case.net, case.inputs, case.wrt)))
    found = pulled(problem, rows, ks, "sum")
    args = case.inputs if isinstance(case.inputs, tuple) else ()
    kwargs = case.inputs if isinstance(case.inputs, dict) else {}
    y = case.net(*(args or (() if kwargs else (case.inputs,))), **kwargs)
    flat = torch.utils._pytree.tree_leaves(y)
    torch.autograd.backward(flat, [k[0] for k in ks])
    own = dict(case.net.named_parameters())
    for i, leaf in enumerate(problem.leaves):
        grad = own[leaf.name].grad
        torch.testing.assert_close(found[i][0], torch.zeros_like(own[leaf.name]) if grad is None else grad)


def test_spans_cover_every_row_once():
    assert list(common.spans(range(3, 10), 3)) == [range(3, 6), range(6, 9), range(9, 10)]
    assert list(common.spans(range(4), None)) == [range(4)]
    assert list(common.spans(range(2, 2), None)) == []


def test_basis_is_a_band_of_the_identity():
    assert torch.equal(common.basis(range(2, 5), 7, torch.zeros(1)), torch.eye(7)[2:5])


@pytest.mark.parametrize("rows", [1, 3])
def test_folding_rows_into_the_batch_is_off_for_a_batch_of_one(rows, monkeypatch):
    """A model that takes one sample must not be handed copies of it: their sum could take another branch."""
    seen = []

    class Branch(nn.Module):
        def forward(self, x):
            seen.append(len(x))
            return torch.stack([x[:, 0] ** 2] * rows, dim=1) if x.sum() < 5 else x[:, :rows] * 0

    problem, leaves = resolve(Branch(), torch.full((1, 3), 1.0), make_request())
    with problem.session():
        (found,) = backward_loop.jacobian(problem, place(problem, leaves))
    assert set(seen) == {1}
    assert found[0, :, 0].tolist() == [2.0] * rows


def test_a_method_that_lacks_a_pass_says_so():
    problem, leaves = resolve(nn.Linear(3, 2), torch.ones(2, 3), make_request())
    batch = place(problem, leaves)
    with problem.session():
        for method in NAMES:
            kernel = pick(method)
            if "jvp" in lacks(method):
                with pytest.raises(MethodError):
                    kernel.jvp(problem, batch, [torch.ones(1, 2, 3)])
            if "vjp" in lacks(method):
                with pytest.raises(MethodError):
                    kernel.vjp(problem, batch, torch.ones(1, 2, 2))


class WritesAmongMany(nn.Module):
    """Writes into its inputs from some size of batch on, past autograd, to no effect."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 8:
            with torch.no_grad():
                x.mul_(1.0)
        return (x**3).sum(dim=1, keepdim=True)


class WritesWhatIsLarge(nn.Module):
    """Writes into its inputs where a number is large, past autograd."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            if (x > 100).any():
                x.clamp_(max=100)
        return (x**3).sum(dim=1, keepdim=True)


def test_a_model_that_writes_into_its_inputs_against_all_that_was_seen_goes_one_by_one() -> None:
    x = torch.randn(32, 4)
    found = compute(WritesAmongMany(), x, method="backward_loop")
    assert found.plan.chunk_size == 1
    assert "must leave its inputs as they are" in found.plan.notes[-1]
    assert torch.allclose(found.jacobian[:, 0], 3 * x**2)


def test_the_callers_tensors_stay_whole_where_writes_depend_on_numbers() -> None:
    x = torch.randn(32, 4)
    x[20, 1] = 200
    before = x.clone()
    found = compute(WritesWhatIsLarge(), x, method="backward_loop").jacobian
    assert torch.equal(x, before)
    assert torch.allclose(found[:, 0], 3 * before.clamp(max=100) ** 2)

"""`layerwise` against brute force in float64, over every way that a parameter may meet a batch."""

from __future__ import annotations

import warnings
import zlib
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jacray_workers.blocks.block import Block
from jacray_workers.kernels import layerwise
from jacray_workers.problem.problem import Problem
from jacray_workers.problem.resolve import place, resolve
from jacray_workers.request import make_request
from torch import Tensor, nn

from tests import reference
from tests.workers import layerwise_layers
from tests.workers.layerwise_cases import CASES, Use, lin


def problem_of(model: Any, x: Any, wrt: Any = "params", **fields: Any) -> tuple[Problem, list[Tensor]]:
    problem, leaves = resolve(model, x, make_request(wrt=wrt, **{"dtype": "float64", **fields}))
    return problem, place(problem, leaves)


def build(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(zlib.crc32(name.encode()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, x = CASES[name]()
    return model.eval(), x


def brute(model: nn.Module, x: Tensor, problem: Problem) -> list[Tensor]:
    """The reference's blocks in the order of the problem's leaves, with the rows flattened."""
    found = reference.jacobian(model, x, ["inputs", "params"] if x.is_floating_point() else "params")
    keys = [leaf.key if leaf.side == "input" else leaf.name for leaf in problem.leaves]
    return [
        found[key].reshape(len(x), problem.rows, *leaf.shape) for key, leaf in zip(keys, problem.leaves, strict=True)
    ]


def off(found: Any, known: Any) -> float:
    return reference.worst([b.dense() if isinstance(b, Block) else b for b in found], known)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_brute_force(name: str) -> None:
    model, x = build(name)
    problem, batch = problem_of(model, x, ["inputs", "params"] if x.is_floating_point() else "params")
    known = brute(model, x, problem)
    cotangents = torch.randn(3, len(x), problem.rows, dtype=torch.float64)
    before = [t.clone() for t in batch]
    with problem.session():
        assert off(layerwise.jacobian(problem, batch), known) < 1e-10
        for form in ("factors", "auto"):
            blocks = layerwise.jacobian(problem, batch, form=form, width=2)
            assert off(blocks, known) < 1e-10
            pairs = zip(blocks, problem.leaves, strict=True)
            assert all(isinstance(block, Block) == (leaf.side == "param") for block, leaf in pairs)
        by_sample = layerwise.vjp(problem, batch, cotangents, per_sample_params=True)
        summed = layerwise.vjp(problem, batch, cotangents, per_sample_params=False)
    expected = [torch.einsum("kbr,br...->kb...", cotangents, block) for block in known]
    assert off(by_sample, expected) < 1e-10
    sides = [leaf.side for leaf in problem.leaves]
    assert off(summed, [e.sum(1) if side == "param" else e for e, side in zip(expected, sides, strict=True)]) < 1e-10
    assert all(torch.equal(a, b) for a, b in zip(batch, before, strict=True))


def test_single_precision_is_close() -> None:
    model, x = build("conv2d")
    problem, batch = problem_of(model, x, ["inputs", "params"], dtype="float32")
    with problem.session():
        assert off(layerwise.jacobian(problem, batch), brute(model, x, problem)) < 1e-4


def test_writes_into_the_callers_buffers() -> None:
    model, x = build("mlp")
    problem, batch = problem_of(model, x, ["inputs", "params"])
    # Every second row of larger buffers: no block is contiguous.
    into = [torch.full((3, 6, *leaf.shape), 7.0, dtype=torch.float64)[:, ::2] for leaf in problem.leaves]
    with problem.session():
        found = layerwise.jacobian(problem, batch, into=into, width=2)
    assert all(a is b for a, b in zip(found, into, strict=True))
    assert off(into, brute(model, x, problem)) < 1e-10


@pytest.mark.parametrize("name", ["mlp", "mlp_softmax", "x_at_p_transposed", "tied_linear"])
def test_some_rows_are_those_rows_of_all(name: str) -> None:
    model, x = build(name)
    problem, batch = problem_of(model, x)
    with problem.session():
        every = layerwise.jacobian(problem, batch)
        for form in ("dense", "factors"):
            some = layerwise.jacobian(problem, batch, range(1, 3), form=form)
            assert off(some, [block[:, 1:3] for block in every]) < 1e-12
        assert [tuple(b.shape) for b in layerwise.jacobian(problem, batch, range(0))] == [
            (len(x), 0, *leaf.shape) for leaf in problem.leaves
        ]


def test_hidden_points_cut_off_what_lies_before_them() -> None:
    model, x = build("mlp")
    wrt = [{"module": "1", "side": "output"}, "params", "inputs"]
    problem, batch = problem_of(model, x, wrt)
    with problem.session():
        found = dict(zip([leaf.key for leaf in problem.leaves], layerwise.jacobian(problem, batch), strict=True))
    expected = reference.jacobian(model, x, [{"module": "1", "side": "output"}])
    assert off([found["1:output"]], [expected["1:output"]]) < 1e-10
    assert all(not found[key].any() for key in ("0.weight", "0.bias", "inputs"))
    assert found["2.weight"].any()


def test_chosen_and_several_outputs() -> None:
    torch.manual_seed(0)
    model = Use(lambda s, x: {"a": s.l(x), "b": s.m(x).tanh().view(-1, 2, 2)}, l=nn.Linear(4, 3), m=nn.Linear(4, 4))
    problem, batch = problem_of(model, torch.randn(3, 4), outputs={"a": [2, 0], "b": None})
    with problem.session():
        found = layerwise.jacobian(problem, batch)
    whole, same = problem_of(model, batch[0])
    with whole.session():
        every = layerwise.jacobian(whole, same)
    rows = [2, 0, 3, 4, 5, 6]
    assert off(found, [block[:, rows] for block in every]) < 1e-12


def test_frozen_parameters_are_left_out_and_unused_ones_are_zero() -> None:
    model, x = build("unused")
    model.l.bias.requires_grad_(False)
    problem, batch = problem_of(model, x, ["l.weight", "p"])
    with problem.session():
        weight, unused = layerwise.jacobian(problem, batch, form="factors")
    assert not unused.dense().any()
    assert unused.nbytes_factored == 0
    assert weight.dense().any()
    assert model.l.weight.requires_grad
    assert not model.l.bias.requires_grad


def test_factors_are_small_and_do_not_share_the_callers_memory() -> None:
    model = nn.Linear(128, 3100)
    x = torch.randn(1, 128)
    problem, batch = problem_of(model, x, dtype="float32")
    with problem.session():
        weight, bias = layerwise.jacobian(problem, batch, form="auto")
    assert (weight.nbytes_factored + bias.nbytes_factored) * 1000 < 4 * (weight.numel() + bias.numel())
    kept = weight[:, :2].dense()
    batch[0].zero_()
    assert torch.equal(weight[:, :2].dense(), kept)


def test_keeps_copies_of_what_the_model_overwrites() -> None:
    torch.manual_seed(0)

    def overwrite(s: Any, x: Tensor) -> Tensor:
        h = s.l(x)
        y = s.m(h)
        h.mul_(0)
        return y

    parts = {"l": nn.Linear(4, 4), "m": nn.Linear(4, 2)}
    x = torch.randn(3, 4)
    plain = Use(lambda s, x: s.m(s.l(x)), **parts)
    problem, batch = problem_of(Use(overwrite, **parts), x)
    with problem.session():
        found = layerwise.jacobian(problem, batch)
    assert off(found, brute(plain, x, problem)) < 1e-10


def test_exported_modules() -> None:
    torch.manual_seed(0)
    eager, x = layerwise_layers.Residual().double().eval(), torch.randn(3, 3, 6, 6, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = ({0: torch.export.Dim("batch")},)
        exported = torch.export.export(eager, (x[:2],), dynamic_shapes=shapes).module()
    problem, batch = problem_of(exported, x)
    with problem.session():
        found = layerwise.jacobian(problem, batch)
    assert off(found, brute(eager, x, problem)) < 1e-10


def test_a_second_shape_is_probed_anew() -> None:
    model = Use(lambda s, x: s.l(x).sum(1), l=lin(4, 2)())
    problem, _ = problem_of(model, torch.randn(3, 5, 4))
    for length in (5, 2):
        x = torch.randn(4, length, 4, dtype=torch.float64)
        with problem.session():
            assert off(layerwise.jacobian(problem, [x]), brute(model, x, problem)) < 1e-10


def test_linear_models_have_their_matrix_as_jacobian() -> None:
    a = torch.randn(5, 4, dtype=torch.float64)
    problem, batch = problem_of(lambda x: x @ a.T, torch.randn(3, 4), "inputs")
    with problem.session():
        (found,) = layerwise.jacobian(problem, batch)
    assert torch.allclose(found, a.expand(3, 5, 4))


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 4), length=st.integers(1, 3), widths=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    order=st.sampled_from(["batch", "time", "folded", "folded time"]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_shape_and_any_place_of_the_batch(
    batch: int, length: int, widths: list[int], order: str, seed: int
) -> None:
    torch.manual_seed(seed)
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.Tanh())]

    def run(s: Any, x: Tensor) -> Tensor:
        h = x.transpose(0, 1) if "time" in order else x
        shape = h.shape[:2]
        h = s.net(h.reshape(-1, h.shape[2]) if "folded" in order else h).reshape(*shape, -1)
        return (h.transpose(0, 1) if "time" in order else h).sum(1)

    model, x = Use(run, net=nn.Sequential(*layers)), torch.randn(batch, length, widths[0])
    problem, placed = problem_of(model, x)
    with problem.session():
        assert off(layerwise.jacobian(problem, placed), brute(model, x, problem)) < 1e-10


@settings(max_examples=25, deadline=None)
@given(
    channels=st.tuples(st.integers(1, 2), st.integers(1, 2)), groups=st.integers(1, 2), kernel=st.integers(1, 3),
    stride=st.integers(1, 3), padding=st.integers(0, 2), dilation=st.integers(1, 2), axes=st.integers(1, 3),
    transposed=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_convolution(
    channels: tuple[int, int], groups: int, kernel: int, stride: int, padding: int, dilation: int, axes: int,
    transposed: bool, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{axes}d")
    padding = min(padding, dilation * (kernel - 1)) if transposed else padding
    conv = kind(groups * channels[0], groups * channels[1], kernel, stride, padding, groups=groups, dilation=dilation)
    x = torch.randn(2, groups * channels[0], *(5,) * axes)
    model = Use(lambda s, x: s.conv(x).tanh().flatten(2).sum(2), conv=conv)
    problem, placed = problem_of(model, x)
    known = brute(model, x, problem)
    with problem.session():
        for form in ("dense", "factors"):
            assert off(layerwise.jacobian(problem, placed, form=form), known) < 1e-10


def test_positions_that_the_output_does_not_read_are_not_kept() -> None:
    torch.manual_seed(0)
    model = Use(lambda s, x: s.o(s.l(x).tanh()[:, 3]), l=nn.Linear(16, 5), o=nn.Linear(5, 2))
    x = torch.randn(3, 9, 16)
    problem, batch = problem_of(model, x)
    with problem.session():
        weight, *_ = found = layerwise.jacobian(problem, batch, form="factors")
        assert weight.factors()["0.a"].shape == (3, 1, 16)
        assert off(found, brute(model, x, problem)) < 1e-10
        # Zero times NaN is NaN in plain autograd too, and must not be dropped.
        batch[0][1, 2] = float("nan")
        spoiled = layerwise.jacobian(problem, batch)[0]
    assert spoiled[1].isnan().any()
    assert spoiled[[0, 2]].isfinite().all()


def test_rows_in_flight_are_bounded_by_what_a_cotangent_passes_not_by_weights() -> None:
    body, head = nn.Sequential(nn.Linear(6, 32), nn.Tanh()), nn.Linear(32, 3000)
    net, x = nn.Sequential(body, head), torch.randn(2, 6, dtype=torch.float64)
    of_head = problem_of(net, x, "1.*")
    with of_head[0].session():
        assert layerwise.record(*of_head).widest == 0
    of_body = problem_of(net, x, "0.*")
    with of_body[0].session():
        # The head's own result, of which each cotangent is a row of the identity, or the hidden layer's.
        assert layerwise.record(*of_body).widest in (2 * 32 * 8, 2 * 3000 * 8)

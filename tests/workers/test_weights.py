"""Cotangents and tangents: the shapes that may be given, what they mean, and what is said about the others."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jacray_workers.errors import RequestError
from jacray_workers.problem.resolve import resolve
from jacray_workers.problem.weights import cotangents, tangents
from jacray_workers.request import make_request
from torch import nn
from torch.utils import _pytree as pytree

from tests.door import compute

B = 3


def problem_of(model, inputs=None, **fields):
    return resolve(model, torch.randn(B, 4) if inputs is None else inputs, make_request(**fields))[0]


@pytest.fixture
def linear():
    return problem_of(nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("shape", "kept", "many"),
    [((2,), (1, 1, 2), False), ((B, 2), (1, B, 2), False), ((5, B, 2), (5, B, 2), True), ((1, B, 2), (1, B, 2), True)],
)
def test_three_ranks(linear, shape, kept, many):
    given_weights = torch.randn(shape)
    found = cotangents(linear, given_weights, B)
    assert found.parts[0].shape == kept
    assert found.many is many
    assert found.count == kept[0]
    assert torch.equal(found.parts[0].reshape(shape), given_weights)


@pytest.mark.parametrize(
    "shape", [(), (3,), (2, 2), (B + 1, 2), (B, 3), (2, B + 1, 2), (0, B, 2), (1, 1, B, 2), (1, 2)]
)
def test_every_other_shape_is_refused_with_the_allowed_ones_named(linear, shape):
    with pytest.raises(RequestError) as caught:
        cotangents(linear, torch.zeros(shape), B)
    assert caught.value.argument == "weights"
    assert "(2,) the same for every sample, (3, 2) one per sample, (K, 3, 2) K of them" in caught.value.rule
    assert str(caught.value.value) == f"shape {shape}"


def test_shapes_of_a_scalar_output_are_named():
    problem = problem_of(nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)))
    with pytest.raises(
        RequestError, match=r"\(\) the same for every sample, \(3,\) one per sample, \(K, 3\) K of them"
    ):
        cotangents(problem, torch.zeros(2), B)


def test_a_square_ambiguity_is_read_by_rank_alone():
    # B == out: (3,) is one weight for all, (3, 3) one per sample.
    problem = problem_of(nn.Linear(4, 3))
    assert cotangents(problem, torch.zeros(3), 3).parts[0].shape == (1, 1, 3)
    assert cotangents(problem, torch.zeros(3, 3), 3).parts[0].shape == (1, 3, 3)


def test_none_is_one_for_scalars_and_refused_for_vectors(linear):
    scalar = problem_of(nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)))
    assert cotangents(scalar, None, B).parts[0].tolist() == [[1.0]]
    with pytest.raises(RequestError) as caught:
        cotangents(linear, None, B)
    assert caught.value.rule == "are required where an output is not a scalar"
    assert "(2,) the same for every sample" in caught.value.way_out


@pytest.mark.parametrize("value", [[1.0, 2.0], (1, 2), np.array([1.0, 2.0]), torch.tensor([1, 2]), np.float32([1, 2])])
def test_numbers_in_any_container(linear, value):
    found = cotangents(linear, value, B).parts[0]
    assert found.dtype == torch.float32
    assert found.flatten().tolist() == [1.0, 2.0]


@pytest.mark.parametrize("value", ["one", [[1.0], [1.0, 2.0]], {"a": 1.0}, object()])
def test_what_is_no_array_of_numbers_is_refused(linear, value):
    with pytest.raises(RequestError, match="must be numbers"):
        cotangents(linear, value, B)


def test_complex_weights_are_refused(linear):
    with pytest.raises(RequestError, match="must be real"):
        cotangents(linear, torch.zeros(2, dtype=torch.complex64), B)


def test_weights_do_not_stay_attached_to_a_graph(linear):
    k = torch.randn(2, requires_grad=True)
    assert not cotangents(linear, k * 2, B).parts[0].requires_grad


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 5)

    def forward(self, x):
        h = self.layer(x)
        return {"a": h[:, :2], "b": h[:, 2:]}


def test_a_tree_of_outputs_takes_a_tree_of_weights():
    torch.manual_seed(0)
    model, x = Two(), torch.randn(B, 4)
    k = {"a": torch.randn(2), "b": torch.randn(B, 3)}
    found = compute(model, x, returns="weighted_gradient", weights=k).weighted_gradient
    w = model.layer.weight.detach()
    expected = (k["a"] @ w[:2]).expand(B, -1) + k["b"] @ w[2:]
    torch.testing.assert_close(found, expected)


def test_an_output_without_weights_counts_as_zero():
    torch.manual_seed(0)
    model, x = Two(), torch.randn(B, 4)
    found = compute(model, x, returns="weighted_gradient", weights={"b": torch.ones(3)}).weighted_gradient
    torch.testing.assert_close(found, model.layer.weight.detach()[2:].sum(0).expand(B, -1))


@pytest.mark.parametrize(
    ("weights", "rule"),
    [
        ({"c": torch.ones(2)}, "names what is not there"),
        ({"a": None, "b": None}, "must hold at least one tensor"),
        ({"a": torch.ones(2, B, 2), "b": torch.ones(3, B, 3)}, "the same K, for every name, or one for each"),
        (torch.ones(2), "must have the structure of the results: a dict with the names a, b"),
        ([{"a": torch.ones(2)}, {"a": torch.ones(2)}], "must have the structure of the results: a dict"),
    ],
)
def test_a_tree_of_weights_that_does_not_fit(weights, rule):
    with pytest.raises(RequestError, match=rule) as caught:
        compute(Two(), torch.randn(B, 4), returns="weighted_gradient", weights=weights)
    assert caught.value.argument.startswith("weights")


class Deep(nn.Module):
    """Outputs in nests, one of which has no derivative."""

    def forward(self, x):
        return {"u": (x**2, x.sum(1)), "label": x.argmax(1)}


@pytest.mark.parametrize("kind", [tuple, list])
def test_lists_serve_for_tuples(kind):
    x, k = torch.randn(B, 4), (torch.randn(5, B, 4), torch.randn(5, B))
    fields = {"returns": "weighted_gradient"}
    found = compute(Deep(), x, weights={"u": kind(k), "label": None}, **fields).weighted_gradient
    torch.testing.assert_close(found, k[0] * 2 * x + k[1][..., None])
    found = compute(Deep(), x, weights={"u": kind((None, k[1]))}, **fields).weighted_gradient
    torch.testing.assert_close(found, k[1][..., None].expand(5, B, 4))
    for wrong in ((k[0],), (*k, k[0]), k[0]):
        with pytest.raises(RequestError, match="must have the structure of the results: a tuple of 2") as caught:
            compute(Deep(), x, weights={"u": wrong}, **fields)
        assert caught.value.argument == "weights.u"


def test_the_tensor_of_the_only_output_will_do():
    x, k = torch.randn(B, 4), torch.randn(B, 4)
    fields = {"returns": "weighted_gradient", "outputs": "u.0"}
    for weights in (k, k.numpy(), {"u": (k, None)}):
        found = compute(Deep(), x, weights=weights, **fields).weighted_gradient
        torch.testing.assert_close(found, 2 * k * x)


@dataclasses.dataclass
class Pair:
    first: torch.Tensor
    second: torch.Tensor


pytree.register_dataclass(Pair)


def test_containers_of_the_users_own():
    class Model(nn.Module):
        def forward(self, x):
            return Pair(x**2, x.sum(1))

    x, k = torch.randn(B, 4), Pair(torch.randn(B, 4), torch.randn(B))
    found = compute(Model(), x, returns="weighted_gradient", weights=k).weighted_gradient
    torch.testing.assert_close(found, k.first * 2 * x + k.second[:, None])
    with pytest.raises(RequestError, match="must have the structure of the results: a Pair"):
        compute(Model(), x, returns="weighted_gradient", weights=(k.first, k.second))


def test_one_entry_of_a_tree_is_named_when_its_shape_is_wrong():
    with pytest.raises(RequestError) as caught:
        compute(Two(), torch.randn(B, 4), returns="weighted_gradient", weights={"a": torch.ones(3), "b": torch.ones(3)})
    assert caught.value.argument == "weights.a"


def test_vectors_are_required_for_a_jvp_and_shaped_like_the_leaf(linear):
    with pytest.raises(RequestError, match="required for a jvp") as caught:
        tangents(linear, None, B)
    assert caught.value.argument == "vectors"
    assert "(4,) the same for every sample" in caught.value.way_out
    with pytest.raises(RequestError, match=r"\(4,\) the same for every sample, \(3, 4\) one per sample"):
        tangents(linear, torch.ones(2), B)


def test_vectors_wrt_parameters_are_a_dict_by_name():
    torch.manual_seed(0)
    model, x = nn.Linear(4, 2), torch.randn(B, 4)
    v = {"weight": torch.randn(2, 4), "bias": torch.randn(2)}
    found = compute(model, x, wrt="params", returns="jvp", vectors=v).jvp
    torch.testing.assert_close(found, x @ v["weight"].T + v["bias"])


@given(
    out=st.sampled_from([(), (1,), (3,), (2, 3), (0,)]),
    samples=st.integers(1, 4),
    count=st.integers(1, 3),
    rank=st.integers(0, 2),
)
def test_select_gives_every_sample_its_weight(out, samples, count, rank):
    class Shaped(nn.Module):
        def forward(self, x):
            return x.sum(1).view(-1, *[1] * len(out)).expand(-1, *out)

    problem = problem_of(Shaped(), torch.randn(samples, 2))
    shape = ((), (samples,), (count, samples))[rank] + out
    k = torch.randn(shape)
    found = cotangents(problem, k, samples)
    full = k.expand(1, samples, *out) if rank < 2 else k
    for start in range(samples):
        for stop in range(start + 1, samples + 1):
            assert torch.equal(found.select(start, stop)[0], full[:, start:stop])

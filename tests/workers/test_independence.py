from __future__ import annotations

import numpy as np
import pytest
import torch
from jacray_workers.errors import CoupledSamplesError
from jacray_workers.problem.resolve import place, resolve
from jacray_workers.request import make_request
from jacray_workers.trust.independence import probe, require
from torch import nn


def look(model, x, **request):
    torch.manual_seed(0)
    problem, leaves = resolve(model, x, make_request(**request))
    batch = place(problem, leaves)
    before = {name: tensor.clone() for name, tensor in problem.tensors.items()}
    inputs = [leaf.clone() for leaf in batch]
    with problem.session():
        found = probe(problem, batch)
    for leaf, kept in zip(batch, inputs, strict=True):
        assert torch.equal(leaf, kept), "the probe changed the inputs"
    for name, tensor in before.items():
        assert torch.equal(tensor, problem.tensors[name]), f"the probe changed {name}"
    return found


class MeanFree(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class Similar(nn.Module):
    """Contrastive similarity: row i holds the products with every sample, cut to a fixed width."""

    def forward(self, x):
        return (x @ x.T).sum(1, keepdim=True) + x


class BatchFirstForgotten(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.mha = nn.MultiheadAttention(8, 2)

    def forward(self, x):
        h = self.embed(x)
        return self.mha(h, h, h, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 5)

    def forward(self, x):
        return self.lstm(x)[0]


class OnlyDerivative(nn.Module):
    """Values are x, but the derivative is that of x minus its mean."""

    def forward(self, x):
        mean = x.mean(0)
        return x - mean + mean.detach()


class MixedBackward(torch.autograd.Function):
    @staticmethod
    def forward(_ctx, x):
        return x.clone()

    @staticmethod
    def backward(_ctx, g):
        return g.mean(0, keepdim=True).expand_as(g)


class Averaged(nn.Module):
    def forward(self, x):
        return MixedBackward.apply(x)


class Around(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.part = part
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.part(torch.tanh(self.first(x))))


class Own(nn.Module):
    """Couples in its own forward, around an innocent part."""

    def __init__(self):
        super().__init__()
        self.part = nn.Linear(4, 4)

    def forward(self, x):
        return self.part(x).softmax(0)


class Largest(nn.Module):
    def forward(self, x):
        return x / x.abs().amax(0)


class Cumulated(nn.Module):
    def forward(self, x):
        return x.cumsum(0)


class Weak(nn.Module):
    def forward(self, x):
        return x + 1e-3 * x.mean(0)


def images():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))


COUPLED = {
    "batch norm in training": (images, torch.randn(5, 3, 6, 6), {"training": True}, "1"),
    "batch norm without statistics": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3, track_running_stats=False)),
        torch.randn(4, 2, 5),
        {},
        "1",
    ),
    "mean removed": (lambda: Around(MeanFree()), torch.randn(4, 4), {}, "part"),
    "similarity": (lambda: Around(Similar()), torch.randn(4, 4), {}, "part"),
    "softmax over the batch": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Softmax(0)), torch.randn(4, 4), {}, "1"),
    "own forward": (lambda: nn.Sequential(nn.Linear(4, 4), Own()), torch.randn(4, 4), {}, "1"),
    "largest": (lambda: Around(Largest()), torch.randn(4, 4), {}, "part"),
    "cumulated": (lambda: Around(Cumulated()), torch.randn(4, 4), {}, "part"),
    "weak": (lambda: Around(Weak()), torch.randn(4, 4), {}, "part"),
    "attention over the batch": (BatchFirstForgotten, torch.randn(4, 6, 4), {}, "mha"),
    "recurrence over the batch": (Recurrent, torch.randn(4, 6, 4), {}, "lstm"),
    "derivative only": (lambda: Around(OnlyDerivative()), torch.randn(4, 4), {}, "part"),
    "custom backward": (lambda: Around(Averaged()), torch.randn(4, 4), {}, "part"),
    "a plain function": (lambda: lambda x: x - x.mean(0), torch.randn(4, 4), {}, ""),
    "a batch of two": (lambda: Around(MeanFree()), torch.randn(2, 4), {}, "part"),
    "a batch of one": (lambda: Around(MeanFree()), torch.randn(1, 4), {}, "part"),
    "all samples alike": (lambda: Around(MeanFree()), torch.ones(4, 4), {}, "part"),
    "zeros": (lambda: Around(MeanFree()), torch.zeros(4, 4), {}, "part"),
    "tokens": (
        lambda: nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 4), MeanFree()),
        torch.randint(9, (5, 3)),
        {"wrt": "params"},
        "3",
    ),
    "one sample of tokens": (
        lambda: nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 4), MeanFree()),
        torch.tensor([[1, 4, 2]]),
        {"wrt": "params"},
        "3",
    ),
    "at a hidden point": (lambda: Around(MeanFree()), torch.randn(4, 4), {"wrt": {"module": "first"}}, "part"),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("name", COUPLED)
def test_coupling_is_found_and_named(name, dtype):
    torch.manual_seed(1)
    make, x, request, culprit = COUPLED[name]
    found = look(make(), x, dtype=dtype, **request)
    assert not found.independent
    assert found.culprit == culprit
    assert found.why
    assert found.way_out


def test_refusal_names_the_layer_and_the_way_out():
    found = look(images(), torch.randn(3, 3, 6, 6), training=True)
    with pytest.raises(CoupledSamplesError, match=r"module 1.*training=False"):
        require(found)
    assert "training mode" in found.why


def test_batch_first_is_proposed():
    assert "batch_first=True" in look(BatchFirstForgotten(), torch.randn(4, 6, 4)).way_out


class Branching(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum().item() > 1e9 else x


class Distance(nn.Module):
    """The block-diagonal mask makes a product over the whole batch independent after all."""

    def forward(self, x):
        return ((x @ x.T) * torch.eye(len(x), dtype=x.dtype)).sum(1, keepdim=True)


class Graph(nn.Module):
    """Each sample is a graph of its own; gathers and scatters stay within it."""

    def forward(self, inputs):
        x, index = inputs["x"], inputs["index"]
        return torch.zeros_like(x).scatter_add(1, index, x)


def twice():
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.Tanh(), layer)


APART = {
    "batch norm in eval": (images, torch.randn(4, 3, 6, 6), {}),
    "instance norm in training": (lambda: nn.InstanceNorm1d(2), torch.randn(4, 2, 6), {"training": True}),
    "squared length": (Distance, torch.randn(4, 3), {}),
    "a branch not taken": (Branching, torch.randn(4, 3), {}),
    "a logarithm": (lambda: torch.log, torch.rand(4, 3) + 0.01, {}),
    "a root at zero": (lambda: torch.sqrt, torch.zeros(4, 3), {}),
    "a Cholesky factor": (lambda: torch.linalg.cholesky, torch.eye(3).expand(4, 3, 3) * 2.0, {}),
    "a graph": (Graph, {"x": torch.randn(4, 5), "index": torch.randint(5, (4, 5))}, {}),
    "not finite": (lambda: lambda x: x / 0.0, torch.randn(4, 3), {}),
    "a constant": (lambda: torch.ones_like, torch.randn(4, 3), {}),
    "seven channels": (lambda: nn.Sequential(nn.Conv1d(3, 3, 1), nn.ReLU()), torch.randn(3, 3, 3), {}),
    "single numbers": (lambda: torch.sin, torch.randn(4), {}),
    "one module twice": (twice, torch.randn(4, 3), {"wrt": "params"}),
    "in place": (lambda: lambda x: x.mul_(2).exp(), torch.randn(4, 3), {}),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("name", APART)
def test_no_false_alarm(name, dtype):
    if dtype == "bfloat16" and name == "a Cholesky factor":
        pytest.skip("no bfloat16 factorisation")
    torch.manual_seed(1)
    make, x, request = APART[name]
    found = look(make(), x, dtype=dtype, **request)
    assert found.independent, found
    require(found)


def test_dropout_draws_by_place_and_does_not_couple():
    found = look(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5)), torch.randn(4, 4), training=True)
    assert found.independent
    assert not found.same_alone


def test_the_size_of_the_batch_in_the_output_is_no_coupling_but_differs_alone():
    found = look(lambda x: x.sin() / len(x), torch.randn(4, 3))
    assert found.independent
    assert not found.same_alone
    assert found.batchable
    assert "alone" in found.why


class OneAtATime(nn.Module):
    def forward(self, x):
        return x * float(x.reshape(()).item())


def test_a_model_that_takes_no_batch_is_not_batchable():
    found = look(OneAtATime(), torch.randn(3, 1))
    assert found.independent
    assert not found.batchable
    assert not found.same_alone


def test_an_output_without_batch_axis_is_not_batchable():
    found = look(lambda x: x.mean(0, keepdim=True), torch.randn(3, 2))
    assert not found.batchable


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x * 2


class Reassigning(Counting):
    def forward(self, x):
        self.calls = self.calls + 1
        return x * 2


@pytest.mark.parametrize("make", [Counting, Reassigning])
def test_written_buffers_are_noted(make):
    model = make()
    found = look(model, torch.randn(3, 2))
    assert found.independent
    assert any("calls" in note for note in found.notes)
    assert model.calls == 0


def test_numbers_from_elsewhere_are_noted_and_no_coupling():
    source = np.random.default_rng(0)
    found = look(lambda x: x * float(source.normal()), torch.randn(3, 2))
    assert found.independent
    assert any("differ by" in note for note in found.notes)


class Single(nn.Module):
    """Insists on float32, so that nothing can be looked at in float64."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.constant = torch.randn(4, 3)

    def forward(self, x):
        return (x @ self.constant).relu()


def test_a_model_that_insists_on_its_precision():
    assert look(Single(), torch.randn(4, 4)).same_alone
    found = look(lambda x: (x @ torch.ones(4, 3)) - (x @ torch.ones(4, 3)).mean(0), torch.randn(4, 4))
    assert not found.independent

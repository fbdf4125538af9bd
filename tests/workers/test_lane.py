"""The short way of a second call: nets of a user's own class, derivatives wrt parameters, tangent kernels, receipts."""

from __future__ import annotations

import json

import jacray
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from jacray_workers.straight import lane
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.workers.test_straight import CHANGES, brute, close, net


class Two(nn.Module):
    """Two Linear layers; `forward` is what the test makes of them."""

    def __init__(self, between, inputs=5):
        super().__init__()
        self.a, self.b = nn.Linear(inputs, 9), nn.Linear(9, 4)
        self.drop, self.between = nn.Dropout(0.5), between
        self.double()

    def forward(self, x):
        return self.between(self, x)


def taken(model, x, **fields):
    """What the lane gives for a model that was called before."""
    return lane.recall(model, x, fields)


def plain(m, x):
    return m.b(torch.tanh(m.a(x)))


def viewed(m, x):
    return m.b(F.silu(m.drop(m.a(x.view(x.shape[0], -1)))))


STRAIGHT = {
    "tanh": plain,
    "relu": lambda m, x: m.b(F.relu(m.a(x))),
    "relu in place": lambda m, x: m.b(F.relu(m.a(x), inplace=True)),
    "relu_": lambda m, x: torch.relu_(m.b(m.a(x).relu_())),
    "gelu by tanh": lambda m, x: m.b(F.gelu(m.a(x), approximate="tanh")),
    "two functions": lambda m, x: m.b(torch.tanh(m.a(x)).sigmoid()),
    "settings by place": lambda m, x: m.b(F.leaky_relu(m.a(x), 0.3)),
    "settings by name": lambda m, x: m.b(F.softplus(m.a(x), beta=2.5)),
    "linear by hand": lambda m, x: F.linear(torch.tanh(F.linear(x, m.a.weight, bias=m.a.bias)), weight=m.b.weight),
    "dropout and a view": viewed,
    "behind the last": lambda m, x: F.elu(m.b(m.a(x)), 0.7).tanh(),
    "shapes are looked at": lambda m, x: plain(m, x) if x.size(1) == 5 and len(x) > 0 and x.dim() == 2 else x,
}


@pytest.mark.parametrize("name", STRAIGHT)
def test_a_plain_net_of_a_users_own_class(name):
    model, x = Two(STRAIGHT[name]), torch.randn(6, 5, dtype=torch.float64)
    before = x.clone()
    expected = brute(model, x)
    close(jacray.jacobian(model, x, method="chain"), expected)
    found = taken(model, x, method="chain")
    assert found is not None
    close(found.value, expected)
    assert torch.equal(x, before)
    assert not found.value.requires_grad


def test_images_go_through_a_flatten():
    model = Two(lambda m, x: m.b(torch.tanh(m.a(torch.flatten(x, 1)))), inputs=12)
    x = torch.randn(3, 3, 2, 2, dtype=torch.float64)
    jacray.jacobian(model, x, method="chain")
    close(taken(model, x, method="chain").value, brute(model, x))


class Backwards(torch.autograd.Function):
    """A ReLU whose backward lets everything through."""

    @staticmethod
    def forward(_ctx, h):
        return torch.relu(h)

    @staticmethod
    def backward(_ctx, g):
        return g


def graded(h):
    h.register_hook(lambda g: 3 * g)
    return h


def by_node(h):
    h.grad_fn.register_hook(lambda grads, _: tuple(None if g is None else 3 * g for g in grads))
    return h


def scaled(m, x):
    h = m.a(x)
    h.mul_(2)
    return m.b(torch.tanh(h))


def overwritten(m, x):
    return m.b(torch.relu_(F.leaky_relu(m.a(x))))


def residual(m, x):
    h = torch.tanh(m.a(x))
    return m.b(h + torch.relu(h))


OTHERS = {
    "a backward of its own": lambda m, x: m.b(Backwards.apply(m.a(x))),
    "a hook on a tensor": lambda m, x: m.b(torch.tanh(graded(m.a(x)))) if m.a(x).requires_grad else plain(m, x),
    "written in place": scaled,
    "a function over another": overwritten,
    "a residual": residual,
    "a function of two numbers": lambda m, x: m.b(torch.tanh(m.a(x)) * 2),
    "a norm": lambda m, x: m.b(F.layer_norm(m.a(x), (9,))),
    "a branch on data": lambda m, x: m.b(torch.tanh(m.a(x)) if m.a(x).sum() > 1e9 else torch.relu(m.a(x))),
    "a weight made from another": lambda m, x: F.linear(torch.tanh(m.a(x)), 2 * m.b.weight, m.b.bias),
    "a weight that moves with the batch's size": lambda m, x: m.b(torch.tanh(m.a(x))) * (1 + 0 * x.shape[0]),
    "a checkpoint": lambda m, x: m.b(checkpoint(lambda h: torch.tanh(m.a(h)), x, use_reentrant=False)),
    "a cast inside": lambda m, x: m.b(torch.tanh(m.a(x)).float().double()),
    "outputs by name": lambda m, x: {"y": plain(m, x)},
    "an axis more": lambda m, x: plain(m, x.unsqueeze(1)).squeeze(1),
    "sums of weights": lambda m, x: F.linear(plain(m, x), torch.eye(4, dtype=x.dtype)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_any_other_forward_is_right_both_times(name):
    model, x = Two(OTHERS[name]), torch.randn(6, 5, dtype=torch.float64)
    unwrap = model if name != "outputs by name" else Two(plain)
    unwrap.load_state_dict(model.state_dict())
    for _ in range(2):
        found = jacray.jacobian(model, x)
        close(found["y"] if isinstance(found, dict) else found, brute(unwrap, x))


def _without(m, x):
    with torch.no_grad():
        return torch.tanh(m.a(x))


def _cast(m, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return plain(m, x)


def _of_before(m, x):
    h = m.a(x)
    torch.tanh(h)
    return m.b(h)


def _through_numpy(m, x):
    h = m.a(x)
    h.detach().numpy()[:] *= 2
    return m.b(torch.tanh(h))


def _halved(m, x):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t / 2):
        return m.b(torch.tanh(m.a(x)))


SILENT = {
    "hooks on saved tensors": _halved,
    "a backward of its own": lambda m, x: m.b(Backwards.apply(m.a(x))),
    "no gradients inside": lambda m, x: m.b(_without(m, x)),
    "a hook on a tensor": lambda m, x: m.b(torch.tanh(graded(m.a(x)))),
    "a hook in the graph": lambda m, x: m.b(torch.tanh(by_node(m.a(x)))),
    "the data of a tensor": lambda m, x: m.b(torch.tanh(m.a(x).data)),
    "detached": lambda m, x: m.b(torch.tanh(m.a(x)).detach()),
    "half precision inside": _cast,
    "a tensor of before": _of_before,
    "in place where nobody sees it": _through_numpy,
}


@pytest.mark.parametrize("name", SILENT)
def test_a_forward_that_turns_into_another_is_seen(name):
    """The same make, known from before: what no longer is a plain net's run is not taken for one."""
    model, x = Two(plain), torch.randn(6, 5, dtype=torch.float64)
    model = model.float() if name == "half precision inside" else model
    x = x.float() if name == "half precision inside" else x
    jacray.jacobian(model, x, method="chain")
    assert taken(model, x, method="chain") is not None
    model.between = SILENT[name]
    assert taken(model, x, method="chain") is None


@pytest.mark.parametrize("change", [name for name in CHANGES if "Sequential" not in name])
def test_a_change_after_the_first_calls_counts_in_a_class_of_ones_own(change):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net(5, 9, 4)

        def forward(self, x):
            return self.net(x)

    torch.manual_seed(len(change))
    model, x = Wrapped(), torch.randn(6, 5, dtype=torch.float64)
    jacray.jacobian(model, x, method="chain")
    assert taken(model, x, method="chain") is not None
    CHANGES[change](model.net)
    close(jacray.jacobian(model, x), brute(model, x))
    close(jacray.jacobian(model, x), brute(model, x))


def test_a_legacy_backward_hook_counts():
    model, x = Two(plain), torch.randn(6, 5, dtype=torch.float64)
    jacray.jacobian(model, x, method="chain")
    model.b.register_backward_hook(lambda _, grads, __: tuple(None if g is None else 3 * g for g in grads))
    assert taken(model, x, method="chain") is None


def test_the_model_is_left_as_it_was():
    def counting(m, x):
        m.last_seen = x.shape
        return plain(m, x)

    model, x = Two(plain), torch.randn(6, 5, dtype=torch.float64)
    jacray.jacobian(model, x, method="chain")
    model.between = counting
    before = dict(model.__dict__)
    assert model.training
    assert taken(model, x, method="chain") is not None
    assert model.__dict__ == before
    assert all(part.training for part in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_what_a_model_raises_is_told_the_long_way():
    def angry(m, x):
        if m.angry:
            raise ValueError("no")
        return plain(m, x)

    model, x = Two(angry), torch.randn(6, 5, dtype=torch.float64)
    model.angry = False
    jacray.jacobian(model, x, method="chain")
    model.angry = True
    with pytest.raises(jacray.ModelError, match="ValueError: no"):
        jacray.jacobian(model, x, method="chain")
    assert model.training


# --- parameters ------------------------------------------------------------------------------------------------------


def own():
    return Two(plain)


def deep():
    return nn.Sequential(
        nn.ReLU(), nn.Linear(5, 30), nn.Tanh(), nn.Linear(30, 20), nn.Linear(20, 25), nn.GELU(), nn.Linear(25, 4)
    ).double()  # fmt: skip


def bare():
    return nn.Sequential(
        nn.Linear(5, 30, bias=False), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 4)
    ).double()


MODELS = {"own": own, "deep": deep, "no bias": bare, "one": lambda: nn.Linear(5, 4).double()}


@pytest.mark.parametrize("name", MODELS)
def test_factors_of_a_second_call(name):
    model, x = MODELS[name](), torch.randn(6, 5, dtype=torch.float64)
    fields = {"wrt": "params", "method": "layerwise", "form": "factors"}
    first = jacray.jacobian(model, x, **fields)
    assert taken(model, x, **fields) is not None
    second = jacray.jacobian(model, x, **fields)
    expected = jacray.jacobian(model, x, wrt="params", method="reverse", form="dense")
    assert list(second) == list(first) == list(expected)
    for key, block in second.items():
        assert type(block) is type(first[key])
        assert [type(t) for t in block.terms] == [type(t) for t in first[key].terms]
        close(block.dense(), expected[key])
        k = torch.randn(6, 4, dtype=torch.float64)
        close(block.vjp(k), torch.einsum("bo,bo...->b...", k, expected[key]))


@pytest.mark.parametrize("name", MODELS)
def test_the_tangent_kernel_of_a_second_call(name):
    model, x = MODELS[name](), torch.randn(6, 5, dtype=torch.float64)
    fields = {"wrt": "params", "method": "layerwise", "returns": ["ntk"]}
    first = jacray.compute(model, x, **fields)
    assert taken(model, x, **fields) is not None
    with torch.no_grad():
        next(iter(model.parameters())).mul_(1.5)
    second = jacray.compute(model, x, **fields)
    J = jacray.jacobian(model, x, wrt="params", method="reverse", form="dense")
    whole = torch.cat([block.flatten(2) for block in J.values()], dim=2)
    close(second.ntk, torch.einsum("brp,csp->bcrs", whole, whole))
    assert second.ntk.shape == first.ntk.shape
    assert second.ntk.is_contiguous()


def test_factors_outlive_changes_of_what_they_were_made_from():
    model, x = deep()[1:], torch.randn(6, 5, dtype=torch.float64)
    fields = {"wrt": "params", "method": "layerwise"}
    jacray.jacobian(model, x, **fields)
    found = taken(model, x, **fields).value
    expected = {name: block.dense().clone() for name, block in found.items()}
    x.zero_()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    found["1.bias"].dense().zero_()
    del expected["1.bias"]
    for name, block in expected.items():
        close(found[name].dense(), block)


@pytest.mark.parametrize("fields", [{}, {"wrt": "params"}, {"wrt": "params", "returns": ["ntk"]}], ids=str)
def test_weights_and_inputs_that_lie_otherwise_in_memory(fields):
    model, x = deep(), torch.randn(5, 6, dtype=torch.float64).T
    method = "layerwise" if fields else "chain"
    jacray.compute(model, x, method=method, **fields)
    for part in (model[1], model[4], model[6]):
        part.weight = nn.Parameter(torch.randn(part.weight.shape[::-1], dtype=torch.float64).T)
    assert taken(model, x, method=method, **fields) is not None
    found = dict(jacray.compute(model, x, method=method, **fields))
    expected = dict(jacray.compute(model, x, method="reverse", **fields))
    for name, value in found.items():
        for mine, theirs in zip(
            torch.utils._pytree.tree_leaves(value), torch.utils._pytree.tree_leaves(expected[name]), strict=True
        ):
            close(
                mine.dense() if hasattr(mine, "dense") else mine, theirs.dense() if hasattr(theirs, "dense") else theirs
            )


def _tied(model):
    model.b = nn.Linear(9, 9).double()
    model.between = lambda m, x: m.b(torch.tanh(m.b(torch.tanh(m.a(x)))))


def _unused(model):
    model.extra = nn.Parameter(torch.zeros(3, dtype=torch.float64))


def _another_name(model):
    model.c = model.b


def _frozen(model):
    model.a.weight.requires_grad_(False)


@pytest.mark.parametrize("change", [_tied, _unused, _another_name, _frozen], ids=lambda change: change.__name__)
def test_parameters_that_are_tied_unused_or_frozen(change):
    model, x = own(), torch.randn(6, 5, dtype=torch.float64)
    jacray.jacobian(model, x, wrt="params")
    change(model)
    for _ in range(2):
        found = jacray.jacobian(model, x, wrt="params")
        expected = jacray.jacobian(model, x, wrt="params", method="backward_loop", form="dense")
        assert list(found) == list(expected)
        for name, block in expected.items():
            close(found[name].dense(), block)


# --- receipts --------------------------------------------------------------------------------------------------------

ASKED = [
    {"method": "chain"},
    {"method": "chain", "returns": ["jacobian"], "wrt": "inputs"},
    {"wrt": "params", "method": "layerwise"},
    {"wrt": "params", "method": "layerwise", "returns": "ntk"},
]


@pytest.mark.parametrize("fields", ASKED, ids=str)
def test_a_short_call_has_a_true_receipt(fields):
    model, x = net(5, 9, 4, act=nn.ReLU), torch.randn(6, 5, dtype=torch.float64)
    first = jacray.compute(model, x, **fields)
    assert taken(model, x, **fields) is not None
    second = jacray.compute(model, x, **fields)
    assert second.names == first.names
    assert second.plan == first.plan
    one, two = dict(first.receipt), dict(second.receipt)
    json.dumps(two, allow_nan=False)
    for key in ("seconds", "started", "samples_per_second"):
        one.pop(key)
        two.pop(key)
    assert one["shards"][0].keys() == two["shards"][0].keys()
    assert {**two["shards"][0], "seconds": 0} == {**one["shards"][0], "seconds": 0}
    assert {**one, "shards": 0} == {**two, "shards": 0}
    assert second.receipt["seconds"]["compute"] > 0


@pytest.mark.parametrize("fields", ASKED, ids=str)
def test_a_short_call_tells_what_is_not_finite(fields):
    model, x = net(5, 9, 4, act=nn.ReLU), torch.randn(6, 5, dtype=torch.float64)
    jacray.compute(model, x, **fields)
    x[2] = torch.nan
    assert taken(model, x, **fields) is not None
    found = jacray.compute(model, x, **fields).receipt["nonfinite"]
    expected = jacray.compute(model, x, seed=0, **fields).receipt["nonfinite"]
    assert found == expected


def test_two_ways_of_asking_have_their_own_receipts():
    model, x = net(5, 9, 4), torch.randn(6, 5, dtype=torch.float64)
    for _ in range(2):
        named = jacray.compute(model, x, method="chain", wrt="inputs")
        short = jacray.compute(model, x, method="chain")
        assert named.receipt["request"] == {"method": "chain", "wrt": "inputs"}
        assert short.receipt["request"] == {"method": "chain"}


def test_another_number_of_threads_is_planned_anew():
    model, x = net(5, 9, 4), torch.randn(6, 5, dtype=torch.float64)
    jacray.jacobian(model, x, method="chain")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert taken(model, x, method="chain") is None
    finally:
        torch.set_num_threads(before)


def test_a_compiled_function_inside_is_not_compiled_by_a_look():
    """Whatever the compiler would make of it, the numbers are the model's, and its stance is as it was."""
    compiled = torch.compile(lambda h: torch.tanh(h) * 1, backend=_refusing)
    model, x = Two(lambda m, x: m.b(compiled(m.a(x)))), torch.randn(6, 5, dtype=torch.float64)
    twin = Two(plain)
    twin.load_state_dict(model.state_dict())
    expected = brute(twin, x)
    for _ in range(3):
        close(jacray.jacobian(model, x), expected)
    with torch.no_grad(), pytest.raises(Exception, match="not to be compiled"):
        compiled(x)


def _refusing(_graph, _inputs):
    raise RuntimeError("not to be compiled")

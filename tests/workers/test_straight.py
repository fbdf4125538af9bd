"""Plain nets: the short way gives what plain autograd gives, and reads the model as it is at each call."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
import threading

import jacray
import pytest
import torch
import torch.nn.utils.prune
from jacray.coordinator import compute_here
from jacray_workers.engine import prepare
from jacray_workers.request import make_request
from jacray_workers.straight import lane, order
from jacray_workers.straight.curves import CURVES
from jacray_workers.straight.reading import read
from torch import nn


def net(*widths, act=nn.Tanh, last=False, dtype=torch.float64):
    layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), act())]
    return nn.Sequential(*(layers if last else layers[:-1])).to(dtype)


def brute(model, x):
    """One sample and one output number at a time, in eval mode."""
    was, blocks = model.training, []
    model.eval()
    for sample in x:
        one = sample.detach().clone().unsqueeze(0).requires_grad_()
        y = model(one.clone())
        rows = [torch.autograd.grad(number, one, retain_graph=True)[0][0] for number in y.flatten()]
        blocks.append(torch.stack(rows).view(*y.shape[1:], *sample.shape))
    model.train(was)
    return torch.stack(blocks)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def again(model, x, **fields):
    """The second call, and whether it took the lane."""
    jacray.jacobian(model, x, **fields)
    assert lane.recall(model, x, fields) is not None
    return jacray.jacobian(model, x, **fields)


# --- what is computed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", CURVES, ids=lambda act: act.__name__)
@pytest.mark.parametrize("last", [False, True])
def test_every_function_of_one_number(act, last):
    model, x = net(5, 7, 4, act=act, last=last), torch.randn(6, 5, dtype=torch.float64)
    close(jacray.jacobian(model, x, method="chain"), brute(model, x))


SHAPES = [
    ((3, 64, 5), 40), ((40, 30, 20, 3), 4), ((3, 20, 30, 40), 4), ((30, 4, 30), 5), ((1, 9, 1), 3),
    ((9, 2, 9, 2, 9), 7), ((6, 50, 50, 50, 6), 2), ((4, 5), 3), ((300, 80, 6, 80, 300), 3), ((2, 3, 2), 1),
]  # fmt: skip


@pytest.mark.parametrize(("widths", "samples"), SHAPES)
@pytest.mark.parametrize("act", [nn.ReLU, nn.Sigmoid])
def test_every_order_of_products(widths, samples, act):
    model, x = net(*widths, act=act), torch.randn(samples, widths[0], dtype=torch.float64)
    close(jacray.jacobian(model, x, method="chain"), brute(model, x))


def test_the_orders_above_use_every_kind_of_step():
    def kinds(step):
        return {step.how}.union(*(kinds(part) for part in (step.left, step.right) if part is not None))

    more = [((5, 6, 7), (False, False, False), 3), ((3, 500, 2), (False, True, False), 2)]
    asked = [(w, (False, *[True] * (len(w) - 2), False), n) for w, n in SHAPES] + more
    assert set.union(*(kinds(order.solve(*each)) for each in asked)) == set(order.How.__args__)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Tanh(), nn.Linear(6, 4), nn.ReLU(), nn.Sigmoid(), nn.Linear(4, 3), nn.GELU("tanh")),
        nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)),
        nn.Sequential(nn.Flatten(), nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 4), nn.ELU(0.3)), nn.Linear(4, 2)),
        nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 4), nn.ELU(inplace=True), nn.Identity(), nn.Linear(4, 2)),
        nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.LeakyReLU(0.2), nn.ReLU(), nn.Linear(6, 6), nn.ReLU()),
        nn.Linear(6, 3),
    ],
    ids=range(6),
)  # fmt: skip
def test_other_plain_nets(model):
    model, x = copy.deepcopy(model).double(), torch.randn(5, 6, dtype=torch.float64)
    before = x.clone()
    close(again(model, x), brute(model, x))
    assert torch.equal(x, before)


def test_images_through_flatten():
    model, x = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(18, 4)).double(), torch.randn(3, 2, 3, 3).double()
    close(again(model, x), brute(model, x))


@pytest.mark.parametrize("outputs", [[3], [0, 2], [-1, 1], range(1, 4)])
def test_some_outputs_only(outputs):
    model, x = net(5, 9, 4, last=True), torch.randn(3, 5, dtype=torch.float64)
    close(jacray.jacobian(model, x, method="chain", outputs=list(outputs)), brute(model, x)[:, list(outputs)])


def test_another_precision_than_the_models():
    model, x = net(5, 9, 4, dtype=torch.float32), torch.randn(3, 5)
    close(jacray.jacobian(model, x, dtype="float64"), brute(copy.deepcopy(model).double(), x.double()))


def test_products_come_from_its_blocks():
    model, x = net(5, 9, 4), torch.randn(3, 5, dtype=torch.float64)
    found = jacray.compute(model, x, returns=["jacobian", "norms", "gram", "mean_jacobian"], method="chain")
    J = brute(model, x)
    close(found.norms, J.flatten(1).norm(dim=1))
    close(found.gram, torch.einsum("bri,brj->ij", J, J))
    close(found.mean_jacobian, J.mean(0))


def test_the_same_bits_by_every_way_and_every_time():
    model, x = net(6, 30, 30, 5, dtype=torch.float32), torch.randn(50, 6)
    first, second = jacray.jacobian(model, x), jacray.jacobian(model, x)
    by_engine = compute_here(prepare(model, x, make_request()), 0.0).jacobian
    assert torch.equal(first, second)
    assert torch.equal(first, by_engine)


def test_an_infinite_weight_behind_a_gate_that_is_off_counts_for_nothing():
    model, x = net(2, 3, 2, act=nn.ReLU), torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    with torch.no_grad():
        model[0].bias[1] = -100.0
        model[2].weight[0, 1] = torch.inf
    close(again(model, x), brute(model, x))


def test_what_is_not_finite_is_told():
    model, x = net(3, 4, 2, act=nn.ReLU), torch.randn(4, 3, dtype=torch.float64)
    with torch.no_grad():
        model[0].bias += 50.0
        model[2].weight[0, 0] = torch.nan
    found = jacray.compute(model, x, method="chain")
    assert found.receipt["nonfinite"][0]["count"] == 4 * 3
    with pytest.raises(jacray.NonFiniteError):
        jacray.jacobian(model, x, nan_policy="raise")


# --- what happens between two calls --------------------------------------------------------------------------------


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 9), nn.Linear(9, 4)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


class Double(nn.Module):
    def forward(self, w):
        return 2 * w


def _step(model):
    torch.optim.SGD(model.parameters(), lr=0.5).zero_grad()
    model(torch.ones(3, 5, dtype=torch.float64)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()


def _prune(model):
    torch.nn.utils.prune.l1_unstructured(model[0], "weight", amount=0.5)


def _swap_class(model):
    model[2].__class__ = Doubled


def _replace(model):
    model[0].weight = nn.Parameter(torch.randn_like(model[0].weight))


def _wider(model):
    model[0], model[2] = nn.Linear(5, 11).double(), nn.Linear(11, 4).double()


def _backward_hook(model):
    model[2].register_full_backward_hook(lambda _, grads, __: (3 * grads[0],))


CHANGES = {
    "an optimiser's step": _step,
    "weights in place": lambda m: m[0].weight.data.mul_(-2),
    "weights through .data": lambda m: setattr(m[0].weight, "data", torch.randn_like(m[0].weight)),
    "a state dict": lambda m: m.load_state_dict(net(5, 9, 4).state_dict()),
    "a state dict that is assigned": lambda m: m.load_state_dict(net(5, 9, 4).state_dict(), assign=True),
    "a new parameter": _replace,
    "frozen weights": lambda m: m.requires_grad_(False),
    "training mode": lambda m: m.train(),
    "a forward hook": lambda m: m[1].register_forward_hook(lambda _, __, y: 3 * y),
    "a forward hook on all": lambda m: m.register_forward_hook(lambda _, __, y: y**2),
    "a forward pre-hook": lambda m: m[2].register_forward_pre_hook(lambda _, x: (x[0] ** 3,)),
    "a backward hook": _backward_hook,
    "a forward of its own": lambda m: setattr(m[1], "forward", torch.sin),
    "another class": _swap_class,
    "a parametrisation": lambda m: nn.utils.parametrize.register_parametrization(m[0], "weight", Double()),
    "weight norm": lambda m: nn.utils.parametrizations.weight_norm(m[2]),
    "pruning": _prune,
    "another function": lambda m: m.__setitem__(1, nn.Softplus(2.0)),
    "an unknown function": lambda m: m.__setitem__(1, nn.Hardtanh(-0.1, 0.2)),
    "another layer": lambda m: m.append(nn.Linear(4, 4).double()),
    "one layer less": lambda m: m.__delitem__(1),
    "other widths": _wider,
    "no bias": lambda m: m[0].register_parameter("bias", None),
    "a batch norm": lambda m: m.insert(1, nn.BatchNorm1d(9).double()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_the_first_calls_counts(change):
    torch.manual_seed(len(change))
    model, x = net(5, 9, 4), torch.randn(6, 5, dtype=torch.float64)
    again(model, x)
    CHANGES[change](model)
    close(jacray.jacobian(model, x), brute(model, x))
    close(jacray.jacobian(model, x), brute(model, x))


def test_settings_of_a_function_count():
    model = nn.Sequential(nn.Linear(5, 9), nn.Softplus(1.0), nn.Linear(9, 4), nn.GELU()).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    again(model, x)
    model[1].beta, model[3].approximate = 3.0, "tanh"
    close(jacray.jacobian(model, x), brute(model, x))


def test_a_global_hook_counts():
    model, x = net(5, 9, 4), torch.randn(6, 5, dtype=torch.float64)
    again(model, x)
    hook = nn.modules.module.register_module_forward_hook(lambda m, _, y: 2 * y if isinstance(m, nn.Tanh) else None)
    try:
        assert lane.recall(model, x, {}) is None
        close(jacray.jacobian(model, x), brute(model, x))
    finally:
        hook.remove()


def test_a_forward_that_is_replaced_for_all_counts(monkeypatch):
    model, x = net(5, 9, 4), torch.randn(6, 5, dtype=torch.float64)
    again(model, x)
    monkeypatch.setattr(nn.Tanh, "forward", lambda _, h: torch.sin(h))
    close(jacray.jacobian(model, x), brute(model, x))


def test_dropout_that_draws_is_not_left_out():
    model = nn.Sequential(nn.Linear(5, 9), nn.Dropout(0.5), nn.Linear(9, 4)).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    still = again(model, x)
    drawn = jacray.jacobian(model, x, training=True)
    assert not torch.allclose(drawn, still)
    close(jacray.jacobian(model, x), still)


OTHERS = {
    "another batch": (torch.randn(9, 5).double(), {}),
    "float32 beside a model of float64": (torch.randn(6, 5).double(), {"dtype": "float32"}),
    "some outputs": (torch.randn(6, 5).double(), {"outputs": [1]}),
    "strided inputs": (torch.randn(5, 12).double().T[::2], {}),
    "inputs that require a gradient": (torch.randn(6, 5).double().requires_grad_(), {}),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_inputs_and_fields(other):
    model = net(5, 9, 4)
    again(model, torch.randn(6, 5, dtype=torch.float64))
    x, fields = OTHERS[other]
    found, expected = jacray.jacobian(model, x, **fields), brute(model, x)
    if "outputs" in fields:
        expected = expected[:, fields["outputs"]]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert not found.requires_grad


def test_a_result_is_its_callers_own():
    model, x = net(40, 300, 90), torch.randn(40, 40, dtype=torch.float64)
    first = again(model, x)
    kept = first.clone()
    second = jacray.jacobian(model, x + 1)
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, kept)


@pytest.mark.parametrize("around", [torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)])
def test_what_the_caller_has_switched_on(around):
    model, x = net(5, 9, 4, dtype=torch.float32), torch.randn(6, 5)
    expected = again(model, x)
    with around():
        torch.testing.assert_close(jacray.jacobian(model, x), expected, rtol=1e-5, atol=1e-6)


def test_a_wrong_batch_is_refused_as_ever():
    model = net(5, 9, 4)
    again(model, torch.randn(6, 5, dtype=torch.float64))
    with pytest.raises(jacray.ModelError, match="must accept the inputs"):
        jacray.jacobian(model, torch.randn(6, 7, dtype=torch.float64))


def test_threads_share_a_model():
    model, x = net(5, 9, 4), torch.randn(6, 5, dtype=torch.float64)
    expected = again(model, x)
    params = jacray.jacobian(model, x, wrt="params", form="dense")
    gaps = []

    def inputs():
        gaps.extend(float((jacray.jacobian(model, x) - expected).abs().max()) for _ in range(50))

    def parameters():
        for _ in range(10):
            found = jacray.jacobian(model, x, wrt="params", form="dense")
            gaps.extend(float((found[name] - params[name]).abs().max()) for name in params)

    workers = [threading.Thread(target=work) for work in (inputs, parameters, inputs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert max(gaps) < 1e-12
    assert len(gaps) == 100 + 10 * len(params)


LIGHT = """
import sys, torch, jacray
from torch import nn
model, x = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(5, 3)
jacray.jacobian(model, x)
print(sorted({"sympy", "torch._dynamo", "torch.distributed.tensor"}.intersection(sys.modules)))
"""


def test_a_first_call_loads_no_compiler():
    done = subprocess.run([sys.executable, "-W", "error", "-c", LIGHT], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("method", ["auto", "forward", "layerwise", "backward_loop"])
def test_a_backward_hook_that_comes_later_counts_in_any_model(method):
    model, x = Own().double(), torch.randn(6, 5, dtype=torch.float64)
    jacray.jacobian(model, x, method=method)
    model.last.register_full_backward_hook(lambda _, grads, __: (3 * grads[0],))
    if method == "forward":
        with pytest.raises(jacray.MethodError, match="disagrees with plain autograd"):
            jacray.jacobian(model, x, method=method)
    else:
        close(jacray.jacobian(model, x, method=method), brute(model, x))


# --- what is no plain net --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4)),
        nn.Sequential(nn.Linear(5, 4), nn.Softmax(-1)),
        nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)),
        nn.Sequential(nn.Linear(5, 4), nn.Linear(5, 4)),
        nn.Sequential(nn.Tanh()),
        nn.Sequential(nn.Flatten(0), nn.Linear(5, 4)),
        nn.Linear(5, 4).to(torch.bfloat16),
        type("Mine", (nn.Sequential,), {})(nn.Linear(5, 4)),
        nn.Sequential(type("Mine", (nn.Linear,), {})(5, 4)),
        nn.Sequential(nn.LazyLinear(4)),
        lambda x: x,
    ],
    ids=range(11),
)
def test_nothing_else_is_read(model):
    assert read(model) is None


def test_a_model_that_is_gone_is_forgotten():
    model, x = net(5, 9, 4), torch.randn(6, 5, dtype=torch.float64)
    again(model, x)
    assert model in lane._known
    count = len(lane._known)
    del model
    assert len(lane._known) == count - 1

"""Plain convolutional nets: the short way is right, and reads the model as it is at each call."""

from __future__ import annotations

import copy
import threading

import jacray
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from jacray_workers.kernels import sweep_convs
from jacray_workers.straight import convs, lane
from torch import nn

FIELDS = {"wrt": "params", "form": "dense", "method": "layerwise"}


def net(*parts, head):
    torch.manual_seed(0)
    return nn.Sequential(*parts, nn.Flatten(), *(head if isinstance(head, list) else [head]))


def plain(seed=0):
    torch.manual_seed(seed)
    convolutions = (
        nn.Conv2d(2, 5, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(5, 6, 3, stride=2, padding=1),
        nn.ReLU(),
    )
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(6 * 3 * 2, 4))


X = torch.randn(5, 2, 11, 8, generator=torch.Generator().manual_seed(1))


def brute(model, x):
    """One sample and one output number at a time, in eval mode and float64."""
    model = copy.deepcopy(model).eval().double()
    named = dict(model.named_parameters())
    blocks = {name: [] for name in named}
    for sample in x.double():
        rows = [torch.autograd.grad(n, named.values(), retain_graph=True) for n in model(sample[None]).flatten()]
        for name, grads in zip(named, zip(*rows, strict=True), strict=True):
            blocks[name].append(torch.stack(grads))
    return {name: torch.stack(parts) for name, parts in blocks.items()}


def close(found, expected):
    assert list(found) == list(expected)
    for name, block in found.items():
        size = expected[name].abs().max().item()
        torch.testing.assert_close(block.double(), expected[name], rtol=0, atol=2e-6 * max(size, 1), msg=name)


def remembered(model, x):
    """The result of a second call, which took the short way."""
    jacray.jacobian(model, x, **FIELDS)
    found = lane.recall(model, x, FIELDS)
    assert found is not None
    return found.value


def fitted(shape, *parts, then):
    """The parts, flattened, and behind them the layers that `then` makes for as many numbers."""
    torch.manual_seed(0)
    features = nn.Sequential(*parts).eval()(torch.zeros(shape)).flatten(1).shape[1]
    return nn.Sequential(*parts, nn.Flatten(), *then(features)).train(), shape


NETS = {
    "few channels": (plain(), (5, 2, 11, 8)),
    "many channels": fitted(
        (3, 3, 7, 8),
        nn.Conv2d(3, 40, 3, padding=1), nn.ReLU(), nn.Conv2d(40, 36, 3, 2), nn.ReLU(), nn.Conv2d(36, 8, 1),
        then=lambda n: [nn.Linear(n, 3)],
    ),
    "one convolution": fitted((4, 1, 5, 5), nn.Conv2d(1, 3, 4), nn.Tanh(), then=lambda n: [nn.Linear(n, 2)]),
    "no function, no bias": fitted(
        (4, 2, 4, 6),
        nn.Conv2d(2, 3, (2, 3), bias=False), nn.Conv2d(3, 2, 2, bias=False),
        then=lambda n: [nn.Linear(n, 3, bias=False)],
    ),
    "strides and dilations": fitted(
        (3, 2, 10, 9),
        nn.Conv2d(2, 4, 3, (1, 3), (2, 1), (2, 1)), nn.GELU(), nn.Conv2d(4, 3, 2, (3, 1), 1), nn.ELU(),
        then=lambda n: [nn.Linear(n, 5)],
    ),
    "several Linear layers": fitted(
        (6, 1, 7, 7),
        nn.Conv2d(1, 4, 3, 2), nn.ReLU(), nn.Dropout(), nn.Conv2d(4, 5, 2), nn.SiLU(),
        then=lambda n: [nn.Linear(n, 9), nn.Tanh(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3)],
    ),
    "sequences within": fitted(
        (2, 2, 6, 6),
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True)), nn.Identity(), nn.Conv2d(3, 2, 3),
        then=lambda n: [nn.Linear(n, 2)],
    ),
    "one output": fitted((3, 1, 4, 4), nn.Conv2d(1, 2, 3), nn.ReLU(), then=lambda n: [nn.Linear(n, 1)]),
    "one sample": (plain(3), (1, 2, 11, 8)),
}  # fmt: skip


@pytest.mark.parametrize(("portion", "pairs"), [(1 << 24, 1 << 20), (1 << 12, 1 << 20), (1 << 24, 0)])
@pytest.mark.parametrize("name", NETS)
def test_the_short_way_is_right(name, portion, pairs, monkeypatch):
    monkeypatch.setattr(convs, "PORTION", portion)
    monkeypatch.setattr(sweep_convs, "PAIRS", pairs)
    model, shape = NETS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    before = x.clone()
    close(remembered(model, x), brute(model, x))
    assert torch.equal(x, before)


def test_inputs_of_any_strides_and_results_of_their_own():
    model = plain()
    x = X.to(memory_format=torch.channels_last)
    first = remembered(model, x)
    expected = {name: block.clone() for name, block in first.items()}
    second = jacray.jacobian(model, x.contiguous() * 2, **FIELDS)
    assert all(torch.equal(first[name], expected[name]) for name in first)
    close(second, brute(model, X * 2))


def test_a_result_as_part_of_a_computation():
    model = plain()
    remembered(model, X)
    result = jacray.compute(model, X, returns=["jacobian"], **FIELDS)
    close(result.jacobian, brute(model, X))
    assert result.receipt["plan"]["method"] == "layerwise"


def trained(model):
    with torch.no_grad():
        model[0].weight.mul_(1.5)


def replaced(model):
    model[2].weight = nn.Parameter(torch.randn_like(model[2].weight))


def exchanged(model):
    model[1] = nn.Tanh()


def wider(model):
    model[2], model[5] = nn.Conv2d(5, 8, 3, stride=2, padding=1), nn.Linear(48, 4)


def strided(model):
    model[2].stride, model[5] = (1, 1), nn.Linear(6 * 24, 4)


def padded_otherwise(model):
    model[0].padding_mode = "circular"
    model[0]._reversed_padding_repeated_twice = [1, 1, 1, 1]


def hooked(model):
    model[0].register_forward_hook(lambda _, __, y: y * 3)


def its_own_forward(model):
    model[2].forward = lambda h: F.conv2d(h, model[2].weight, model[2].bias, 2, 1) * 2


def its_own_convolution(model):
    before = model[0]._conv_forward
    model[0]._conv_forward = lambda *args: before(*args) * 2


def parametrized(model):
    nn.utils.parametrizations.weight_norm(model[0])


def shared(model):
    model[2], model[4] = nn.Conv2d(5, 6, 3, stride=2, padding=1), nn.Flatten()
    model[2].bias = model[0].bias = None
    model[5].bias = None


@pytest.mark.parametrize(
    "change",
    [trained, replaced, exchanged, wider, strided, padded_otherwise, hooked, its_own_forward, its_own_convolution,
     parametrized, shared],
)  # fmt: skip
def test_a_change_after_the_first_calls_counts(change):
    model = plain()
    remembered(model, X)
    change(model)
    close(jacray.jacobian(model, X, **FIELDS), brute_here(model, X))


def brute_here(model, x):
    """The same without a copy of the model, whose hooks and methods may belong to it."""
    named = dict(model.named_parameters())
    blocks = {name: [] for name in named}
    for sample in x:
        rows = [torch.autograd.grad(n, named.values(), retain_graph=True) for n in model(sample[None]).flatten()]
        for name, grads in zip(named, zip(*rows, strict=True), strict=True):
            blocks[name].append(torch.stack(grads).double())
    return {name: torch.stack(parts) for name, parts in blocks.items()}


class Own(nn.Conv2d):
    """A convolution that is none of torch's own."""

    def forward(self, x):
        return super().forward(x).neg()


TWICE = nn.Conv2d(3, 3, 3, padding=1)
OTHERS = {
    "groups": net(nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), head=nn.Linear(4 * 54, 3)),
    "padding as a word": net(nn.Conv2d(2, 4, 3, padding="same"), head=nn.Linear(4 * 88, 3)),
    "padding with what is there": net(nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), head=nn.Linear(4 * 88, 3)),
    "a pool": net(nn.Conv2d(2, 4, 3), nn.MaxPool2d(2), head=nn.Linear(48, 3)),
    "a norm": net(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), head=nn.Linear(4 * 54, 3)),
    "a class of one's own": net(Own(2, 4, 3), head=nn.Linear(4 * 54, 3)),
    "a function first": net(nn.ReLU(), nn.Conv2d(2, 4, 3), head=nn.Linear(4 * 54, 3)),
    "a function last": net(nn.Conv2d(2, 4, 3), head=[nn.Linear(4 * 54, 3), nn.Tanh()]),
    "one used twice": net(nn.Conv2d(2, 3, 1), TWICE, nn.ReLU(), TWICE, head=nn.Linear(3 * 88, 3)),
    "float64": plain().double(),
    "not flattened": nn.Sequential(nn.Conv2d(2, 4, (11, 1)), nn.Linear(8, 3)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_nets_go_the_long_way(name):
    model = OTHERS[name].eval()
    x = X.to(next(model.parameters()).dtype)
    expected = brute(model, x)
    jacray.jacobian(model, x, **FIELDS)
    assert lane.recall(model, x, FIELDS) is None
    found = jacray.jacobian(model, x, **FIELDS)
    close({n: block.flatten(1, block.dim() - expected[n].dim() + 1) for n, block in found.items()}, expected)


@pytest.mark.parametrize("change", [{"form": "auto"}, {"wrt": "inputs"}, {"wrt": ["0.weight"]}, {"chunk_size": 2}])
def test_other_requests_go_the_long_way(change):
    model, fields = plain(), {**FIELDS, **change}
    fields = {k: v for k, v in fields.items() if k != "form" or change.get("wrt") != "inputs"}
    remembered(model, X)
    assert lane.recall(model, X, fields) is None


def test_a_convolution_that_is_replaced_for_all_counts(monkeypatch):
    model = plain()
    remembered(model, X)
    before = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *args, **kwargs: before(*args, **kwargs) * 2)
    assert lane.recall(model, X, FIELDS) is None


def test_threads_share_a_model():
    model = plain()
    expected = remembered(model, X)
    wrong = []

    def work():
        for _ in range(10):
            found = jacray.jacobian(model, X, **FIELDS)
            wrong.extend(name for name in found if not torch.equal(found[name], expected[name]))

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_rows_lie_apart_in_the_sum_over_places():
    weight = torch.randn(4, 3, 3, 2)
    y = torch.randn(2, 4, 4, 5)
    settings = {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}
    space = (8, 7)
    cots = torch.randn(2, 5, *y.shape[1:])  # 2 images, 5 rows
    flat = cots.flatten(3).permute(0, 3, 1, 2).reshape(-1, 4)
    found = sweep_convs.gather(flat, weight, 2, 5, space, (4, 5), *settings.values()).view(2, 56, 5, 3)
    expected = F.conv_transpose2d(cots.flatten(0, 1), weight, **settings, output_padding=(1, 0))
    expected = expected.view(2, 5, 3, 56).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

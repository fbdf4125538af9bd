"""A second call uses what the first one prepared only where the model is still what it was."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import jacray
import pytest
import torch
from jacray_workers.again import Batch, again
from jacray_workers.engine import prepare
from jacray_workers.errors import CoupledSamplesError
from jacray_workers.planning import planner, relook
from jacray_workers.request import make_request
from torch import nn

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
MODE = {"mixes": False}
MIXES = False


class Model(nn.Module):
    """Mixes its samples once whatever `asks` looks at has changed."""

    def __init__(self, asks, **attributes):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.asks = nn.Linear(3, 2), asks
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        y = torch.tanh(self.layer(x))
        return y - y.mean(dim=0) if self.asks(self) else y


class Flagged(Model):
    mixes = False


class Global(Model):
    def forward(self, x):
        y = torch.tanh(self.layer(x))
        return y - y.mean(dim=0) if MODE["mixes"] or MIXES else y


class Hidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.settings = {"mixes": 0}


@pytest.fixture
def plans(monkeypatch):
    """How often a plan was made."""
    made = []
    choose = planner.choose

    def counted(*args, **kwargs):
        made.append(1)
        return choose(*args, **kwargs)

    monkeypatch.setattr(planner, "choose", counted)
    return made


def change(name, model, monkeypatch):
    """Change what the model of this name looks at, in place."""
    {
        "dict": lambda: model.cfg.update(mode="mix"),
        "list": lambda: model.flags.__setitem__(1, True),
        "nested": lambda: model.cfg["a"]["b"].append(1),
        "set": lambda: model.names.add("mix"),
        "object": lambda: setattr(model.config, "mixes", True),
        "object in a list": lambda: setattr(model.configs[0], "mixes", True),
        "hidden module": lambda: model.hidden[0].settings.update(mixes=1),
        "closure": lambda: model.asks.__closure__[0].cell_contents.append(1),
        "partial": lambda: model.asks.args[0].append(1),
        "class": lambda: monkeypatch.setattr(Flagged, "mixes", True),
        "global container": lambda: monkeypatch.setitem(MODE, "mixes", True),
        "global": lambda: monkeypatch.setitem(globals(), "MIXES", True),
        "buffer": lambda: model.on.fill_(1.0),
        "parameter": lambda: model.alpha.data.copy_(torch.ones(())) and model.alpha.detach().add_(1.0),
        "tensor": lambda: model.plain.fill_(1.0),
        "array": lambda: model.array.__setitem__(0, 1.0),
        "hook": lambda: model.layer.register_forward_hook(lambda _m, _a, y: y - y.mean(dim=0)),
    }[name]()


def build(name):
    held: list[int] = []
    return {
        "dict": lambda: Model(lambda m: m.cfg["mode"] == "mix", cfg={"mode": "apart"}),
        "list": lambda: Model(lambda m: m.flags[1], flags=[False, False]),
        "nested": lambda: Model(lambda m: len(m.cfg["a"]["b"]) > 0, cfg={"a": {"b": []}}),
        "set": lambda: Model(lambda m: "mix" in m.names, names={"a"}),
        "object": lambda: Model(lambda m: m.config.mixes, config=SimpleNamespace(mixes=False)),
        "object in a list": lambda: Model(lambda m: m.configs[0].mixes, configs=[SimpleNamespace(mixes=False)]),
        "hidden module": lambda: Model(lambda m: m.hidden[0].settings["mixes"], hidden=[Hidden()]),
        "closure": lambda: Model(lambda _: bool(held)),
        "partial": lambda: Model(functools.partial(lambda found, _: bool(found), held)),
        "class": lambda: Flagged(lambda m: m.mixes),
        "global container": lambda: Global(None),
        "global": lambda: Global(None),
        "buffer": lambda: Model(lambda m: bool(m.on > 0), on=nn.Buffer(torch.zeros(()))),
        "parameter": lambda: Model(lambda m: bool(m.alpha > 0), alpha=nn.Parameter(torch.zeros(()))),
        "tensor": lambda: Model(lambda m: bool(m.plain > 0), plain=torch.zeros(())),
        "array": lambda: Model(lambda m: m.array[0] > 0, array=torch.zeros(2).numpy()),
        "hook": lambda: Model(lambda _: False),
    }[name]()


NAMES = [
    *("dict", "list", "nested", "set", "object", "object in a list", "hidden module", "closure", "partial", "class"),
    *("global container", "global", "buffer", "parameter", "tensor", "array", "hook"),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_change_in_place_is_seen(name, monkeypatch, plans):
    model = build(name)
    first = jacray.jacobian(model, X)
    assert torch.equal(jacray.jacobian(model, X), first)
    assert len(plans) == 1
    change(name, model, monkeypatch)
    with pytest.raises(CoupledSamplesError):
        jacray.jacobian(model, X)


def test_a_function_that_reads_a_container(plans):
    kept = {"scale": [2.0]}

    def function(x):
        return x**3 * kept["scale"][0] if len(kept["scale"]) == 1 else x - x.mean(dim=0)

    jacray.jacobian(function, X)
    jacray.jacobian(function, X)
    assert len(plans) == 1
    kept["scale"].append(1.0)
    with pytest.raises(CoupledSamplesError):
        jacray.jacobian(function, X)


def test_training_goes_on_without_new_plans(plans):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.GELU(), nn.Linear(5, 2))
    for _ in range(3):
        model.train()
        model(X).sum().backward()
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(0.1 * p.grad)
        model.eval()
        found = jacray.jacobian(model, X)
    assert len(plans) == 1
    expected = torch.func.vmap(torch.func.jacrev(lambda x: model(x[None])[0]))(X)
    torch.testing.assert_close(found, expected)


def test_an_object_that_every_call_changes_costs_no_new_plan(plans):
    model = Model(lambda m: m.meter.__dict__.update(calls=m.meter.calls + 1), meter=SimpleNamespace(calls=0))
    for _ in range(3):
        jacray.jacobian(model, X)
    assert len(plans) == 1
    assert model.meter.calls > 3


def test_what_is_far_too_much_to_look_at_counts_by_identity(plans):
    vocabulary = {f"word {i}": i for i in range(50_000)}
    deep: list[object] = [SimpleNamespace(inner=[[[[[i]]]]]) for i in range(5000)]
    deep.append(deep)
    model = Model(lambda _: False, vocabulary=vocabulary, deep=deep, cycle={})
    model.cycle["model"] = model
    jacray.jacobian(model, X, seed=0)
    jacray.jacobian(model, X, seed=0)
    assert len(plans) == 1
    model.vocabulary = {}
    jacray.jacobian(model, X, seed=0)
    assert len(plans) == 2


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_scripted_container():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    scripted = torch.jit.script(plain)
    for _ in range(2):
        torch.testing.assert_close(jacray.jacobian(scripted, X), jacray.jacobian(plain, X))


class Far(nn.Module):
    """Treats its samples apart as long as none is far out."""

    def forward(self, x):
        y = torch.tanh(x)
        far = (x.abs().amax() > 50).to(x)
        return y + far * (y.mean(dim=0) - y)


def test_new_data_in_which_samples_are_no_longer_apart(plans):
    model, x = Far(), torch.randn(6, 3)
    jacray.jacobian(model, x)
    near, far = torch.randn(6, 3), torch.randn(6, 3)
    jacray.jacobian(model, near)
    assert len(plans) == 1
    far[5, 0] = 60.0
    jacray.jacobian(model, torch.randn(6, 3))
    # The fourth inputs are looked at, and go one by one: a sample alone is its own mean.
    found = jacray.jacobian(model, far)
    assert len(plans) == 2
    torch.testing.assert_close(found, torch.diag_embed(1 - torch.tanh(far) ** 2))


def test_the_same_inputs_are_not_looked_at_again(monkeypatch):
    model, x = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2)), torch.randn(6, 3)
    jacray.jacobian(model, x)
    looks = []
    monkeypatch.setattr(relook, "look", lambda *_: looks.append(1) or "")
    for _ in range(20):
        jacray.jacobian(model, x)
    assert not looks
    x += 1.0
    jacray.jacobian(model, x)
    assert len(looks) == 1
    monkeypatch.setattr(relook, "SHARE", 0.0)
    for _ in range(31):
        jacray.jacobian(model, torch.randn(6, 3))
    assert len(looks) <= 5


def test_work_that_is_kept_warm_is_looked_at_too():
    """A service keeps what it prepared, and uses it for other inputs."""
    model, request = Far(), make_request()
    first = prepare(model, torch.randn(6, 3), request)
    far = torch.randn(6, 3)
    far[5, 0] = 60.0
    assert again(first, [Batch(torch.randn(6, 3), request)]) is not None
    assert again(first, [Batch(torch.randn(6, 3), request)]) is not None
    assert again(first, [Batch(far, request)]) is None
    assert again(first, [Batch(far, request)]) is None
    anew = prepare(model, far, request)
    assert not anew.plan.batched
    assert again(anew, [Batch(torch.randn(6, 3), request)]) is not None

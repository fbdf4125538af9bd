"""Model specs: what they build, and how what is wrong with them is told."""

from __future__ import annotations

import pickle
import sys

import pytest
import torch
from jacray_workers.errors import ModelError
from jacray_workers.models import as_model, build, digest
from jacray_workers.models.specs import LAYERS, FunctionModel, ImportModel, Layer, LayersModel
from safetensors.torch import save_file
from torch import nn

LINEAR = {"kind": "Linear", "in_features": 2, "out_features": 3}
X = torch.tensor([[2.0, 3.0], [1.0, 2.0]])


def layers(*entries, **fields):
    return {"kind": "layers", "layers": list(entries), **fields}


def function(expression, **fields):
    return {"kind": "function", "expression": expression, **fields}


def refusal(spec, base=None):
    with pytest.raises(ModelError) as caught:
        as_model(spec, base)
    return caught.value


# What is built --------------------------------------------------------------------------------------------------


def test_layers_equal_the_same_layers_made_by_hand_from_the_same_seed():
    spec = layers(
        LINEAR, {"kind": "Tanh"}, {"kind": "Linear", "in_features": 3, "out_features": 1, "bias": False}, seed=7
    )
    torch.manual_seed(7)
    by_hand = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1, bias=False))
    made = as_model(spec)
    assert torch.equal(made(X), by_hand(X))
    assert list(made.state_dict()) == ["0.weight", "0.bias", "2.weight"]
    assert not made.training


def test_building_leaves_the_callers_random_state_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    as_model(layers(LINEAR, seed=5))
    assert torch.equal(torch.rand(3), expected)


def test_blocks_compute_what_their_names_say():
    inner = {"kind": "Linear", "in_features": 2, "out_features": 2}
    made = as_model(
        layers(
            {"kind": "residual", "layers": [inner, {"kind": "Tanh"}], "name": "skip"},
            {"kind": "residual", "layers": [LINEAR], "shortcut": [LINEAR]},
            {"kind": "parallel", "branches": [[{"kind": "Tanh"}], [{"kind": "ReLU"}], []]},
            {"kind": "parallel", "branches": [[{"kind": "Tanh"}], [{"kind": "Identity"}]], "combine": "sum"},
            {"kind": "sequential", "layers": [{"kind": "Tanh"}, {"kind": "Tanh"}]},
        )
    )
    x = X + torch.tanh(made.skip.layers[0](X))
    x = made[1].shortcut(x) + made[1].layers(x)
    x = torch.cat([x.tanh(), x.relu(), x], dim=1)
    x = (x.tanh() + x).tanh().tanh()
    torch.testing.assert_close(made(X), x)


@pytest.mark.parametrize("kind", LAYERS)
def test_every_listed_layer_is_one_of_torchs(kind):
    assert issubclass(getattr(nn, kind), nn.Module)


def test_a_dtype_is_given_by_name():
    assert as_model(layers({**LINEAR, "dtype": "float64"}))[0].weight.dtype == torch.float64


FUNCTIONS = [
    ("mean(3*(a+3))", {}, [16.5, 13.5]),
    (["2*a[0]**2", "2*a[1]**3"], {}, [[8.0, 54.0], [2.0, 16.0]]),
    ("a @ w", {"constants": {"w": [[1], [1]]}}, [[5.0], [3.0]]),
    ("a @ w", {"parameters": {"w": [[1], [1]]}}, [[5.0], [3.0]]),
    (["a[0]", "1"], {}, [[2.0, 1.0], [1.0, 1.0]]),
]


@pytest.mark.parametrize(("expression", "fields", "value"), FUNCTIONS)
def test_a_function_is_evaluated_sample_by_sample(expression, fields, value):
    assert torch.equal(as_model(function(expression, **fields))(X), torch.tensor(value))


def test_a_function_of_named_inputs_with_named_outputs():
    made = as_model(function({"y": "a*b", "z": ["a", "b"]}, inputs=["a", "b"]))
    found = made(a=X[:, 0], b=X[:, 1])
    assert torch.equal(found["y"], X[:, 0] * X[:, 1])
    assert torch.equal(found["z"], X)
    assert torch.equal(made(X[:, 0], X[:, 1])["y"], found["y"])


def test_a_function_works_under_torch_func_and_survives_a_pickle():
    made = pickle.loads(pickle.dumps(as_model(function(["2*a[0]**2", "2*a[1]**3"]))))
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x: made(x[None])[0]))(X)
    assert torch.equal(jacobian[0], torch.tensor([[8.0, 0.0], [0.0, 54.0]]))


def test_constants_keep_their_precision_in_double():
    made = as_model(function("a*c", constants={"c": 0.1}))
    assert made(X.double())[0, 0] == 2.0 * 0.1
    assert made(X).dtype == torch.float32


def test_an_import_calls_the_factory_with_its_arguments_and_loads_files_beside_the_spec(tmp_path):
    (tmp_path / "nets_beside.py").write_text(
        "from torch import nn\n\nclass Net(nn.Linear):\n    pass\n\n"
        "def make(width: int) -> nn.Module:\n    return Net(2, width)\n"
    )
    spec = {"kind": "import", "target": "nets_beside:make", "args": {"width": 4}, "seed": 3}
    made = as_model(spec, tmp_path)
    torch.manual_seed(3)
    assert torch.equal(made.weight, nn.Linear(2, 4).weight)
    assert str(tmp_path) not in sys.path
    import cloudpickle

    assert b"nets_beside" in cloudpickle.dumps(made)
    del sys.modules["nets_beside"]
    sent = cloudpickle.dumps(made)
    assert torch.equal(pickle.loads(sent).weight, made.weight)


def test_a_module_or_callable_comes_back_as_it_is():
    module = nn.Linear(2, 2)
    assert as_model(module) is module
    assert as_model(torch.tanh) is torch.tanh


def test_a_spec_object_is_built_too():
    assert isinstance(as_model(LayersModel(layers=(Layer(kind="Tanh"),)))[0], nn.Tanh)


# Weights --------------------------------------------------------------------------------------------------------


def weights_file(path, **tensors):
    save_file(tensors, path)
    return path.name


def test_weights_come_from_the_file(tmp_path):
    name = weights_file(tmp_path / "w.safetensors", **{"0.weight": torch.ones(3, 2), "0.bias": torch.zeros(3)})
    made = as_model(layers(LINEAR, weights=name), tmp_path)
    assert torch.equal(made(X), X.sum(dim=1, keepdim=True).expand(2, 3))


def test_weights_that_do_not_fit_are_refused_with_the_list(tmp_path):
    name = weights_file(tmp_path / "w.safetensors", **{"0.weight": torch.ones(3, 3), "0.bis": torch.zeros(3)})
    error = refusal(layers(LINEAR, weights=name), tmp_path)
    assert error.argument == "model.weights"
    assert "missing: 0.bias" in error.rule
    assert "extra: 0.bis" in error.rule
    assert "0.weight is [3, 3] and should be [3, 2]" in error.rule


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x08\0\0\0\0\0\0\0{}      ", pickle.dumps({"0.weight": 1})])
def test_a_file_that_is_no_safetensors_is_refused(tmp_path, content):
    (tmp_path / "w.safetensors").write_bytes(content)
    error = refusal(layers(LINEAR, weights="w.safetensors"), tmp_path)
    assert error.argument == "model.weights"
    assert "w.safetensors" in str(error)


def test_a_digest_follows_spec_and_weights_but_not_the_path(tmp_path):
    tensors = {"0.weight": torch.ones(3, 2), "0.bias": torch.zeros(3)}
    weights_file(tmp_path / "a.safetensors", **tensors)
    weights_file(tmp_path / "b.safetensors", **tensors)
    weights_file(tmp_path / "c.safetensors", **{**tensors, "0.bias": torch.ones(3)})
    entry = (Layer(kind="Linear", in_features=2, out_features=3),)
    a, b, c, seeded = (
        digest(LayersModel(layers=entry, **fields), tmp_path)
        for fields in ({"weights": "a.safetensors"}, {"weights": "b.safetensors"}, {"weights": "c.safetensors"},
                       {"weights": "a.safetensors", "seed": 1})
    )  # fmt: skip
    assert a == b
    assert len({a, c, seeded}) == 3


# What is refused ------------------------------------------------------------------------------------------------

RESIDUAL = {"kind": "residual", "layers": [LINEAR]}
WRONG = [
    ({"kind": "layer"}, "model.kind", "must be one of layers, import, function", "did you mean layers?"),
    ({"layers": []}, "model.kind", "is required: one of layers, import, function", ""),
    (layers(), "model.layers", "must be a list of at least 1", "[]"),
    (layers(3), "model.layers.0", "must be a mapping with a kind", "3"),
    (layers({}), "model.layers.0.kind", "is required", "jacray schema"),
    (layers({"kind": "Liner"}), "model.layers.0.kind", "must be one of", "Liner. did you mean Linear?"),
    (layers({"kind": "LSTM"}), "model.layers.0.kind", "must be one of", "LSTM"),
    (
        layers({**LINEAR, "out_featres": 3}),
        "model.layers.0.out_featres",
        "is not a known argument of Linear",
        "did you mean out_features?",
    ),
    (layers({"kind": "Tanh", "x": 1}), "model.layers.0.x", "is not a known argument of Tanh", "takes no arguments"),
    (layers({**LINEAR, "device": "cuda"}), "model.layers.0.device", "is not a known argument", ""),
    (layers({**LINEAR, "dtype": "int8"}), "model.layers.0.dtype", "must be one of float64", "int8"),
    (layers({**LINEAR, "bias": {"a": 1}}), "model.layers.0.bias", "must be a number, a text", "{'a': 1}"),
    (layers({"kind": "Linear", "in_features": 2}), "model.layers.0.out_features", "is required by Linear", ""),
    (layers({**LINEAR, "in_features": 2.5}), "model.layers.0", "Linear refuses its arguments", "in_features=2.5"),
    (layers({**LINEAR, "in_features": 0}), "model.layers.0", "must not have an empty parameter", "in_features=0"),
    (layers({**LINEAR, "in_features": -1}), "model.layers.0", "negative dimension", "in_features=-1"),
    (layers({**LINEAR, "in_features": 10**12}), "model.layers.0", "at most 2,147,483,648 parameters", "3000000000003"),
    (
        layers({"kind": "TransformerEncoderLayer", "d_model": 4, "nhead": 2}),
        "model.layers.0.batch_first",
        "must be true",
        "False",
    ),
    (layers({**RESIDUAL, "layrs": []}), "model.layers.0.layrs", "is not a known name", "did you mean layers?"),
    (layers({"kind": "residual", "layers": [{**LINEAR, "x": 1}]}), "model.layers.0.layers.0.x", "Linear", ""),
    (
        layers({"kind": "parallel", "branches": [[{"kind": "x"}]]}),
        "model.layers.0.branches.0.0.kind",
        "must be one of",
        "x",
    ),
    (
        layers({"kind": "parallel", "branches": [[LINEAR]], "dim": 0}),
        "model.layers.0.dim",
        "must not be the batch axis",
        "0",
    ),
    (
        layers({"kind": "parallel", "branches": [[LINEAR]], "combine": "add"}),
        "model.layers.0.combine",
        "must be one of",
        "add",
    ),
    (layers({**LINEAR, "name": "a.b"}), "model.layers.0.name", "must be letters", "a.b"),
    (layers({**LINEAR, "name": "forward"}), "model.layers.0.name", "is a name that", "forward"),
    (layers({**LINEAR, "name": "a"}, {**LINEAR, "name": "a"}), "model.layers.1.name", "must be used once", "a"),
    (layers(LINEAR, sed=1), "model.sed", "is not a known name", "did you mean seed?"),
    (layers(LINEAR, seed=-1), "model.seed", "must be at least 0", "-1"),
    (layers(LINEAR, seed=True), "model.seed", "must be a whole number", "True"),
    (layers(LINEAR, weights="w.npz"), "model.weights", "must end in .safetensors or .pt", "w.npz"),
    (layers(LINEAR, weights="no.safetensors"), "model.weights", "names nothing that exists", "no.safetensors"),
    (layers(LINEAR, weights="a\nb"), "model.weights", "printable", "'a\\nb'"),
    (layers(LINEAR, weights=3), "model.weights", "must be a text", "3"),
    ({"kind": "import", "target": "os.system"}, "model.target", "must be package.module:factory", "os.system"),
    (
        {"kind": "import", "target": "os:system", "args": {"command": "true"}},
        "model.target",
        "standard library",
        "os:system",
    ),
    (
        {"kind": "import", "target": "no_such_package:x"},
        "model.target",
        "there is no module no_such_package",
        "install it",
    ),
    ({"kind": "import", "target": "torch.nn:Lnear"}, "model.target", "names nothing in torch.nn", "Lnear"),
    (
        {"kind": "import", "target": "torch.nn:Linear", "args": {"in_features": 2}},
        "model.target",
        "raised TypeError",
        "in_features",
    ),
    (
        {"kind": "import", "target": "torch:ones", "args": {"size": [2]}},
        "model.target",
        "must make an nn.Module",
        "Tensor",
    ),
    ({"kind": "import", "target": "torch:pi"}, "model.target", "must name a function or class", "torch:pi"),
    (function("a.b"), "model.expression", "may not reach for attributes", "a.b"),
    (function([]), "model.expression", "must hold at least one expression", "[]"),
    (function(3), "model.expression", "must be an expression, a list of them or a mapping", "3"),
    (function({"y": ["a", "sm(a)"]}), "model.expression.y.1", "sm, which is not a known function", "did you mean sum?"),
    (function("a+b"), "model.inputs", "is required", "the free names a, b"),
    (function("1"), "model.inputs", "is required", "no free name"),
    (function("a+b", inputs=["a"]), "model.expression", "reads the unknown name b", "known names: a"),
    (function("a", inputs=["sum"]), "model.inputs.0", "that is no function", "sum"),
    (function("a*w", constants={"w": [[1], [1, 2]]}), "model.constants.w.1", "must have 1 entries", "2 entries"),
    (function("a*w", constants={"w": "x"}), "model.constants.w", "must be a number", "x"),
    (function("a*w", inputs=["a"], constants={"a": 1, "w": 1}), "model.inputs", "must differ", "a"),
]


@pytest.mark.parametrize(("spec", "argument", "rule", "shown"), WRONG, ids=[w[1] + " " + w[2][:24] for w in WRONG])
def test_a_wrong_spec_is_refused_with_its_key_rule_and_value(spec, argument, rule, shown):
    error = refusal(spec)
    assert error.argument == argument
    assert rule in error.rule
    assert shown in str(error)


def test_layers_that_cannot_fit_together_are_refused_before_they_are_made():
    wide = {"kind": "Linear", "in_features": 40_000, "out_features": 50_000}
    back = {"kind": "Linear", "in_features": 50_000, "out_features": 40_000}
    error = refusal(layers(*[wide, back] * 500))
    assert error.argument == "model.layers"
    assert "TiB" in str(error.value)
    assert "of memory that are free" in error.rule


def test_an_import_outside_the_allowed_packages_runs_nothing(tmp_path):
    (tmp_path / "touches.py").write_text(f"open({str(tmp_path / 'touched')!r}, 'w')\ndef make(): pass\n")
    for prefixes in ((), ("torch", "touch")):
        with pytest.raises(ModelError) as caught:
            build(ImportModel(target="touches:make"), tmp_path, import_prefixes=prefixes)
        assert "may not be imported here" in caught.value.rule
    assert not (tmp_path / "touched").exists()


def test_a_module_that_fails_to_import_keeps_its_cause(tmp_path):
    (tmp_path / "broken_module.py").write_text("1/0\n")
    error = refusal({"kind": "import", "target": "broken_module:x"}, tmp_path)
    assert "ZeroDivisionError" in error.rule
    assert isinstance(error.__cause__, ZeroDivisionError)


def test_a_function_that_does_not_fit_its_inputs_says_so_before_computing():
    with pytest.raises(ModelError) as caught:
        as_model(function("a[5]"))(X)
    assert caught.value.argument == "model.expression"
    assert "index 5 is out of bounds" in caught.value.rule
    assert "a: [2]" in str(caught.value)
    with pytest.raises(ModelError, match="takes the inputs a"):
        as_model(function("a"))(X, X)


def test_a_function_that_blows_up_is_refused_before_it_allocates():
    made = as_model(FunctionModel(expression="outer(flatten(outer(a, a)), a)"))
    with pytest.raises(ModelError, match="at most 16,777,216 numbers per sample"):
        made(torch.ones(1, 1000))

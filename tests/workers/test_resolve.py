"""What a user gets wrong: each mistake is one error with its four parts, argument, rule, value and way out."""

from __future__ import annotations

import collections
import pickle

import numpy as np
import pytest
import torch
from jacray_workers.errors import (
    BudgetError,
    CoupledSamplesError,
    InputError,
    MethodError,
    ModelError,
    NonFiniteError,
    RequestError,
    UserError,
)
from jacray_workers.problem.resolve import pick_device, resolve
from jacray_workers.request import make_request
from torch import nn

from tests.door import compute


def mistake(kind: type[UserError], model, inputs, **fields) -> UserError:
    """The error that this call ends in, which must be of exactly this kind, and survive a trip between processes."""
    with pytest.raises(kind) as caught:
        compute(model, inputs, **fields)
    error = caught.value
    assert type(error) is kind
    assert str(error).startswith(f"{error.argument}: {error.rule}")
    twin = pickle.loads(pickle.dumps(error))
    assert (type(twin), str(twin), twin.way_out) == (kind, str(error), error.way_out)
    return error


def net(out: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(collections.OrderedDict(body=nn.Linear(4, 5), act=nn.Tanh(), head=nn.Linear(5, out)))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 3), nn.Linear(3, 2)

    def forward(self, tokens):
        return self.head(self.embed(tokens).mean(1))


X = torch.linspace(-1, 1, 12).reshape(3, 4)


# ---------------------------------------------------------------------------------------------------- the inputs


def test_an_empty_batch():
    error = mistake(InputError, net(), torch.zeros(0, 4))
    assert (error.argument, error.rule) == ("inputs", "must hold at least one sample")
    assert "(0, 4)" in str(error.value)


def test_a_tensor_without_a_batch():
    error = mistake(InputError, net(), torch.tensor(1.0))
    assert (error.argument, error.rule) == ("inputs", "must have the batch as its first axis")
    assert error.way_out == "for a single sample add the axis: x.unsqueeze(0)"


def test_batches_of_two_sizes():
    error = mistake(InputError, lambda a, b: a + b, (torch.ones(3, 2), torch.ones(4, 2)))
    assert error.rule == "must have the same batch size in every leaf"
    assert error.value == "0: 3, 1: 4"


def test_no_tensor_at_all():
    assert mistake(InputError, net(), {}).rule == "must hold at least one tensor"
    error = mistake(InputError, net(), {"x": "text"})
    assert (error.argument, error.value) == ("inputs.x", "str")
    assert mistake(InputError, net(), np.array([object()])).argument == "inputs"


def test_whole_numbers_without_an_embedding():
    error = mistake(InputError, net(), torch.ones(3, 4, dtype=torch.int64))
    assert (error.argument, error.rule, error.value) == (
        "inputs",
        "must be floating point to be differentiated",
        "int64",
    )
    assert error.way_out == "cast it to a float type if it is a quantity"


def test_token_ids_are_sent_to_the_embedding():
    error = mistake(InputError, Tokens(), torch.ones(3, 4, dtype=torch.int64))
    assert error.way_out == ("differentiate where the tokens become vectors: wrt={'module': 'embed', 'side': 'output'}")
    found = compute(Tokens(), torch.ones(3, 4, dtype=torch.int64), wrt={"module": "embed", "side": "output"})
    assert found.jacobian.shape == (3, 2, 4, 3)


def test_one_of_the_named_inputs_is_whole():
    def model(x, index):
        return x.gather(1, index)

    inputs = (X, torch.zeros(3, 1, dtype=torch.int64))
    error = mistake(InputError, model, inputs, wrt="inputs.index")
    assert (error.argument, error.value) == ("inputs.index", "int64")
    # The others are still differentiated, and this one has none.
    assert compute(model, inputs).jacobian[1] is None


def test_an_unknown_input_name():
    def model(first, second):
        return first + second

    error = mistake(RequestError, model, {"first": X, "second": X}, wrt="inputs.secnd")
    assert (error.argument, error.rule, error.value) == ("wrt", "names no input", "inputs.secnd")
    assert "inputs.second" in error.way_out
    error = mistake(RequestError, net(), X, wrt="inputs.x")
    assert error.way_out == "the input is one bare tensor: use inputs"


def test_names_from_the_signature_are_known():
    def model(first, second):
        return first * second

    found = compute(model, (X, X), wrt="inputs.second").jacobian
    assert torch.allclose(found, torch.diag_embed(X))


def test_bare_numbers_are_a_batch():
    found = compute(lambda x: x**2, [[1.0, 2.0], [3.0, 4.0]]).jacobian
    assert found.tolist() == [[[2.0, 0.0], [0.0, 4.0]], [[6.0, 0.0], [0.0, 8.0]]]
    assert compute(lambda x: x**2, np.array([[1.0, 2.0]])).jacobian.dtype == torch.float64


# ----------------------------------------------------------------------------------------------------- the model


def test_not_a_model():
    error = mistake(ModelError, 3, X)
    assert (error.argument, error.value) == ("model", "int")
    assert "nn.Module" in error.rule


def test_a_lazy_model():
    error = mistake(ModelError, nn.Sequential(nn.LazyLinear(3)), X)
    assert (error.rule, error.value) == ("must have initialised parameters", "0.weight")
    assert error.way_out == "call the model once on a batch first"


def test_a_model_that_raises_keeps_its_cause():
    def model(x):
        raise ZeroDivisionError("the reactor is cold")

    error = mistake(ModelError, model, X)
    assert error.argument == "model"
    assert "raised ZeroDivisionError: the reactor is cold" in error.rule
    assert "(1, 4) float32" in str(error.value)
    assert isinstance(error.__cause__, ZeroDivisionError)


def test_a_model_of_another_precision_is_told_how_to_cast():
    error = mistake(ModelError, net(), X.double())
    assert isinstance(error.__cause__, RuntimeError)
    assert "dtype='float32'" in error.way_out
    assert compute(net(), X.double(), dtype="float64").jacobian.dtype == torch.float64


def test_wrong_shapes_of_inputs_name_the_batch():
    error = mistake(ModelError, net(), torch.ones(3, 9))
    assert "mat1 and mat2" in error.rule
    assert "(1, 9) float32" in str(error.value)


@pytest.mark.parametrize(
    ("model", "value"),
    [(lambda x: x.long(), "int64"), (lambda _: None, "NoneType"), (lambda _: [], "nothing"), (lambda x: x > 0, "bool")],
)
def test_a_model_without_a_float_output(model, value):
    error = mistake(ModelError, model, X)
    assert error.rule == "must return at least one floating-point tensor"
    assert error.value == value


def test_a_scalar_for_the_whole_batch():
    error = mistake(ModelError, lambda x: x.sum(), X)
    assert error.rule == "must keep the batch as the first axis of the output"
    assert error.value == "a scalar for the whole batch"
    assert "y.mean(dim=-1)" in error.way_out


def test_a_batch_that_is_not_first():
    error = mistake(ModelError, lambda x: x.T, X)
    assert error.rule == "must keep the batch as the first axis of the output"
    assert "shape (4, 1) for a batch of one" in str(error.value)
    assert error.way_out == "put the batch first and keep its size"


def test_an_output_that_loses_the_batch_is_named():
    error = mistake(ModelError, lambda x: {"good": x, "bad": x.sum(0)}, X)
    assert "bad" in error.rule


def test_batch_norm_in_training_mode_is_named():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    error = mistake(CoupledSamplesError, model, X, training=True)
    assert "batch norm in training mode" in error.rule
    assert error.value == "module 1"
    assert "training=False" in error.way_out
    assert compute(model, X).jacobian.shape == (3, 5, 4)


# --------------------------------------------------------------------------------------------------- the request


def test_an_unknown_method_proposes_the_nearest():
    error = mistake(RequestError, net(), X, method="revers")
    assert (error.argument, error.value) == ("method", "revers")
    assert "reverse" in str(error)


def test_an_unknown_field_proposes_the_nearest():
    error = mistake(RequestError, net(), X, chunksize=3)
    assert error.argument == "chunksize"
    assert "chunk_size" in str(error)


@pytest.mark.parametrize(("field", "value"), [("chunk_size", 0), ("chunk_size", -1), ("seed", -1), ("top_k", 0)])
def test_numbers_out_of_range(field, value):
    error = mistake(RequestError, net(), X, **{field: value})
    assert error.argument == field
    assert "at least" in error.rule
    assert str(error.value) == str(value)


@pytest.mark.parametrize("budget", [0, -5, "lots", "5 XB", "0%", "200%", "", True, -0.5, "nan"])
def test_budgets_that_are_nonsense(budget):
    error = mistake(RequestError, net(), X, memory_budget=budget)
    assert error.argument == "memory_budget"
    assert "2GiB" in str(error)


@pytest.mark.parametrize("returns", [[], "jacobean", ["jacobian", "hessian"]])
def test_returns_that_are_not(returns):
    error = mistake(RequestError, net(), X, returns=returns)
    assert error.argument.startswith("returns")
    assert "jacobian" in str(error)


def test_duplicate_returns_count_once():
    found = compute(net(), X, returns=["jacobian", "jacobian", "outputs"])
    assert list(found.found) == ["jacobian", "outputs"]


def test_duplicate_targets_count_once():
    found = compute(net(), X, wrt=["params", "*.weight", "inputs", "inputs"]).jacobian
    assert sorted(found) == ["body.bias", "body.weight", "head.bias", "head.weight", "inputs"]
    assert found["body.weight"].shape == (3, 2, 5, 4)


def test_an_empty_list_of_targets():
    error = mistake(RequestError, net(), X, wrt=[])
    assert error.argument == "wrt"
    assert "inputs.NAME" in str(error)


def test_a_glob_that_matches_nothing_proposes_the_nearest():
    error = mistake(RequestError, net(), X, wrt="heed.weight")
    assert (error.argument, error.value) == ("wrt", "heed.weight")
    assert error.rule == "is neither inputs nor a glob that matches a parameter"
    assert "head.weight" in error.way_out


def test_parameters_of_a_function():
    error = mistake(RequestError, lambda x: x, X, wrt="params")
    assert (error.argument, error.rule) == ("wrt", "the model has no parameters")
    assert "wrt='inputs'" in error.way_out


def test_an_unknown_module_proposes_the_nearest():
    for field in ("wrt", "outputs"):
        error = mistake(RequestError, net(), X, **{field: {"module": "bodi"}})
        assert (error.argument, error.value) == (field, "bodi")
        assert error.rule == "names no submodule of the model"
        assert "body" in error.way_out


def test_a_point_that_is_passed_twice_or_never():
    layer = nn.Linear(4, 4)
    error = mistake(ModelError, nn.Sequential(layer, layer), X, wrt={"module": "0"})
    assert error.rule == "must be called exactly once per pass to stand for a point of the model"
    assert error.value == "2 calls"

    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            return self.used(x)

    assert mistake(ModelError, Idle(), X, wrt={"module": "idle"}).value == "0 calls"


def test_a_point_where_whole_numbers_pass():
    error = mistake(
        RequestError, Tokens(), torch.ones(3, 4, dtype=torch.int64), wrt={"module": "embed", "side": "input"}
    )
    assert error.argument == "wrt"
    assert "torch.int64" in str(error.value)


def test_a_point_without_a_batch():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Identity(), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(x) * self.inner(torch.ones(7)).mean()

    error = mistake(RequestError, Odd(), X, wrt={"module": "inner"})
    assert error.rule == "must name a point with the batch as its first axis"
    assert "inner:output: shape (7,)" in str(error.value)


@pytest.mark.parametrize("point", [{"module": "body", "side": "middle"}, {"side": "input"}, {"module": 3}, 7, None])
def test_a_target_that_is_none(point):
    assert mistake(RequestError, net(), X, wrt=point).argument.startswith("wrt")


def test_an_unknown_output_name():
    def model(x):
        return {"logits": x, "hidden": x}

    error = mistake(RequestError, model, X, outputs="logit")
    assert (error.argument, error.rule, error.value) == ("outputs", "names no output of the model", "logit")
    assert "logits" in error.way_out
    assert "bare tensor" in mistake(RequestError, net(), X, outputs="y").way_out


@pytest.mark.parametrize("choice", [[2], [-3], 9, [0, 5]])
def test_indices_out_of_range(choice):
    error = mistake(RequestError, net(), X, outputs=choice)
    assert error.argument == "outputs"
    assert error.rule == "must be indices into one sample's flattened output of 2 numbers"
    assert error.way_out == "use -2 to 1"


@pytest.mark.parametrize("choice", [[], [0.5], [True]])
def test_indices_that_are_none(choice):
    error = mistake(RequestError, net(), X, outputs=choice)
    assert error.argument == "outputs"
    assert "must be indices" in error.rule


def test_indices_without_a_name_where_there_are_several_outputs():
    error = mistake(RequestError, lambda x: {"a": x, "b": x}, X, outputs=[0])
    assert "must say which output" in error.rule
    assert "{a: [...]}" in error.way_out


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cuda", "mps:x"])
def test_a_device_that_is_not_there(device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    error = mistake(RequestError, net(), X, device=device)
    assert (error.argument, error.value) == ("device", device)


def test_the_device_of_the_model_is_taken():
    assert pick_device("auto", net(), [X]).type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device("cpu", net(), [X]) == torch.device("cpu")


def test_an_unknown_precision():
    assert mistake(RequestError, net(), X, dtype="float8").argument == "dtype"
    assert compute(net(), X, dtype=torch.float64).jacobian.dtype == torch.float64


# -------------------------------------------------------------------------------------------- numbers and memory


def test_nan_policy():
    def model(x):
        return x.sqrt()

    x = torch.tensor([[1.0, 4.0], [0.0, 4.0], [-1.0, 4.0]])
    error = mistake(NonFiniteError, model, x, nan_policy="raise")
    assert (error.argument, error.rule) == ("nan_policy", "raise forbids NaN and infinity")
    assert "in jacobian, first at sample 1" in str(error.value)
    assert "propagate" in error.way_out
    kept = compute(model, x)
    assert kept.jacobian[0].tolist() == [[0.5, 0.0], [0.0, 0.25]]
    assert not torch.isfinite(kept.jacobian[1, 0, 0])
    (found,) = kept.shards[0].nonfinite
    assert (found.key, found.first) == ("jacobian", 1)
    assert found.count == int((~torch.isfinite(kept.jacobian)).sum())


def test_a_budget_too_small_names_both_figures():
    error = mistake(BudgetError, nn.Linear(512, 512), torch.ones(4, 512), memory_budget="64kB")
    assert error.argument == "memory_budget"
    assert "MiB" in error.rule
    assert "62.5 KiB" in str(error.value)
    assert "raise the budget" in error.way_out


def test_a_chunk_that_does_not_fit_the_budget():
    x = torch.ones(64, 256)
    error = mistake(BudgetError, nn.Linear(256, 256), x, memory_budget="17MiB", chunk_size=64)
    assert "64 samples at a time" in error.rule


def test_an_explicit_method_that_cannot_work_names_one_that_can():
    error = mistake(MethodError, nn.GRU(4, 3, batch_first=True), torch.ones(2, 3, 4), method="reverse", outputs="0")
    assert error.argument == "method"
    assert error.rule.startswith("reverse cannot do this work: ")
    assert error.value == "reverse"
    assert "use method='auto', or " in error.way_out


def test_a_plan_for_other_samples():
    prepared = compute(net(), X)
    error = mistake(InputError, net(), X[:2], plan=prepared.plan)
    assert error.rule == "must have the 3 samples that the plan was made for"


def test_resolve_touches_neither_inputs_nor_module():
    model, x = net(), X.clone()
    problem, leaves = resolve(model, x, make_request())
    assert leaves[0] is x
    assert problem.module is model
    assert model.training

import subprocess
import sys

import jacray
import pytest
import torch

from tests.toys import mlp


def test_results_are_attributes() -> None:
    x = torch.randn(4, 5)
    result = jacray.compute(mlp(), x, returns=["jacobian", "outputs"])
    assert result.jacobian.shape == (4, 3, 5)
    torch.testing.assert_close(result.outputs, mlp()(x))
    assert result.names == ("jacobian", "outputs")
    assert "jacobian: (4, 3, 5) float32" in repr(result)
    assert "4 samples by" in repr(result)
    assert dict(result)["jacobian"] is result.jacobian


def test_what_was_not_asked_for_says_how_to_ask() -> None:
    result = jacray.compute(mlp(), torch.randn(4, 5))
    with pytest.raises(AttributeError, match=r"ntk was not asked for.*returns=\['jacobian', 'ntk'\]"):
        result.ntk  # noqa: B018
    with pytest.raises(AttributeError, match="did you mean jacobian"):
        result.jacobain  # noqa: B018


def test_parameters_come_by_name() -> None:
    blocks = jacray.jacobian(mlp(), torch.randn(4, 5), wrt="params")
    assert {name: tuple(block.shape) for name, block in blocks.items()} == {
        "0.weight": (4, 3, 16, 5),
        "0.bias": (4, 3, 16),
        "2.weight": (4, 3, 3, 16),
        "2.bias": (4, 3, 3),
    }


def test_one_result_functions_refuse_returns() -> None:
    with pytest.raises(jacray.RequestError, match=r"jacray\.compute"):
        jacray.jacobian(mlp(), torch.randn(4, 5), returns=["ntk"])


def test_a_request_can_be_passed_and_changed() -> None:
    request = jacray.Request(returns=("outputs",), method="reverse")
    result = jacray.compute(mlp(), torch.randn(4, 5), request=request, method="forward")
    assert result.plan.method == "forward"
    assert result.names == ("outputs",)


def test_a_plan_computes_nothing_but_tells() -> None:
    plan = jacray.plan(mlp(), torch.randn(4, 5), method="reverse", workers=2)
    assert isinstance(plan, jacray.Plan)
    assert plan.samples == 4
    assert "reverse" in plan.explain()


def test_model_specs_are_models() -> None:
    spec = {"kind": "layers", "layers": [{"kind": "Linear", "in_features": 5, "out_features": 2}], "seed": 3}
    assert jacray.jacobian(spec, torch.randn(4, 5)).shape == (4, 2, 5)


def test_the_callers_memory_is_not_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 5)
    result = jacray.compute(torch.nn.Identity(), x, returns=["outputs"])
    result.outputs.zero_()
    assert x.abs().sum() > 0


def test_what_torch_loads_on_first_use_is_no_part_of_a_method_s_seconds() -> None:
    # A process of its own, in which no derivative of torch.func has run: its first call takes a second and more.
    program = """
import jacray, torch
from torch import nn
net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
plan = jacray.plan(net, torch.rand(20_000, 1, 8, 8))
print(*(f"{c.method} {c.measured} {c.seconds}" for c in plan.candidates if not c.refused))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=200)
    words = ran.stdout.split()
    found = {
        name: float(s) for name, tried, s in zip(words[::3], words[1::3], words[2::3], strict=True) if tried == "True"
    }
    assert "reverse" in found
    # Two samples and the loading, taken for the pace of all, came to hours.
    assert found["reverse"] < 60 * found["layerwise"]

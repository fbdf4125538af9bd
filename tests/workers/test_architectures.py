"""Real architectures of torchvision and timm, by every way that leads to them, against brute force in float64."""

from __future__ import annotations

import copy
import subprocess
import sys

import jacray
import pytest
import torch
from jacray_workers.errors import ModelError
from jacray_workers.models import as_model, torchvision_operators
from jacray_workers.models.torchvision_operators import with_operators

from tests.architectures import architectures
from tests.hostile import command

__all__ = ["architectures"]
RESNET = {"kind": "torchvision", "name": "resnet18", "args": {"num_classes": 3}, "seed": 1}
VIT = {"kind": "timm", "name": "vit_tiny_patch16_224", "args": {"img_size": 32, "num_classes": 3, "depth": 3}}
CONVNET = {"kind": "timm", "name": "convnext_atto", "args": {"num_classes": 3}, "seed": 2}


def brute_force(module, x):
    """J `(B, out, C, H, W)` in float64, one sample and one output at a time."""
    exact = copy.deepcopy(module).double().eval()
    return torch.stack([torch.autograd.functional.jacobian(lambda s: exact(s[None])[0], one) for one in x.double()])


def agree(J, expected):
    scale = expected.abs().max()
    assert scale > 0
    assert ((J.double() - expected).abs().max() / scale) < 2e-5


def pictures(samples=2, size=32):
    return torch.randn(samples, 3, size, size, generator=torch.Generator().manual_seed(3))


def lively(module):
    """Norms that have seen data: running statistics other than zero and one."""
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return module


@pytest.mark.parametrize("spec", [RESNET, VIT, CONVNET], ids=lambda spec: spec["name"])
def test_by_name_with_a_seed(architectures, spec):
    x = pictures()
    result = jacray.compute(spec, x, verify=True)
    agree(result.jacobian, brute_force(as_model(spec), x))
    assert result.receipt["verified"]["passed"]


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_by_name_with_weights_from_a_file(architectures, tmp_path, suffix):
    from safetensors.torch import save_file
    from torchvision.models import resnet18

    torch.manual_seed(7)
    mine = lively(resnet18(num_classes=3))
    if suffix == "pt":
        torch.save(mine.state_dict(), tmp_path / "w.pt")
    else:
        save_file(mine.state_dict(), tmp_path / "w.safetensors")
    x = pictures()
    agree(jacray.jacobian({**RESNET, "weights": str(tmp_path / f"w.{suffix}")}, x), brute_force(mine, x))


@pytest.mark.slow
def test_by_import_and_as_a_graph(architectures, tmp_path):
    x = pictures()
    module = as_model({"kind": "import", "target": "torchvision.models:resnet18", "args": {"num_classes": 3}})
    module = lively(module)
    expected = brute_force(module, x)
    agree(jacray.jacobian(module, x), expected)
    jacray.export(module, x[:1], tmp_path / "resnet.safetensors")
    graph = {"kind": "graph", "path": str(tmp_path / "resnet.safetensors")}
    agree(jacray.jacobian(graph, x), expected)
    assert torch.equal(as_model(graph)(x), module.eval()(x))
    # Between two points inside, by the names that torchvision gives them.
    points = {"wrt": {"module": "layer3", "side": "output"}, "outputs": {"module": "avgpool"}}
    inside = jacray.jacobian(module, x, **points)
    assert inside.shape == (2, 512, 1, 1, 256, 2, 2)
    torch.testing.assert_close(jacray.jacobian(graph, x, **points), inside, rtol=1e-4, atol=1e-6)


def test_parameters_of_a_vision_transformer(architectures):
    x = pictures(1)
    J = jacray.jacobian(VIT, x, wrt=["blocks.1.attn.*", "head.weight"], form="dense")
    exact = as_model(VIT).double()
    y = exact(x.double())[0]
    for name, parameter in exact.named_parameters():
        if name in J:
            expected = torch.stack([torch.autograd.grad(row, parameter, retain_graph=True)[0] for row in y])
            agree(J[name][0], expected)
    assert {"head.weight", "blocks.1.attn.qkv.weight"} <= set(J)


def test_a_missing_operator_says_so(architectures):
    import torchvision

    if torchvision.extension._has_ops():
        pytest.skip("torchvision's operators load here")
    boxes, scores = torch.rand(4, 4), torch.rand(4)
    with pytest.raises(ModelError, match=r"needs one of torchvision's compiled operators.*torchvision::nms.*build of"):
        torch.ops.torchvision.nms(boxes, scores, 0.5)

    class Deformed(torch.nn.Module):
        def forward(self, x):
            offset = x.new_zeros(x.shape[0], 18, *x.shape[2:])
            return torch.ops.torchvision.deform_conv2d(
                x, x.new_ones(2, 3, 3, 3), offset, x.new_zeros(x.shape[0], 0), x.new_zeros(2),
                1, 1, 1, 1, 1, 1, 1, 1, False,
            )  # fmt: skip

    with pytest.raises(ModelError, match="compiled operators"):
        jacray.jacobian(Deformed(), pictures(1, 4))
    assert "do not load beside this torch" in jacray.plan(RESNET, pictures(1)).explain()
    assert torchvision_operators.note(torch.nn.Tanh()) == ""


def test_other_errors_pass():
    calls = []

    def act():
        calls.append(1)
        raise RuntimeError("operator torchvision::of_no_one does not exist")

    with pytest.raises(RuntimeError, match="of_no_one"):
        with_operators(act)
    assert len(calls) == 1


def test_an_architecture_that_calls_for_what_it_may_not_is_refused(architectures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("resnet18_of_nobody", "vit_tiny"):
        with pytest.raises(ModelError, match="names no architecture"):
            as_model({"kind": "timm", "name": name})
    with pytest.raises(ModelError, match="refuses its arguments"):
        as_model({**RESNET, "args": {"num_classes": 3, "of_nobody": 1}})
    with pytest.raises(ModelError, match="num_classes"):
        as_model({**RESNET, "args": {"num_classes": -3}})


PROGRAM = """
import sys, torch
sys.path.append(sys.argv[1])
from jacray.transport import unpack
with open(sys.argv[2], "rb") as stream:
    import pickle
    model, x, y = unpack(pickle.load(stream))
assert "torchvision.models.resnet" in sys.modules
assert torch.equal(model(x), y)
"""


def test_a_model_travels_to_a_process_that_has_not_met_torchvision(architectures, tmp_path):
    import pickle

    from jacray.transport import pack

    model, x = as_model(RESNET), pictures(1)
    (tmp_path / "packed").write_bytes(pickle.dumps(pack((model, x, model(x).detach()), copy=True)))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(architectures), str(tmp_path / "packed")],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_transformers_beside_torchvision(architectures, tmp_path):
    """It imports torchvision where it finds it, and tells what it met as an error of its own."""
    from transformers import BertConfig, BertModel

    small = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=8,
    )  # fmt: skip
    BertModel(small).save_pretrained(tmp_path / "bert")
    program = (
        f"import sys; sys.path.append({str(architectures)!r}); from jacray_workers.models import as_model;"
        f"as_model({{'kind': 'huggingface', 'path': {str(tmp_path / 'bert')!r}}});"
        "assert 'torchvision' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_command_line_takes_one(architectures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(
        "model: {kind: torchvision, name: mobilenet_v3_small, args: {num_classes: 4}}\n"
        "inputs: {kind: random, shape: [2, 3, 32, 32]}\n"
        "request: {returns: [weighted_gradient], weights: [1, 0, 0, 2]}\n"
        "cluster: {address: inline}\noutput: {path: run}\n"
    )
    code, _, err = command("run", "s.yaml")
    assert code == 0, err
    from jacray_workers.sources import load
    from jacray_workers.sources.specs import Random

    x = load(Random(shape=(2, 3, 32, 32)), tmp_path).inputs
    module = as_model({"kind": "torchvision", "name": "mobilenet_v3_small", "args": {"num_classes": 4}})
    k = torch.tensor([1.0, 0, 0, 2], dtype=torch.float64)
    expected = torch.einsum("k,bkchw->bchw", k, brute_force(module, x))
    agree(torch.as_tensor(jacray.load("run").weighted_gradient), expected)

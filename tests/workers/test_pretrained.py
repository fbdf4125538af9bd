"""Pretrained models that nobody here wrote, with the weights in their packages, through `import` and as graphs."""

from __future__ import annotations

from pathlib import Path

import jacray
import pytest
import torch
from jacray_workers.models import as_model, graph

OCR = '''
from khmer_ocr_ocm import CRNN

class BatchFirst(CRNN):
    """The recogniser, with the batch as the first axis of its logits."""

    def forward(self, x):
        return super().forward(x).transpose(0, 1)
'''
POCKETS = '''
import torch
from pocketnet import feat
from pocketnet.model import PocketNet

class Points(PocketNet):
    """Scores of surface points on one fixed protein: a batch of points, each with its own features and distances."""

    def __init__(self, width, layers, atoms=60):
        super().__init__(width, layers)
        draw = torch.Generator().manual_seed(0)
        kinds = torch.randint(1, feat.N_TYPES - 1, (atoms,), generator=draw)
        xyz = 4 * torch.randn(atoms, 3, generator=draw)
        points = xyz[:5] + 1.5
        held = self.graph(kinds, xyz, points, torch.zeros(5, feat.N_PF))
        self.atoms = {name: held[name] for name in ("ty", "cnt", "ei", "d")}
        self.example = {name: held[name] for name in ("ax", "rad", "dp", "ip", "i1")}

    def forward(self, pf, ax, rad, dp, ip, i1):
        return self.forward_graph({**self.atoms, "pf": pf, "ax": ax, "rad": rad, "dp": dp, "ip": ip, "i1": i1})[0]
'''


@pytest.mark.slow
def test_a_text_recogniser_by_import_and_as_a_graph(tmp_path):
    package = pytest.importorskip("khmer_ocr_ocm")
    (tmp_path / "recogniser.py").write_text(OCR)
    spec = {"kind": "import", "target": "recogniser:BatchFirst", "weights": str(package.get_model_path())}
    model = as_model(spec, tmp_path)
    torch.manual_seed(0)
    x = torch.rand(2, 1, 48, 16) * 2 - 1
    chosen = [5, 990, 2000]
    J = jacray.jacobian(model, x, outputs=chosen)
    expected = torch.stack(
        [torch.autograd.functional.jacobian(lambda s: model(s[None])[0].flatten()[chosen], one) for one in x]
    )
    assert J.abs().max() > 1e-3
    torch.testing.assert_close(J, expected, rtol=1e-3, atol=1e-4 * float(J.abs().max()))
    loaded = graph.load(graph.dump(model, x))
    torch.testing.assert_close(
        jacray.jacobian(loaded, x, outputs=chosen), J, rtol=1e-3, atol=1e-4 * float(J.abs().max())
    )


@pytest.mark.slow
def test_a_graph_network_for_proteins_by_import_and_as_a_graph(tmp_path):
    package = pytest.importorskip("pocketnet")
    weights = Path(package.__file__).parent / "weights" / "v3_fold0.pt"
    state = torch.load(weights, weights_only=True, map_location="cpu")
    layers = len([name for name in state if name.endswith("msg.0.weight")])
    (tmp_path / "points.py").write_text(POCKETS)
    spec = {
        "kind": "import",
        "target": "points:Points",
        "args": {"width": state["emb.weight"].shape[1], "layers": layers},
        "weights": str(weights),
    }
    model = as_model(spec, tmp_path)
    torch.manual_seed(0)
    inputs = {"pf": torch.randn(5, model.pfn[0].in_features), **model.example}
    loaded = graph.load(graph.dump(model, inputs))
    for name in ("pf", "ax"):
        J = jacray.jacobian(model, inputs, wrt=f"inputs.{name}")
        J = J[name] if isinstance(J, dict) else J
        expected = torch.stack(
            [
                torch.autograd.functional.jacobian(
                    lambda v, i=i, name=name: model(**{k: t[i : i + 1] for k, t in inputs.items()} | {name: v[None]})[
                        0
                    ],
                    inputs[name][i],
                )
                for i in range(5)
            ]
        )
        assert expected.abs().max() > 1e-4
        near = 1e-4 * float(expected.abs().max())
        torch.testing.assert_close(J, expected, rtol=1e-3, atol=near)
        found = jacray.jacobian(loaded, inputs, wrt=f"inputs.{name}")
        torch.testing.assert_close(found[name] if isinstance(found, dict) else found, J, rtol=1e-3, atol=near)

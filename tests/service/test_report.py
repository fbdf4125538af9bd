"""The page of a run: what it says, what it shows for each kind of result, and what it must never do."""

from __future__ import annotations

import base64
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from jacray.report import blocks, figures, images, overall, page, samples
from jacray.report.material import gather, singular_values
from jacray.report.texts import describe, duration, number
from jacray.report.views import views
from jacray.result import Result
from jacray_workers.engine import assemble, combine, prepare, run_shard
from jacray_workers.plan import ArrayPlan, Plan
from jacray_workers.request import make_request
from PIL import Image
from torch import Tensor, nn

VOID = {"meta", "img", "br", "link", "path", "use", "rect", "image"}
HOSTILE = "<script>alert(1)</script>\"'&$x_{1}$"


@dataclass
class Element:
    """An element of a parsed page."""

    tag: str
    attrs: dict[str, str | None]
    text: str = ""
    inside: tuple[str, ...] = ()


@dataclass
class Page(HTMLParser):
    """A page as a list of elements in document order; fails on tags that do not match."""

    html: str
    elements: list[Element] = field(default_factory=list)
    open: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.feed(self.html)
        assert not self.open, f"never closed: {[e.tag for e in self.open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs), inside=tuple(e.tag for e in self.open))
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, dict(attrs), inside=tuple(e.tag for e in self.open)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data

    def all(self, tag: str) -> list[Element]:
        return [element for element in self.elements if element.tag == tag]

    def alts(self) -> list[str]:
        found = [e.attrs["alt"] for e in self.all("img")] + [e.attrs["aria-label"] for e in self.charts()]
        return [alt or "" for alt in found]

    def charts(self) -> list[Element]:
        return [e for e in self.all("svg") if "aria-label" in e.attrs]

    def table(self, caption: str) -> list[list[str]]:
        """The rows of the table with this caption, header first."""
        text = next(e.text for e in self.all("table") if caption in e.text)
        assert text
        at = next(i for i, e in enumerate(self.elements) if e.tag == "table" and caption in e.text)
        rows: list[list[str]] = []
        for element in self.elements[at + 1 :]:
            if element.tag == "table":
                break
            if element.tag == "tr":
                rows.append([])
            elif element.tag in ("td", "th"):
                rows[-1].append(element.text)
        return rows

    def terms(self) -> dict[str, str]:
        """All definition lists as one."""
        found: dict[str, str] = {}
        names = [e for e in self.elements if e.tag in ("dt", "dd")]
        for name, value in zip(names[::2], names[1::2], strict=True):
            assert (name.tag, value.tag) == ("dt", "dd")
            found[name.text] = value.text
        return found


def computed(model: Any, x: Any, receipt: dict[str, Any] | None = None, **request: Any) -> Result:
    """A real result, computed in this process."""
    prepared = prepare(model, x, make_request(**request), workers=2)
    parts = combine(prepared.plan, [run_shard(prepared, shard) for shard in prepared.plan.shards()])
    return Result(assemble(prepared, parts), prepared.plan, receipt or {})


def written(folder: Path, result: Any, **options: Any) -> Page:
    beside = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    text = page(result, beside=beside, **options)
    assert len(text.encode()) < 3e6
    made = Page(text)
    well_made(made)
    return made


def well_made(page: Page) -> None:
    """What holds for every page."""
    text = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=\s]*", "", page.html)
    assert not re.findall(r"//|@import|url\((?!#)", text), "an address outside"
    assert not page.all("script")
    assert not page.all("link")
    assert not [a for e in page.elements for a in e.attrs if a.startswith("on")]
    for element in page.elements:
        for name in ("src", "href"):
            target = element.attrs.get(name) or "#"
            assert target.startswith(("#", "data:image/png;base64,")) or target in (
                "spec.yaml", "receipt.json", "results.zarr",
            )  # fmt: skip
    ids = [e.attrs["id"] for e in page.elements if "id" in e.attrs]
    assert len(ids) == len(set(ids))
    referred = re.findall(r'(?:url\(#|href="#|labelledby=")([\w.-]+)', page.html)
    assert set(referred) <= set(ids)
    assert all(page.alts())
    assert len(page.all("h1")) == 1
    levels = [int(e.tag[1]) for e in page.elements if re.fullmatch(r"h[1-6]", e.tag)]
    assert all(b <= a + 1 for a, b in pairwise(levels)), "a heading level is skipped"
    for element in page.all("th"):
        assert element.attrs.get("scope") in ("col", "row")
    for chart in page.charts():
        assert "figure" in chart.inside
    captions = [e.text.strip() for e in page.all("figcaption")]
    assert all(captions)
    assert len(captions) >= len(page.charts())


def pixels(uri: str) -> np.ndarray:
    image = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))
    return np.asarray(image.convert("RGBA"))


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A small untrained classifier of images, 40 images with pixels from 0 to 1, and classes 0 to 9."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    return model, torch.rand(40, 1, 8, 8), torch.arange(40) % 10


@pytest.fixture(scope="module")
def digits_result(digits: tuple[nn.Module, Tensor, Tensor]) -> Result:
    model, x, target = digits
    checks = [
        {"sample": s, "what": "u.Jv against a difference", "error": e, "tolerance": 1e-3, "passed": True, "note": ""}
        for s, e in ((0, 1e-7), (39, 2.5e-6))
    ]
    receipt = {
        "spec": {
            "model": {"kind": "layers", "layers": [{"kind": "Linear", "in_features": 64, "out_features": 16}]},
            "inputs": {"kind": "digits"},
            "request": {"wrt": "inputs", "returns": ["jacobian", "weighted_gradient"]},
        },
        "seconds": {"plan": 0.25, "compute": 2.0},
        "samples_per_second": 20.0,
        "verified": {"checks": 2, "passed": True, "worst_error": 2.5e-6, "details": checks},
        "nonfinite": [],
        "versions": {"torch": "9.8.7"},
        "executor": {"name": "ray", "workers": 2},
    }
    k = nn.functional.one_hot(target, 10).float()
    returns = ["outputs", "jacobian", "weighted_gradient", "singular_values"]
    return computed(model, x, receipt, returns=returns, weights=k, method="reverse")


@pytest.fixture(scope="module")
def digits_page(
    digits: tuple[nn.Module, Tensor, Tensor], digits_result: Result, tmp_path_factory: pytest.TempPathFactory
) -> Page:
    _, x, target = digits
    folder = tmp_path_factory.mktemp("digits")
    (folder / "receipt.json").write_text("{}")
    return written(folder, digits_result, inputs=x, fields={"target": target}, title="The digits")


# What the page says ----------------------------------------------------------------------------------------------


def test_says_what_was_computed(digits_page: Page) -> None:
    terms = digits_page.terms()
    assert digits_page.all("h1")[0].text == "The digits"
    assert digits_page.all("title")[0].text == "The digits"
    assert "Linear (in_features 64, out_features 16)" in terms["Model"]
    assert terms["Inputs"] == "digits, shape (40, 1, 8, 8)"
    assert terms["Samples"] == "40, each with 10 output numbers"
    assert terms["Results"] == "jacobian, weighted gradient"
    rows = digits_page.table("as they are stored")
    assert rows[0] == ["Result", "Shape", "Dimensions", "Type", "Size"]
    assert [
        "jacobian",
        "(40, 10, 1, 8, 8)",
        "sample, output_0, input_0, input_1, input_2",
        "float32",
        "100.0 KiB",
    ] in rows


def test_says_how_and_why(digits_page: Page, digits_result: Result) -> None:
    plan = digits_result.plan
    assert digits_page.terms()["Method"] == f"{plan.method}: {plan.reason}"
    rows = digits_page.table("Methods considered")
    assert {row[0].removesuffix(" (chosen)") for row in rows[1:]} == {c.method for c in plan.candidates}
    assert "reverse (chosen)" in {row[0] for row in rows}


def test_refusals_are_told(tmp_path: Path, digits_result: Result) -> None:
    import dataclasses

    refused = dataclasses.replace(digits_result.plan.candidates[0], method="layerwise", refused="a layer is unknown")
    plan = dataclasses.replace(digits_result.plan, candidates=(*digits_result.plan.candidates, refused))
    page = written(tmp_path, Result(dict(digits_result), plan, {}))
    assert ["layerwise", "not possible: a layer is unknown"] in page.table("Methods considered")


def test_says_time_rate_and_versions(digits_page: Page) -> None:
    terms = digits_page.terms()
    assert (terms["Plan"], terms["Compute"]) == ("250 ms", "2 s")
    assert "20 samples per second" in digits_page.html
    assert terms["torch"] == "9.8.7"
    assert terms["Executor"] == "name ray, workers 2"
    assert [e.attrs["href"] for e in digits_page.all("a") if e.text == "receipt.json"] == ["receipt.json"]
    assert not [e for e in digits_page.all("a") if e.text == "spec.yaml"], "a link to what is not there"


def test_says_what_was_checked(digits_page: Page) -> None:
    rows = digits_page.table("Independent checks")
    assert rows[1] == ["u.Jv against a difference", "2 samples", "2.5e\N{MINUS SIGN}6", "0.001", "✓ passed"]
    assert "All 2 checks on 2 samples passed" in digits_page.html
    assert "None in any result." in digits_page.html


def test_a_failed_check_is_not_hidden(tmp_path: Path, digits_result: Result) -> None:
    bad = {"sample": 3, "what": "w", "error": 0.5, "tolerance": 1e-3, "passed": False, "note": "look here"}
    page = written(tmp_path, Result(dict(digits_result), digits_result.plan, {"verified": {"details": [bad]}}))
    assert "1 of 1 check on 1 sample failed." in page.html
    assert page.table("Independent checks")[1][-2:] == ["✗ 1 failed", "look here"]


def test_nonfinite_numbers_are_counted(tmp_path: Path, digits_result: Result) -> None:
    found = [{"key": "jacobian", "count": 1234, "first": 7}]
    page = written(tmp_path, Result(dict(digits_result), digits_result.plan, {"nonfinite": found}))
    assert page.table("not finite")[1] == ["jacobian", "1,234", "sample 7"]


def test_an_empty_receipt_gives_a_page(tmp_path: Path, digits_result: Result) -> None:
    page = written(tmp_path / "new" / "folder", Result(dict(digits_result), digits_result.plan, {}))
    assert "No independent check ran." in page.html
    assert "They were not counted." in page.html


# Pictures by kind of input ---------------------------------------------------------------------------------------


def test_images_show_input_rows_gradient_and_spectrum(digits_page: Page) -> None:
    alts = digits_page.alts()
    for row in range(10):
        assert any(alt.startswith(f"Derivative of logit {row} by each pixel of sample 0:") for alt in alts)
    assert "The image of sample 0" in alts
    assert any(alt.startswith("Weighted gradient of sample 0:") for alt in alts)
    assert any(alt.startswith("Singular values of sample 0,") for alt in alts)
    assert any(alt.startswith("Median singular value") for alt in alts)
    assert any(alt.startswith("Histogram of Jacobian norms") for alt in alts)
    assert sum(alt.startswith("Mean |J| of logit") for alt in alts) == 10
    assert sum(alt.startswith("Mean weighted gradient of class") for alt in alts) == 10


def test_one_sample_of_each_class_and_the_hardest(digits_page: Page) -> None:
    cards = [e.text for e in digits_page.all("article")]
    assert 10 <= len(cards) <= 12
    for label in range(10):
        assert any(f"The first sample of class {label}." in card for card in cards)
    assert any("Among the hardest" in card for card in cards)


def test_the_true_class_is_marked(digits_page: Page, digits_result: Result) -> None:
    first = next(e.text for e in digits_page.all("article") if "Sample 0:" in e.text)
    largest = int(digits_result.outputs[0].argmax())
    assert "true class" in first
    assert ("recognised" if largest == 0 else f"taken for {largest}") in first


def test_tiles_hold_the_numbers() -> None:
    values = np.array([[-2.0, 0.0], [1.0, np.nan]])
    shown = pixels(figures.tile(values, 2.0, "diverging")).astype(int)
    assert shown.shape == (2, 2, 4)
    blue, white, red, hole = shown[0, 0], shown[0, 1], shown[1, 0], shown[1, 1]
    assert blue[2] > blue[0] + 50
    assert red[0] > red[2] + 50
    assert min(white[:3]) > 240
    assert hole[3] == 0


def test_the_hardest_are_found(digits: tuple[nn.Module, Tensor, Tensor], digits_result: Result) -> None:
    _, x, target = digits
    material = gather(digits_result, x, {"target": target})
    logits = digits_result.outputs.clone()
    true = logits[torch.arange(40), target]
    logits[torch.arange(40), target] = -torch.inf
    margin = true - logits.max(dim=1).values
    hardest = [c.sample for c in samples.choose(material, material.jacobians[0]) if "hardest" in c.why]
    assert set(hardest) <= set(margin.argsort()[:2].tolist())


def test_images_without_labels_are_spread(tmp_path: Path, digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, _ = digits
    page = written(tmp_path, computed(model, x), inputs=x)
    titles = [e.text for e in page.all("h3") if e.text.startswith("Sample ")]
    assert titles == ["Sample 0", "Sample 8", "Sample 16", "Sample 23", "Sample 31", "Sample 39"]
    assert "logit" not in page.html
    assert any(alt.startswith("Derivative of output 9 by each pixel") for alt in page.alts())


def test_colour_images_of_many_classes_stay_bounded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 2, 9, stride=8), nn.Flatten(), nn.Linear(2 * 6 * 7, 20))
    x, target = torch.rand(12, 3, 52, 60), torch.arange(12)
    result = computed(model, x, returns=["jacobian", "outputs", "weighted_gradient"], weights=torch.randn(12, 20))
    page = written(tmp_path, result, inputs=x, fields={"target": target})
    card = next(e for e in page.all("article") if "Sample 0:" in e.text)
    assert "10 of 20 logits" in card.text
    sides = [pixels(str(e.attrs["src"])).shape[:2] for e in page.all("img") if "Derivative" in str(e.attrs["alt"])]
    assert set(sides) == {(26, 30)}
    assert "mean of 2 x 2" in page.html


@pytest.mark.parametrize("shape", [(6, 9), (1, 6, 9), (3, 6, 9)])
def test_any_layout_of_an_image(tmp_path: Path, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), 2))
    x = torch.rand(6, *shape)
    page = written(tmp_path, computed(model, x), inputs=x)
    assert sum(alt.startswith("The image of sample") for alt in page.alts()) == 6


def test_vectors_show_matrix_bars_and_spectrum(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(20, 5)
    returns = ["jacobian", "weighted_gradient", "outputs"]
    page = written(tmp_path, computed(model, x, returns=returns, weights=torch.ones(3)), inputs=x)
    alts = page.alts()
    assert sum(alt.startswith("Jacobian of sample") for alt in alts) == 4
    assert sum(alt.startswith("Weighted gradient of sample") for alt in alts) == 4
    assert sum(alt.startswith("Singular values of sample") for alt in alts) == 4
    assert any(alt.startswith("Heat map of mean |J|") for alt in alts)
    assert "Outputs: " in page.html


def test_a_single_sample_and_a_scalar_output(tmp_path: Path) -> None:
    result = computed(lambda a: (3 * (a + 3)).mean(), torch.tensor([[2.0, 3.0]]))
    page = written(tmp_path, result)
    assert [alt for alt in page.alts() if alt] == ["Jacobian of sample 0, magnitudes up to 1.5"]
    assert "Over all samples" not in page.html


def test_parameters_show_norms_by_block(tmp_path: Path, digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, _ = digits
    returns = ["jacobian", "weighted_gradient"]
    result = computed(model, x, wrt="params", returns=returns, weights=torch.ones(10))
    page = written(tmp_path, result, inputs=x)
    titles = [e.text for e in page.all("h3")]
    assert "Jacobian by parameter block" in titles
    assert "Parameter block by output" in titles
    assert "Weighted gradient by parameter block" in titles
    text = "".join(e.text for e in page.charts())
    assert all(name in text for name in ("1.weight", "1.bias", "3.weight", "3.bias"))
    norms = {name: float(j.flatten(1).norm(dim=1).median()) for name, j in result.jacobian.items()}
    assert f"Largest: {max(norms, key=lambda name: norms[name])}, " in page.html
    assert not page.all("article")


def test_inputs_and_parameters_together(tmp_path: Path, digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, target = digits
    page = written(tmp_path, computed(model, x, wrt=["inputs", "params"]), inputs=x, fields={"target": target})
    headings = [e.text for e in page.all("h2")]
    assert headings[3:6] == ["Over all samples", "Single samples", "Parameter blocks"]
    assert any(alt.startswith("Derivative of logit 0") for alt in page.alts())


def test_many_parameter_blocks_are_bounded(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(32)))
    page = written(tmp_path, computed(model, torch.randn(6, 2), wrt="params"))
    assert "40 blocks of smaller norm" in page.html
    assert "And 4 more arrays." in page.html


class TwoInTwoOut(nn.Module):
    """Two named inputs and two named outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(3, 4)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.a(left) + self.b(right))
        return {"total": h.sum(-1), "parts": h}


def test_pytrees_are_named(tmp_path: Path) -> None:
    x = {"left": torch.randn(9, 5), "right": torch.randn(9, 3)}
    result = computed(TwoInTwoOut(), x, returns=["jacobian", "outputs"])
    page = written(tmp_path, result, inputs=x)
    headings = [e.text for e in page.all("h2")]
    for name in ("total.inputs.left", "total.inputs.right", "parts.inputs.left", "parts.inputs.right"):
        assert f"Single samples: {name}" in headings
    assert page.terms()["Inputs"] == "left (9, 5), right (9, 3)"


def test_without_jacobian_the_spectrum_remains(tmp_path: Path, digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, _ = digits
    page = written(tmp_path, computed(model, x, returns=["singular_values", "norms"]))
    titles = [e.text for e in page.all("h3")]
    assert {"Spectrum of the Jacobian", "Norms"} <= set(titles)
    assert len(page.charts()) == 2


def test_nothing_to_draw_is_fine(tmp_path: Path, digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, _ = digits
    page = written(tmp_path, computed(model, x, returns=["outputs"]))
    assert not page.charts()
    assert "What was computed" in page.html


# Traps -----------------------------------------------------------------------------------------------------------


def test_hostile_names_are_text(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.register_parameter("<b onload=x>$_{\\", nn.Parameter(torch.ones(2)))
            self.register_parameter("名前", nn.Parameter(torch.ones(2)))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x) * getattr(self, "<b onload=x>$_{\\") + self.名前
            return y

    receipt = {
        "spec": {"model": HOSTILE, "inputs": {HOSTILE: HOSTILE}, "request": {"wrt": HOSTILE}},
        "versions": {HOSTILE: HOSTILE},
        "verified": {"details": [{"sample": 0, "what": HOSTILE, "error": "inf", "passed": False, "note": HOSTILE}]},
        "nonfinite": [{"key": HOSTILE, "count": 1, "first": 0}],
        "seconds": {HOSTILE: 1.0},
    }
    page = written(tmp_path, computed(Model(), torch.randn(6, 3), receipt, wrt="params"), title=HOSTILE)
    assert page.all("h1")[0].text == HOSTILE
    assert page.terms()["Model"] == HOSTILE
    assert not page.all("b")
    assert "名前" in "".join(e.text for e in page.charts())
    assert "<b onload=x>$_{\\" in "".join(e.text for e in page.charts())


def test_nan_is_left_out_and_shown(tmp_path: Path) -> None:
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)).abs()
    x[0], x[7] = -1.0, -2.0
    result = computed(lambda a: torch.sqrt(a[:, :3]) * a[:, 1:], x)
    assert result.jacobian[0].isnan().any()
    page = written(tmp_path, result, inputs=x)
    assert "over 28 of 30 samples (2 left out for NaN or infinity)" in page.html
    assert "Grey: NaN or infinity." in page.html
    assert not any(alt.startswith("Singular values of sample 0,") for alt in page.alts())


def test_all_nan_and_all_zero(tmp_path: Path) -> None:
    x = torch.rand(8, 1, 5, 5)
    for factor in (torch.nan, 0.0):
        page = written(tmp_path, computed(lambda a, f=factor: f * a.flatten(1)[:, :3], x), inputs=x)
        assert page.all("article")


def test_several_weights_show_the_first(tmp_path: Path, digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, target = digits
    k = torch.randn(3, 40, 10)
    result = computed(model, x, returns=["jacobian", "weighted_gradient"], weights=k)
    material = gather(result, x, {"target": target})
    gradient = material.gradient_of(material.jacobians[0])
    assert gradient is not None
    assert np.array_equal(gradient.read(np.array([5]))[0, 0], result.weighted_gradient[0, 5].flatten().numpy())
    written(tmp_path, result, inputs=x, fields={"target": target})


def test_half_precision_is_drawn(tmp_path: Path, digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, _ = digits
    page = written(tmp_path, computed(model, x, dtype="bfloat16"), inputs=x)
    assert page.all("article")


# Bounds ----------------------------------------------------------------------------------------------------------


class Recorder:
    """An array that is never there as a whole: it makes each slice when asked, and counts what it gave out."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape, self.ndim, self.given, self.most = shape, len(shape), 0, 0

    def __getitem__(self, index: Any) -> np.ndarray:
        one = np.ones(self.shape[1:], dtype=np.float32)
        part = one if isinstance(index, int) else np.broadcast_to(one, (len(index), *self.shape[1:]))
        self.given += part.size
        self.most = max(self.most, part.size)
        return part


def vast(shape: tuple[int, ...], dims: tuple[str, ...], rows: int) -> tuple[Recorder, Plan]:
    array = ArrayPlan("jacobian", "jacobian", 0, 0, shape, "float32", dims, 0)
    plan = Plan(
        method="reverse", reason="because", candidates=(), samples=shape[0], rows=rows, chunk_size=1, row_chunk=1,
        shard_size=1, arrays=(array,), bytes_out=0, peak_bytes=0, budget_bytes=0, device="cpu", dtype="float32",
        form="dense", seed=0,
    )  # fmt: skip
    return Recorder(shape), plan


def test_a_vast_result_is_read_in_small_slices(tmp_path: Path) -> None:
    value, plan = vast((10**9, 10, 1, 28, 28), ("sample", "output_0", "input_0", "input_1", "input_2"), 10)
    page = written(tmp_path, Result({"jacobian": value}, plan, {}))
    assert page.all("article")
    assert value.most <= 1 << 22
    assert value.given <= 1 << 26


def test_a_vast_sample_is_not_read_for_statistics() -> None:
    value, plan = vast((100, 1000, 300, 300), ("sample", "output_0", "input_0", "input_1"), 1000)
    view = views(Result({"jacobian": value}, plan, {}), "jacobian")[0]
    assert overall.statistics(view, 10, 10) is None
    assert value.given == 0


@pytest.mark.parametrize(
    ("dims", "shape", "rows", "columns", "side"),
    [
        (("sample", "output_0", "input_0"), (4, 3, 5), 3, 5, "input"),
        (("sample", "input_0"), (4, 5), 1, 5, "input"),
        (("sample", "output_0", "output_1", "input_0", "input_1"), (4, 3, 2, 5, 6), 6, 30, "input"),
    ],
)
def test_rows_and_columns_are_told_apart(
    dims: tuple[str, ...], shape: tuple[int, ...], rows: int, columns: int, side: str
) -> None:
    value, plan = vast(shape, dims, rows)
    view = views(Result({"jacobian": value}, plan, {}), "jacobian")[0]
    assert (view.samples, view.rows, view.columns, view.side) == (4, rows, columns, side)


def test_a_parameter_called_output(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.output = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.output).sum(-1)

    result = computed(Model(), torch.randn(6, 3), wrt="params")
    view = views(result, "jacobian")[0]
    assert (view.rows, view.columns, view.side) == (1, 3, "param")
    assert written(tmp_path, result).charts()


# Parts -----------------------------------------------------------------------------------------------------------


def test_statistics_agree_with_torch(digits_result: Result) -> None:
    view = views(digits_result, "jacobian")[0]
    found = overall.statistics(view, 10, 64)
    assert found is not None
    j = digits_result.jacobian.flatten(2).double()
    np.testing.assert_allclose(found.norms, j.flatten(1).norm(dim=1).numpy(), rtol=1e-6)
    np.testing.assert_allclose(found.mean_abs, j.abs().mean(0).numpy(), rtol=1e-6)
    np.testing.assert_allclose(found.row_norms, j.square().sum(2).mean(0).sqrt().numpy(), rtol=1e-6)


def test_singular_values_agree_with_torch(digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, _ = digits
    result = computed(model, x)
    material = gather(result, x, None)
    found = singular_values(material, material.jacobians[0], np.arange(40))
    np.testing.assert_allclose(found, torch.linalg.svdvals(result.jacobian.flatten(2).double()).numpy(), rtol=1e-6)


def test_gradient_norms_agree_with_torch(digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, _ = digits
    result = computed(model, x, wrt="params", returns="weighted_gradient", weights=torch.ones(10), reduction="none")
    for view in views(result, "weighted_gradient"):
        expected = result.weighted_gradient[view.leaf].flatten(1).norm(dim=1)
        np.testing.assert_allclose(blocks.gradient_norms(view, 1 << 20), expected.numpy(), rtol=1e-5)


def test_a_few_extremes_do_not_wash_out_the_scale() -> None:
    plane = np.linspace(-1, 1, 1000).reshape(20, 50)
    assert images.span([plane]) == images.Span(1.0, 1.0)
    plane[0, 0] = 100.0
    reach = images.span([plane, np.full((2, 2), np.nan)])
    assert reach.clipped
    assert reach.limit == pytest.approx(0.99, abs=0.02)
    assert images.diverging_scale(reach, "J").ticks[-1].startswith("≥ ")
    assert "100" in images.diverging_scale(reach, "J").label


def test_large_images_are_averaged() -> None:
    values = np.arange(100.0 * 60).reshape(100, 60)
    small = images.shrunk(values)
    assert small.shape == (34, 20)
    assert small[0, 0] == values[:3, :3].mean()
    assert small[-1, 0] == values[99:, :3].mean()


@pytest.mark.parametrize("draw", [
    lambda: figures.histogram(np.full(9, 2.0), ("x", "y"), "alt"),
    lambda: figures.histogram(np.zeros(9), ("x", "y"), "alt"),
    lambda: figures.profile(figures.Series(np.zeros(4)), ("x", "y"), "alt"),
    lambda: figures.profile(figures.Series(np.array([1.0, 1e-3, 0.0])), ("x", "y"), "alt"),
    lambda: figures.matrix(np.full((2, 3), np.nan), 1.0, "diverging", ("x", "y", "z"), "alt"),
    lambda: figures.named_matrix(np.zeros((2, 3)), ["a", "b"], ("x", "y"), "alt"),
    lambda: figures.bars(np.array([np.nan, 1.0]), ("x", "y"), "alt"),
])  # fmt: skip
def test_degenerate_charts_are_drawn(draw: Callable[[], str]) -> None:
    assert draw().startswith('<svg role="img" aria-label="alt"')


def test_charts_are_the_same_every_time_and_follow_the_theme() -> None:
    def draw() -> str:
        return figures.profile(figures.Series(np.array([3.0, 2.0, 1.0])), ("x", "y"), "alt")

    assert draw() == draw()
    colours = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", draw()))
    assert colours <= {"none", *(f"var(--{name})" for name in ("ink", "muted", "grid", "mark", "band"))}


def test_drawing_leaves_matplotlib_as_it_was() -> None:
    before = dict(mpl.rcParams)
    figures.bars(np.ones(3), ("x", "y"), "alt")
    assert dict(mpl.rcParams) == before


def test_drawing_loads_no_pyplot(tmp_path: Path) -> None:
    drawn = "figures.matrix(numpy.ones((2, 2)), 1.0, 'diverging', ('x', 'y', 'z'), 'alt')"
    code = (
        f"import sys, numpy; from jacray.report import figures; {drawn}; sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], check=False, env=env, cwd=tmp_path).returncode == 0


def test_only_one_file_loads_matplotlib() -> None:
    folder = Path(figures.__file__).parent
    loads = re.compile(r"^\s*(?:from|import) matplotlib", re.MULTILINE)
    found = [path.name for path in folder.glob("*.py") if loads.search(path.read_text(encoding="utf-8"))]
    assert found == ["figures.py"]


def test_the_template_lies_in_the_package() -> None:
    assert Path(figures.__file__).with_name("page.html.j2").is_file()


@pytest.mark.parametrize(("value", "text"), [
    (0.0, "0"), (3, "3"), (12345, "12,345"), (1234.5, "1,234"), (0.012345, "0.0123"), (-1.5, "\N{MINUS SIGN}1.5"),
    (2.5e-7, "2.5e\N{MINUS SIGN}7"), (1e9, "1e9"), (float("nan"), "NaN"), (float("inf"), "inf"), ("text", "text"),
])  # fmt: skip
def test_numbers_are_short(value: Any, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(2e-5, "20 µs"), (0.25, "250 ms"), (3.0, "3 s"), (150, "2 min 30 s"), (0, "0 s")]
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_settings_are_described_in_a_line() -> None:
    layers = [{"kind": "Flatten"}, {"kind": "Linear", "in_features": 2, "bias": None}]
    assert describe({"kind": "layers", "layers": layers}) == "layers (layers Flatten · Linear (in_features 2))"
    assert describe("x" * 1000, 10) == "xxxxxxxxx…"

"""Pictures of derivatives with respect to parameters: how much each block matters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from jacray.report import figures
from jacray.report.elements import Gallery, Picture
from jacray.report.figures import Series
from jacray.report.material import Material
from jacray.report.overall import FEWEST, SAMPLES, SIDE, Statistics, band, statistics
from jacray.report.texts import number, plural
from jacray.report.views import READ, Array, View

BLOCKS = 24  # in one chart; the smaller ones are left out and counted


def gallery(material: Material) -> Gallery:
    """Norms of the parameter blocks of Jacobian and weighted gradient."""
    jacobians = [view for view in material.jacobians if view.side == "param" and view.samples]
    pictures: list[Picture] = []
    for out in dict.fromkeys(view.out for view in jacobians):
        pictures += _of_output([view for view in jacobians if view.out == out], material)
    pictures += _of_gradients([view for view in material.gradients if view.side == "param"])
    return Gallery("Parameter blocks", "", tuple(pictures))


def _of_output(views: Sequence[View], material: Material) -> list[Picture]:
    """The charts of one output's blocks, largest blocks first where there are too many."""
    found = {view: statistics(view, 1, 1, READ // len(views)) for view in views}
    known = {view: s for view, s in found.items() if s is not None and len(s.finite)}
    shown = _largest({view: float(np.median(s.finite)) for view, s in known.items()})
    if not shown:
        return []
    note = _left_out(len(views) - len(shown))
    return [_norms(shown, known, note), *_by_row(shown, known, note, material.output_word(shown[0]))]


def _largest(sizes: Mapping[View, float]) -> list[View]:
    """The blocks to show, in the model's order."""
    kept = set(sorted(sizes, key=lambda view: -sizes[view])[:BLOCKS])
    return [view for view in sizes if view in kept]


def _left_out(count: int) -> str:
    return f" {plural(count, 'block')} of smaller norm, or too large to read here, left out." if count else ""


def _norms(views: Sequence[View], known: Mapping[View, Statistics], note: str) -> Picture:
    many = all(len(known[view].finite) >= FEWEST for view in views)
    series = _stacked([band(known[view].finite) for view in views], many)
    top = views[int(np.argmax(series.middle))]
    over = _over([len(known[view].finite) for view in views], views[0].samples)
    spread = ", with the range of the middle 80 % of them" if many else ""
    caption = (
        f"Frobenius norm of each parameter block of the Jacobian, in outputs per unit of parameter: the median over"
        f" {over}{spread}. Largest: {_name(top)}, {number(float(series.middle.max()))}.{note}"
    )
    alt = f"Bars of the Jacobian's norm by parameter block; the largest is {_name(top)}"
    svg = figures.named_bars(series, [_name(view) for view in views], "Frobenius norm of the block of J", alt)
    return Picture("Jacobian by parameter block", svg, caption)


def _over(counts: Sequence[int], samples: int) -> str:
    least, most = min(counts), max(counts)
    if least == samples:
        return plural(samples, "sample")
    return f"{f'{most:,}' if least == most else f'{least:,} to {most:,}'} of {plural(samples, 'sample')}"


def _stacked(parts: Sequence[Series], spread: bool) -> Series:
    middle = np.array([part.middle for part in parts])
    if not spread:
        return Series(middle)
    return Series(middle, np.array([part.low for part in parts]), np.array([part.high for part in parts]))


def _by_row(views: Sequence[View], known: Mapping[View, Statistics], note: str, word: str) -> list[Picture]:
    """Which output depends on which block."""
    rows = views[0].rows
    if not 1 < rows <= SIDE or len(views) < 2:
        return []
    values = np.array([known[view].row_norms for view in views])
    block, row = np.unravel_index(int(np.argmax(values)), values.shape)
    caption = (
        f"The same for each {word}: root mean square over samples of the norm of its row of the block. Brightest:"
        f" {word} {row} by {_name(views[int(block)])}, {number(float(values.max()))}.{note}"
    )
    alt = f"Heat map of norms, parameter blocks down and {word}s across; the largest is {number(float(values.max()))}"
    svg = figures.named_matrix(values, [_name(view) for view in views], (word, "norm"), alt)
    return [Picture(f"Parameter block by {word}", svg, caption)]


def _of_gradients(views: Sequence[View]) -> list[Picture]:
    norms = {view: found for view in views if (found := gradient_norms(view, READ // len(views))) is not None}
    shown = _largest({view: float(np.median(found)) for view, found in norms.items()})
    if not shown:
        return []
    summed = not shown[0].samples
    many = not summed and all(len(norms[view]) >= FEWEST for view in shown)
    series = _stacked([band(norms[view]) for view in shown], many)
    how = "summed over the batch" if summed else "the median over samples" + (", with the middle 80 %" if many else "")
    caption = f"Norm of the weighted gradient by parameter block, {how}.{_left_out(len(views) - len(shown))}"
    top = _name(shown[int(np.argmax(series.middle))])
    alt = f"Bars of the weighted gradient's norm by parameter block; the largest is {top}"
    svg = figures.named_bars(series, [_name(view) for view in shown], "norm of the weighted gradient", alt)
    return [Picture("Weighted gradient by parameter block", svg, caption)]


def gradient_norms(view: View, numbers: int) -> Array | None:
    """The norm of a block for each of a bounded number of samples; None where none can be read or is finite."""
    if not view.samples:
        values = view.read(np.arange(1)) if view.size <= numbers else np.full((1, 1, 1), np.nan)
        found = np.linalg.norm(values.reshape(1, -1), axis=1)
    else:
        samples = view.spread(SAMPLES, numbers)
        parts = [np.linalg.norm(part.reshape(len(part), -1), axis=1) for _, part in view.chunks(samples)]
        found = np.concatenate([np.zeros(0), *parts])
    finite = found[np.isfinite(found)]
    return finite if len(finite) else None


def _name(view: View) -> str:
    return view.leaf or view.name

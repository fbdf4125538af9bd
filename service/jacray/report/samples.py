"""Pictures of single samples, and the choice of which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jacray.report import figures, images
from jacray.report.elements import Card, Gallery, Picture, Strip, Tile
from jacray.report.figures import Series
from jacray.report.material import Material, is_image, place_word, singular_values, unit
from jacray.report.overall import ROWS, SIDE, SPECTRUM_MEANING, classes, cropped, zeros
from jacray.report.texts import number
from jacray.report.views import READ, Array, View, spread, to_numpy

LABELLED = 10  # one sample of each class, up to this many classes
HARDEST = 2  # further samples, where labels and outputs tell which the model found hardest
IMAGES = 6  # samples of images without labels
VECTORS = 4  # samples of anything else ...
SEVERAL = 2  # ... and of each where there are several Jacobians


@dataclass(frozen=True)
class Choice:
    """A sample to show, and why."""

    sample: int
    why: str


def choose(material: Material, view: View) -> list[Choice]:
    """The samples to show: one of each class and the hardest, or without labels evenly from first to last."""
    target = material.target
    if target is None or not is_image(view):
        most = IMAGES if is_image(view) else VECTORS if len(material.jacobians) == 1 else SEVERAL
        return [Choice(int(i), "") for i in spread(view.samples, most)]
    found = [
        Choice(int(np.argmax(target == label)), f"The first sample of class {label}.")
        for label in classes(target, LABELLED)
    ]
    shown = {choice.sample for choice in found}
    return found + [choice for choice in _hardest(material, view) if choice.sample not in shown]


def _hardest(material: Material, view: View) -> list[Choice]:
    """Where the output of the true class leads the best other by least, or trails it by most."""
    outputs, target = material.outputs_of(view), material.target
    if outputs is None or target is None or material.output_word(view) != "logit":
        return []
    samples = outputs.spread(view.samples)
    values = outputs.read(samples).reshape(len(samples), -1).astype(np.float64)
    rows = np.arange(len(samples))
    true = values[rows, target[samples]]
    values[rows, target[samples]] = -np.inf
    margin = true - values.max(axis=1)
    order = np.argsort(np.where(np.isfinite(margin), margin, np.inf), kind="stable")[:HARDEST]
    return [Choice(int(samples[i]), _hard(float(margin[i]))) for i in order]


def _hard(margin: float) -> str:
    how = "trails the largest other by" if margin < 0 else "leads the largest other by only"
    return f"Among the hardest: the logit of its class {how} {number(abs(margin))}."


def gallery(material: Material, view: View, context: Series | None) -> Gallery:
    """Cards of the samples chosen for one Jacobian by inputs."""
    chosen = choose(material, view)
    draw = _image_card if is_image(view) else _vector_card
    cards = tuple(draw(material, view, choice, context) for choice in chosen)
    return Gallery("Single samples", _intro(material, view), cards=cards)


def _intro(material: Material, view: View) -> str:
    word, place = material.output_word(view), place_word(view)
    if not is_image(view):
        some = ", at a few samples from first to last" if view.samples > SEVERAL else ""
        return f"How each {word} changes with each input, in {word}s per unit of input{some}."
    valued = f" The number behind a {word} is its value." if material.outputs_of(view) else ""
    return (
        f"Each tile is one row of a sample's Jacobian: how the {word} named below it changes when a {place} is raised."
        f" Red raises it, blue lowers it, white does nothing. Each sample has one scale, symmetric about 0."
        f"{valued}{images.notes(view.shape)}"
    )


def _image_card(material: Material, view: View, choice: Choice, context: Series | None) -> Card:
    word = material.output_word(view)
    values = _outputs_at(material, view, choice.sample)
    rows = top_rows(values, view.rows)
    planes = [images.plane(row, view.shape) for row in read_rows(view, choice.sample, rows)]
    reach = images.span(planes)
    label = None if material.target is None else int(material.target[choice.sample])
    largest = None if values is None or len(values) < 2 else int(np.nanargmax(np.nan_to_num(values, nan=-np.inf)))
    tiles = tuple(
        images.row_tile(
            plane, reach.limit, f"Derivative of {word} {k} by each {place_word(view)} of sample {choice.sample}:",
            _row_label(word, k, view), "" if values is None else number(float(values[k])), _mark(k, label, largest),
        )
        for k, plane in zip(rows, planes, strict=True)
    )  # fmt: skip
    strip = Strip(
        "", tiles, images.diverging_scale(reach, f"{word} per unit of {unit(view)}"), _more_rows(rows, view, word)
    )
    lead = (*_input(material, view, choice.sample), *_gradient(material, view, choice.sample, reach))
    pictures = _spectrum(material, view, choice.sample, context)
    return Card(_title(choice, label, largest, word), choice.why, lead, strip, tuple(pictures))


def _title(choice: Choice, label: int | None, largest: int | None, word: str) -> str:
    parts = [] if label is None else [f"class {label}"]
    if largest is not None and word == "logit":
        parts.append("recognised" if largest == label else f"taken for {largest}")
    return f"Sample {choice.sample:,}" + (f": {', '.join(parts)}" if parts else "")


def _row_label(word: str, row: int, view: View) -> str:
    return word if view.rows == 1 else f"{word} {row}"


def _mark(row: int, label: int | None, largest: int | None) -> str:
    words = [word for word, k in (("true class", label), ("largest", largest)) if k == row]
    return ", ".join(words)


def _more_rows(rows: list[int], view: View, word: str) -> str:
    if len(rows) == view.rows:
        return ""
    return f"{len(rows)} of {view.rows:,} {word}s: the largest where outputs are known, else the first."


def top_rows(values: Array | None, rows: int) -> list[int]:
    """Which rows to draw: all, or the largest outputs in order of their index."""
    if rows <= ROWS or values is None:
        return list(range(min(rows, ROWS)))
    return sorted(int(i) for i in np.argsort(-np.nan_to_num(values), kind="stable")[:ROWS])


def read_rows(view: View, sample: int, rows: list[int]) -> Array:
    """Some rows of one sample as `(len(rows), columns)`, without reading the others."""
    return to_numpy(view.value[sample].reshape(view.rows, -1)[rows])


def _outputs_at(material: Material, view: View, sample: int) -> Array | None:
    outputs = material.outputs_of(view)
    if outputs is None or outputs.size > READ:
        return None
    return outputs.read(np.array([sample])).ravel().astype(np.float64)


def _input(material: Material, view: View, sample: int) -> list[Tile]:
    inputs: Any = material.input_of(view)
    if inputs is None:
        return []
    values = to_numpy(inputs[sample]).ravel()
    return [images.input_tile(values, view.shape, f"The image of sample {sample}", "input")]


def _gradient(material: Material, view: View, sample: int, reach: images.Span) -> list[Tile]:
    """The weighted gradient on the rows' scale where it fits there, else on its own, which is then said."""
    gradient = material.gradient_of(view)
    if gradient is None or gradient.size > READ:
        return []
    values = images.plane(gradient.read(np.array([sample]))[0, 0], view.shape)
    own = images.limit_of(values)
    shared = 0.1 * reach.limit <= own <= reach.largest * 1.0001
    alt = f"Weighted gradient of sample {sample}:"
    note = "" if shared else f"own scale, ±{number(own)}"
    return [images.row_tile(values, reach.limit if shared else own, alt, "weighted gradient", note)]


def _spectrum(material: Material, view: View, sample: int, context: Series | None) -> list[Picture]:
    found = singular_values(material, view, np.array([sample]))
    if found is None or found.shape[1] < 2 or not np.isfinite(found).all():
        return []
    values = found[0]
    first, last = number(float(values[0])), number(float(values[-1]))
    behind = " Behind: the median over all samples (dashed) and the middle 80 % of them (band)." if context else ""
    caption = f"Singular values of this sample's Jacobian, from {first} to {last}.{zeros(values)}{behind}"
    alt = f"Singular values of sample {sample}, falling from {first} to {last}"
    svg = figures.profile(Series(values), ("index of the singular value", "singular value"), alt, context)
    return [Picture("Spectrum", svg, caption if context else f"{caption} {SPECTRUM_MEANING}")]


def _vector_card(material: Material, view: View, choice: Choice, context: Series | None) -> Card:
    word = material.output_word(view)
    pictures = [_matrix(view, choice.sample, word), *_gradient_bars(material, view, choice.sample)]
    pictures += _spectrum(material, view, choice.sample, context)
    return Card(
        f"Sample {choice.sample:,}", _outputs_text(material, view, choice.sample, word), pictures=tuple(pictures)
    )


def _outputs_text(material: Material, view: View, sample: int, word: str) -> str:
    values = _outputs_at(material, view, sample)
    if values is None or len(values) > ROWS:
        return ""
    return f"{word.capitalize()}{'' if len(values) == 1 else 's'}: {', '.join(number(float(v)) for v in values)}."


def _matrix(view: View, sample: int, word: str) -> Picture:
    values = read_rows(view, sample, list(range(min(view.rows, SIDE))))[:, :SIDE].astype(np.float64)
    limit = images.limit_of(values)
    alt = f"Jacobian of sample {sample}, magnitudes up to {number(limit)}"
    holes = " Grey: NaN or infinity." if not np.isfinite(values).all() else ""
    caption = f"Red raises the {word}, blue lowers it; the scale is symmetric about 0.{cropped(view, word)}{holes}"
    if min(values.shape) == 1:
        labels = ("input" if values.shape[0] == 1 else word, "derivative")
        return Picture(
            "Jacobian",
            figures.bars(values.ravel(), labels, alt),
            f"J by {labels[0]}, in {word}s per unit of input.{cropped(view, word)}",
        )
    return Picture("Jacobian", figures.matrix(values, limit, "diverging", ("input", word, "J"), alt), caption)


def _gradient_bars(material: Material, view: View, sample: int) -> list[Picture]:
    gradient = material.gradient_of(view)
    if gradient is None or gradient.size > READ:
        return []
    values = gradient.read(np.array([sample]))[0, 0].astype(np.float64)
    alt = f"Weighted gradient of sample {sample} by input, magnitudes up to {number(images.limit_of(values[:SIDE]))}"
    some = f" The first {SIDE} of {len(values):,} inputs." if len(values) > SIDE else ""
    caption = f"Change of the weighted output per unit of each input.{some}"
    return [Picture("Weighted gradient", figures.bars(values[:SIDE], ("input", "weighted gradient"), alt), caption)]

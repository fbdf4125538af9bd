"""Pictures over all samples: spectra, norms, and where the outputs are sensitive."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jacray.report import figures, images
from jacray.report.elements import Gallery, Picture, Strip
from jacray.report.figures import Series
from jacray.report.material import Material, is_image, place_word, singular_values, unit
from jacray.report.texts import number, plural
from jacray.report.views import READ, Array, View, spread

FEWEST = 5  # samples; with fewer, a distribution says no more than the samples do
SAMPLES = 4096  # at most, of any distribution
DECOMPOSED = 256  # at most, where the report itself finds singular values
ROWS = 10  # of a Jacobian of images
SIDE = 64  # rows or columns of a matrix


@dataclass(frozen=True)
class Statistics:
    """What one pass over a bounded number of samples of a Jacobian gives.

    Attributes:
        norms: the Frobenius norm of each sample read; NaN where a value is not finite.
        mean_abs: the mean over the finite ones of |J|, for the first rows and columns, as (rows, columns).
        row_norms: for each row, the root of the mean square of its norm.
    """

    norms: Array
    mean_abs: Array
    row_norms: Array

    @property
    def finite(self) -> Array:
        """The norms of the samples without NaN or infinity."""
        found: Array = self.norms[np.isfinite(self.norms)]
        return found


def statistics(view: View, rows: int, columns: int, numbers: int = READ) -> Statistics | None:
    """Read evenly spread samples of a Jacobian, a few at a time; None where a single one is too large."""
    samples = view.spread(SAMPLES, numbers)
    if not len(samples):
        return None
    norms = np.full(len(samples), np.nan)
    total = np.zeros((min(rows, view.rows), min(columns, view.columns)))
    squares = np.zeros(view.rows)
    for place, part in view.chunks(samples):
        power = np.square(part, dtype=np.float64).sum(axis=2)
        fine = np.isfinite(power).all(axis=1)
        norms[place] = np.where(fine, np.sqrt(power.sum(axis=1)), np.nan)
        squares += power[fine].sum(axis=0)
        total += np.abs(part[fine, : total.shape[0], : total.shape[1]]).sum(axis=0, dtype=np.float64)
    share = max(int(np.isfinite(norms).sum()), 1)
    return Statistics(norms, total / share, np.sqrt(squares / share))


def spectrum_band(material: Material) -> Series | None:
    """Median and 10 to 90 % band of each singular value over all samples, or None where there are none."""
    if material.singular is None and not material.jacobians:
        return None
    source = material.singular or material.jacobians[0]
    most = SAMPLES if material.singular is not None else DECOMPOSED
    found = singular_values(material, source, source.spread(most, READ if material.singular is not None else READ >> 2))
    if found is None or len(found) < FEWEST or found.shape[1] < 2:
        return None
    found = found[np.isfinite(found).all(axis=1)]
    return None if len(found) < FEWEST else band(found)


def band(values: Array) -> Series:
    """Median and 10 to 90 % band over the first axis."""
    low, middle, high = np.quantile(values, (0.1, 0.5, 0.9), axis=0)
    return Series(middle, low, high)


def gallery(material: Material, view: View, context: Series | None) -> Gallery:
    """All samples of one Jacobian by inputs."""
    if view.samples < FEWEST:
        return Gallery("", "")
    found = statistics(view, ROWS if is_image(view) else SIDE, view.columns if is_image(view) else SIDE)
    pictures: list[Picture] = [*spectrum(context)]
    strips: list[Strip] = []
    if found is not None and len(found.finite):
        if len(found.finite) >= FEWEST:
            pictures.append(_norms(found.norms, view))
        if is_image(view):
            strips.append(_mean_images(found.mean_abs, view, material.output_word(view)))
        else:
            pictures.append(_mean_matrix(found.mean_abs, view, material.output_word(view)))
    if is_image(view):
        strips += _class_gradients(material, view)
    return Gallery("Over all samples", "", tuple(pictures), tuple(strips))


def spectrum(series: Series | None) -> list[Picture]:
    """The chart of `spectrum_band`."""
    if series is None:
        return []
    first, last = number(float(series.middle[0])), number(float(series.middle[-1]))
    caption = (
        f"The singular values of each sample's Jacobian, largest first: median over samples (line) and the range that"
        f" holds the middle 80 % of them (band). The median falls from {first} to {last}. {SPECTRUM_MEANING}"
        f"{zeros(series.middle)}"
    )
    alt = f"Median singular value by index, falling from {first} to {last}, with a band around it"
    svg = figures.profile(series, ("index of the singular value", "singular value"), alt)
    return [Picture("Spectrum of the Jacobian", svg, caption)]


def zeros(values: Array) -> str:
    """What a spectrum's axis leaves out, as a sentence with a space before it, or nothing."""
    count = int((values < values.max() * figures.ZERO).sum())
    return f" {count} of them zero within rounding." if count else ""


SPECTRUM_MEANING = "Each is how far the outputs move, in output units, for a step of length 1 along one direction."


def given_norms(view: View) -> list[Picture]:
    """The histogram of norms that the job itself gave."""
    norms = view.read(view.spread(SAMPLES)).ravel()
    return [_norms(norms, view)] if np.isfinite(norms).sum() >= FEWEST else []


def _norms(norms: Array, view: View) -> Picture:
    finite = norms[np.isfinite(norms)]
    low, middle, high = (number(float(q)) for q in np.quantile(finite, (0.05, 0.5, 0.95)))
    used = "all samples" if len(finite) == view.samples else f"{len(finite):,} of {view.samples:,} samples"
    used += f" ({len(norms) - len(finite):,} left out for NaN or infinity)" if len(finite) < len(norms) else ""
    caption = (
        f"How sensitive the model is at each sample: the Frobenius norm of J over {used}, in outputs per"
        f" unit of {unit(view)}. Median {middle} (dashed); nine in ten lie between {low} and {high}."
    )
    alt = f"Histogram of Jacobian norms: median {middle}, 5 % quantile {low}, 95 % quantile {high}"
    return Picture("Norms", figures.histogram(finite, ("Frobenius norm of J", "samples"), alt), caption)


def _mean_images(mean_abs: Array, view: View, word: str) -> Strip:
    shape = view.shape
    planes = [images.plane(row, shape) for row in mean_abs]
    reach = images.span(planes)
    tiles = tuple(
        images.sensitivity_tile(p, reach.limit, f"Mean |J| of {word} {k}", f"{word} {k}") for k, p in enumerate(planes)
    )
    some = f" The first {len(planes)} of {view.rows:,} {word}s." if len(planes) < view.rows else ""
    caption = (
        f"Where each {word} is sensitive, whatever the sign: the mean of |J| over all finite samples read, at each"
        f" {place_word(view)}.{some}{images.notes(shape)}"
    )
    scale = images.sequential_scale(reach, f"mean |J|, {word} per unit of {unit(view)}")
    return Strip("Mean sensitivity", tiles, scale, caption)


def _mean_matrix(mean_abs: Array, view: View, word: str) -> Picture:
    limit = images.limit_of(mean_abs)
    title = "Mean sensitivity"
    caption = f"Mean of |J| over all finite samples read, in {word}s per unit of input.{cropped(view, word)}"
    if min(mean_abs.shape) == 1:
        by_input = mean_abs.shape[0] == 1
        labels = ("input" if by_input else word, "mean |J|")
        return Picture(
            title, figures.bars(mean_abs.ravel(), labels, f"Mean |J| by {labels[0]}, up to {number(limit)}"), caption
        )
    alt = f"Heat map of mean |J|, {word}s down and inputs across, up to {number(limit)}"
    return Picture(title, figures.matrix(mean_abs, limit, "sequential", ("input", word, "mean |J|"), alt), caption)


def cropped(view: View, word: str) -> str:
    """What a matrix leaves out, as a sentence with a space before it, or nothing."""
    parts = [
        f"the first {SIDE} of {plural(count, what)}"
        for count, what in ((view.rows, word), (view.columns, "input"))
        if count > SIDE
    ]
    return f" Shown: {' and '.join(parts)}." if parts else ""


def _class_gradients(material: Material, view: View) -> list[Strip]:
    """The mean weighted gradient of each class."""
    gradient, target = material.gradient_of(view), material.target
    if gradient is None or target is None:
        return []
    planes = {}
    for label in classes(target, ROWS):
        members = np.flatnonzero(target == label)
        members = members[spread(len(members), min(SAMPLES // ROWS, READ // ROWS // max(gradient.size, 1)))]
        values = gradient.read(members)[:, 0, :]
        values = values[np.isfinite(values).all(axis=1)]
        if len(values):
            planes[label] = images.plane(values.mean(axis=0), view.shape)
    if not planes:
        return []
    reach = images.span(list(planes.values()))
    tiles = tuple(
        images.row_tile(p, reach.limit, f"Mean weighted gradient of class {label}:", f"class {label}")
        for label, p in planes.items()
    )
    caption = (
        "What raises the weighted output of a class (red) and what lowers it (blue): the mean of the weighted gradient"
        f" over the samples of each class.{images.notes(view.shape)}"
    )
    scale = images.diverging_scale(reach, f"weighted output per unit of {unit(view)}")
    return [Strip("Mean weighted gradient by class", tiles, scale, caption)]


def classes(target: Array, most: int) -> list[int]:
    """The labels that occur, or as many of them, evenly spread."""
    found = np.unique(target)
    return [int(label) for label in found[spread(len(found), most)]]

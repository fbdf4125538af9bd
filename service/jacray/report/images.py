"""Samples that are pictures: from one sample's numbers to tiles under one colour scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jacray.report import figures
from jacray.report.elements import Scale, Tile
from jacray.report.texts import number
from jacray.report.views import Array

SIDE = 48  # pixels of a tile; larger images are averaged down to this
USUAL = 0.99  # of the magnitudes that a scale has to tell apart ...
ROOM = 1.3  # ... where the largest is this many times as large as they are


def plane(values: Array, shape: tuple[int, ...]) -> Array:
    """One row of a Jacobian as (H, W); colour channels are added up, as if all were raised together."""
    return shrunk(values.reshape(-1, *shape[-2:]).sum(axis=0))


def shrunk(values: Array) -> Array:
    """A matrix averaged over blocks until no side is longer than a tile."""
    step = block(values.shape)
    if step == 1:
        return values
    high, wide = (-(-n // step) * step for n in values.shape)
    padded = np.full((high, wide), np.nan)
    padded[: values.shape[0], : values.shape[1]] = values
    blocks = padded.reshape(high // step, step, wide // step, step)
    count = np.isfinite(blocks).sum(axis=(1, 3))
    total = np.where(np.isfinite(blocks), blocks, 0.0).sum(axis=(1, 3))
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def block(shape: tuple[int, ...]) -> int:
    """How many pixels of an image stand behind one of a tile, in each direction."""
    return max(-(-max(shape[-2:]) // SIDE), 1)


def notes(shape: tuple[int, ...]) -> str:
    """What a tile of such an image does not show one to one, as a sentence with a space before it, or nothing."""
    step = block(shape)
    said = f" One pixel shown is the mean of {step} x {step}." if step > 1 else ""
    return said + (f" The {shape[0]} colour channels are added up." if len(shape) == 3 and shape[0] > 1 else "")


def limit_of(values: Array) -> float:
    """The largest finite magnitude, for a scale that is symmetric about zero."""
    found = np.abs(values[np.isfinite(values)])
    return float(found.max(initial=0.0)) or 1.0


@dataclass(frozen=True)
class Span:
    """How far a colour scale reaches.

    Attributes:
        limit: the magnitude at its end.
        largest: the largest there is, drawn in the colour of the end where it lies beyond.
    """

    limit: float
    largest: float

    @property
    def clipped(self) -> bool:
        """Some magnitudes lie beyond the end."""
        return self.largest > self.limit


def span(planes: Sequence[Array]) -> Span:
    """A scale for maps side by side, which a few extreme pixels do not wash out: these share the end's colour."""
    found = np.abs(np.concatenate([plane[np.isfinite(plane)] for plane in planes]))
    largest = float(found.max(initial=0.0))
    usual = float(np.quantile(found, USUAL)) if len(found) else 0.0
    return Span(usual if 0 < usual < largest / ROOM else largest or 1.0, largest)


def input_tile(values: Array, shape: tuple[int, ...], alt: str, label: str) -> Tile:
    """The input itself: in colour where it has three channels, else dark on light from its lowest to its highest."""
    image = values.reshape(shape if len(shape) == 3 else (1, *shape)).astype(np.float64)
    fine = image[np.isfinite(image)]
    low, high = (float(fine.min()), float(fine.max())) if fine.size else (0.0, 0.0)
    unit = (image - low) / ((high - low) or 1.0)
    small = np.stack([shrunk(channel) for channel in unit])
    uri = figures.photo(np.moveaxis(small, 0, -1)) if len(small) == 3 else figures.tile(small[0], 1.0, "grey")
    return Tile(uri, alt, label, f"{number(low)} to {number(high)}")


def row_tile(values: Array, limit: float, alt: str, label: str, value: str = "", mark: str = "") -> Tile:
    """A signed map on the scale of its sample; the alternative text gives its extremes."""
    fine = values[np.isfinite(values)]
    ends = f" from {number(float(fine.min()))} to {number(float(fine.max()))}" if fine.size else ", not finite"
    return Tile(figures.tile(values, limit, "diverging"), alt + ends, label, value, mark)


def diverging_scale(reach: Span, label: str) -> Scale:
    """Blue for negative, white for zero, red for positive."""
    low, high = (f"≤ {number(-reach.limit)}", f"≥ {number(reach.limit)}") if reach.clipped else _ends(reach)
    return Scale(figures.scale("diverging"), (low, "0", high), label + _beyond(reach))


def sequential_scale(reach: Span, label: str) -> Scale:
    """From dark for zero to bright for the largest."""
    high = f"≥ {number(reach.limit)}" if reach.clipped else number(reach.limit)
    return Scale(figures.scale("sequential"), ("0", number(reach.limit / 2), high), label + _beyond(reach))


def _ends(reach: Span) -> tuple[str, str]:
    return number(-reach.limit), number(reach.limit)


def _beyond(reach: Span) -> str:
    return f" (largest magnitude {number(reach.largest)})" if reach.clipped else ""


def sensitivity_tile(values: Array, limit: float, alt: str, label: str) -> Tile:
    """A map of magnitudes on a scale from zero."""
    return Tile(figures.tile(values, limit, "sequential"), f"{alt}, up to {number(float(np.nanmax(values)))}", label)

"""Every mark on the page that is not text: tiles (small PNGs) and charts (SVG). The one file that loads matplotlib.

Charts use matplotlib's object API; nothing here touches pyplot or leaves settings changed. Their text stays text and
their colours become CSS variables of the page, so that they follow its light and dark theme and any screen width.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import html
import io
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray
from PIL import Image

from jacray.report.texts import MINUS

Array = NDArray[Any]
Palette = Literal["diverging", "sequential", "grey"]

# All three are legible with any colour vision: red and blue differ in lightness too, and viridis is monotone in it.
_MAPS: dict[Palette, str] = {"diverging": "RdBu_r", "sequential": "viridis", "grey": "gray_r"}
# Placeholder colours, each replaced in the SVG by a CSS variable of the page.
_INK, _MUTED, _GRID, _MARK, _BAND, _HOLE = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
_VARIABLES = {_INK: "ink", _MUTED: "muted", _GRID: "grid", _MARK: "mark", _BAND: "band", _HOLE: "hole"}
_STYLE: dict[str, Any] = {
    "text.parse_math": False,  # a parameter may be called `$`
    "text.color": _INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "grid.color": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "font.size": 9,
    "axes.labelsize": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "jacray",
}
# matplotlib reads some settings only while drawing, and they are global: one chart is drawn at a time.
_LOCK = threading.Lock()
_LOG_BEYOND = 30.0  # a linear axis would press smaller values onto its foot
ZERO = 1e-7  # of the largest: what lies below is zero within float32 rounding, and left out of a logarithmic axis


@dataclass(frozen=True)
class Series:
    """What is known of a quantity at each place: its middle, and how far it spreads.

    Attributes:
        middle: the values to mark.
        low, high: the band around them, or None.
    """

    middle: Array
    low: Array | None = None
    high: Array | None = None


@dataclass
class _Chart:
    """A chart being drawn; `svg` is there once its block has ended."""

    figure: Figure
    axes: Axes
    svg: str = ""


def tile(values: Array, limit: float, palette: Palette) -> str:
    """A small picture of a matrix, one pixel a number, as a data URI.

    Args:
        values: of shape (H, W); what is not finite is left transparent.
        limit: the value at the end of the scale. The diverging scale runs from -limit to limit, the others from 0.
        palette: which colours.
    """
    lowest = -limit if palette == "diverging" else 0.0
    share = (values - lowest) / ((limit - lowest) or 1.0)
    # Entry 255 of the palette is kept for what is not finite.
    index = np.where(np.isfinite(share), np.clip(np.round(np.nan_to_num(share) * 254), 0, 254), 255)
    image = Image.frombytes("P", values.shape[::-1], index.astype(np.uint8).tobytes())
    image.putpalette(_colours(palette))
    return _uri(image, transparency=255)


def photo(values: Array) -> str:
    """A colour picture of shape (H, W, 3) with values from 0 to 1, as a data URI."""
    pixels = np.clip(np.nan_to_num(values) * 255, 0, 255).astype(np.uint8)
    return _uri(Image.frombytes("RGB", values.shape[1::-1], pixels.tobytes()))


def scale(palette: Palette) -> str:
    """The colours of a palette from its low to its high end, as a data URI."""
    return tile(np.linspace(-1 if palette == "diverging" else 0, 1, 128)[None], 1.0, palette)


def profile(series: Series, labels: tuple[str, str], alt: str, context: Series | None = None) -> str:
    """Positive values by index from 1, such as a spectrum; logarithmic where they span more than a factor 30.

    Args:
        series: the values, marked by points.
        labels: of the index, of the values.
        alt: what the picture shows, for those who do not see it.
        context: what to compare with, drawn behind without points.
    """
    with _chart(3.6, 2.2, alt) as chart:
        axes = chart.axes
        places = np.arange(1, len(series.middle) + 1)
        parts = [part for part in (context, series) if part is not None]
        log, floor = _log_floor(parts)
        for part in parts:
            _band(axes, part, places, floor)
        if context is not None:
            axes.plot(places, _above(context.middle, floor), color=_MUTED, linewidth=1.0, linestyle=(0, (3, 2)))
        dots = 4 if len(places) <= 40 else 0
        axes.plot(places, _above(series.middle, floor), color=_MARK, marker="o", markersize=dots, linewidth=1.4)
        _titles(axes, labels)
        _whole(axes.xaxis, len(places), first=1)
        _value_axis(axes, log)
        if not log:
            axes.set_ylim(bottom=0)
    return chart.svg


def histogram(values: Array, labels: tuple[str, str], alt: str) -> str:
    """How many values fall into each of up to forty intervals, and their median as a dashed line."""
    with _chart(3.6, 2.2, alt) as chart:
        axes = chart.axes
        bins = int(np.clip(np.sqrt(len(values)) * 1.5, 5, 40))
        axes.hist(values, bins=bins, range=_room(values), color=_MARK)
        axes.axvline(float(np.median(values)), color=_INK, linewidth=1.2, linestyle=(0, (4, 2)))
        _titles(axes, labels)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(_short))
        axes.grid(axis="y", linewidth=0.6)
    return chart.svg


def matrix(values: Array, limit: float, palette: Palette, labels: tuple[str, str, str], alt: str) -> str:
    """A matrix as a heat map with numbered rows and columns and a colour bar.

    Args:
        values: of shape (rows, columns).
        limit: the value at the end of the scale, as in `tile`.
        palette: which colours.
        labels: of the columns, of the rows, of the colours.
        alt: what the picture shows, for those who do not see it.
    """
    rows, columns = values.shape
    width = float(np.clip(1.7 + 0.16 * columns, 2.6, 4.8))
    height = float(np.clip(1.0 + 0.16 * rows, 1.7, 4.6))
    with _chart(width, height, alt) as chart:
        _heat(chart, values, -limit if palette == "diverging" else 0.0, limit, palette, labels[2])
        _titles(chart.axes, labels)
        _whole(chart.axes.xaxis, columns)
        _whole(chart.axes.yaxis, rows)
    return chart.svg


def named_matrix(values: Array, names: Sequence[str], labels: tuple[str, str], alt: str) -> str:
    """Positive values as a heat map with a named row each, numbered columns and a colour bar."""
    rows, columns = values.shape
    with _chart(float(np.clip(3.2 + 0.16 * columns, 3.6, 4.8)), 1.1 + 0.24 * rows, alt) as chart:
        _heat(chart, values, 0.0, float(np.nanmax(values, initial=0)), "sequential", labels[1])
        chart.axes.set_xlabel(labels[0])
        _whole(chart.axes.xaxis, columns)
        _names(chart.axes, names)
    return chart.svg


def bars(values: Array, labels: tuple[str, str], alt: str) -> str:
    """Signed values by index."""
    with _chart(float(np.clip(1.6 + 0.16 * len(values), 2.6, 4.8)), 2.0, alt) as chart:
        axes = chart.axes
        axes.bar(np.arange(len(values)), np.nan_to_num(values), color=_MARK, width=0.8)
        axes.axhline(0, color=_MUTED, linewidth=0.8)
        axes.set_xlim(-0.6, len(values) - 0.4)
        _titles(axes, labels)
        _whole(axes.xaxis, len(values))
        _value_axis(axes, log=False)
    return chart.svg


def named_bars(series: Series, names: Sequence[str], label: str, alt: str) -> str:
    """One horizontal bar a name, with a line from the low to the high end of its spread."""
    with _chart(4.8, 0.8 + 0.24 * len(names), alt) as chart:
        axes = chart.axes
        places = np.arange(len(names))
        axes.barh(places, np.nan_to_num(series.middle), color=_MARK, height=0.62)
        if series.low is not None and series.high is not None:
            axes.hlines(places, np.nan_to_num(series.low), np.nan_to_num(series.high), color=_INK, linewidth=1.4)
        _names(axes, names)
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_xlabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(_short))
        axes.grid(axis="x", linewidth=0.6)
    return chart.svg


@contextlib.contextmanager
def _chart(width: float, height: float, alt: str) -> Iterator[_Chart]:
    """Axes to draw on, in inches and in the page's style; the SVG is made when the block ends."""
    with _LOCK, style.context(["default", _STYLE]):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        chart = _Chart(figure, figure.add_subplot())
        yield chart
        written = io.StringIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's browser has the fonts, not we
            figure.savefig(written, format="svg", metadata=dict.fromkeys(("Date", "Creator")))
        chart.svg = _inline(written.getvalue(), width, alt)


def _heat(chart: _Chart, values: Array, low: float, high: float, palette: Palette, label: str) -> None:
    image = chart.axes.imshow(
        np.ma.masked_invalid(values), cmap=_MAPS[palette], vmin=low, vmax=high or 1.0, aspect="auto",
        interpolation="none",
    )  # fmt: skip
    few = chart.figure.get_size_inches()[1] < 2
    bar = chart.figure.colorbar(image, ax=chart.axes, format=FuncFormatter(_short), ticks=MaxNLocator(3 if few else 5))
    bar.ax.set_title(label, fontsize=9)
    chart.axes.set_facecolor(_HOLE)  # shows where a number is not finite
    bar.outline.set_visible(False)


def _titles(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])


def _names(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [_clipped(name, 36) for name in names])
    axes.tick_params(axis="y", length=0)


def _clipped(name: str, length: int) -> str:
    """A long name without its middle: parameters differ at both ends."""
    half = length // 2
    return name if len(name) <= length else f"{name[: half - 1]}…{name[-half:]}"


def _whole(axis: Any, count: int, first: int = 0) -> None:
    """Number the places, at most every one and never more than a dozen labels."""
    step = next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 50, 100, count) if count <= 12 * step)
    axis.set_major_locator(FixedLocator(sorted({first, *range(step, first + count, step)})))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))


def _value_axis(axes: Axes, log: bool) -> None:
    if log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,), numticks=8))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(_short))
    axes.grid(axis="y", linewidth=0.6)


def _log_floor(parts: Sequence[Series]) -> tuple[bool, float]:
    """Whether the values ask for a logarithmic axis, and below what they count as zero on it."""
    found = np.concatenate([part.middle[np.isfinite(part.middle)] for part in parts])
    top = float(found.max(initial=0.0))
    positive = found[found > top * ZERO]
    log = len(positive) > 0 and top > _LOG_BEYOND * float(positive.min())
    return log, top * ZERO if log else -np.inf


def _above(values: Array, floor: float) -> Array:
    return np.where(values > floor, values, np.nan)


def _band(axes: Axes, series: Series, places: Array, floor: float) -> None:
    if series.low is not None and series.high is not None:
        low, high = np.maximum(series.low, floor), np.maximum(series.high, floor)
        axes.fill_between(places, low, high, color=_BAND, linewidth=0)


def _room(values: Array) -> tuple[float, float]:
    """The range of a histogram, widened where all values are one."""
    low, high = float(values.min()), float(values.max())
    if high - low > 1e-6 * abs(high):
        return low, high
    margin = 0.5 * abs(high) or 0.5
    return low - margin, high + margin


def _short(value: float, _: Any = None) -> str:
    """A tick's number, as short as it can be."""
    return f"{value:.6g}".replace("e-0", "e-").replace("e+0", "e").replace("-", MINUS)


def _colours(palette: Palette) -> bytes:
    steps = mpl.colormaps[_MAPS[palette]](np.linspace(0, 1, 255), bytes=True)
    return bytes(np.asarray(steps)[:, :3].tobytes()) + bytes(3)


def _uri(image: Image.Image, **options: Any) -> str:
    written = io.BytesIO()
    image.save(written, format="PNG", optimize=True, **options)
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()


def _inline(svg: str, width: float, alt: str) -> str:
    """The SVG file as an element of the page: themed, labelled, responsive, with ids of its own."""
    svg = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL
    )
    svg = svg.replace("xlink:href=", "href=")
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    svg = re.sub(r">\s+<", "><", svg)
    box = re.search(r'viewBox="([^"]*)"', svg)
    shape = box[1] if box else ""
    opening = f'<svg role="img" aria-label="{html.escape(alt)}" viewBox="{shape}" width="{width * 96:.0f}">'
    return opening + _own_ids(svg[svg.index(">") + 1 :].strip(), opening)


def _own_ids(body: str, seed: str) -> str:
    """Keep the ids that are referred to and make them differ between the charts of one page."""
    prefix = hashlib.sha256((seed + body).encode()).hexdigest()[:8]
    used = set(re.findall(r'(?:url\(#|href="#)([\w.-]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", body)
    body = re.sub(r' id="', f' id="{prefix}-', body)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", body)

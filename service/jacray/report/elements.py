"""What the page is made of besides its tables, as frozen data that the template lays out."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Picture:
    """A chart with its caption.

    Attributes:
        title: a short heading.
        svg: the chart, an SVG element made by us.
        caption: what is to be seen, and the units.
    """

    title: str
    svg: str
    caption: str

    @property
    def width(self) -> int:
        """The chart's natural width in CSS pixels, so that a caption can keep to it."""
        found = re.search(r' width="(\d+)"', self.svg)
        return int(found[1]) if found else 0


@dataclass(frozen=True)
class Tile:
    """A small picture of one sample, or of one row of its Jacobian.

    Attributes:
        uri: the picture as a data URI.
        alt: what it shows, for those who do not see it.
        label: the line below it.
        value: a number behind the label, or empty.
        mark: a word that sets the tile apart (`label`, `largest`), or empty.
    """

    uri: str
    alt: str
    label: str
    value: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Scale:
    """The colours of a group of tiles with the numbers at their ends.

    Attributes:
        uri: the colours from low to high, as a data URI.
        ticks: the numbers below, evenly from the low to the high end.
        label: what the numbers are, with their unit.
    """

    uri: str
    ticks: tuple[str, ...]
    label: str


@dataclass(frozen=True)
class Strip:
    """Tiles under one colour scale.

    Attributes:
        title: a short heading.
        tiles: the tiles.
        scale: their colours.
        caption: what is to be seen.
    """

    title: str
    tiles: tuple[Tile, ...]
    scale: Scale
    caption: str = ""


@dataclass(frozen=True)
class Card:
    """One sample.

    Attributes:
        title: which sample.
        why: why it is shown and what the model makes of it.
        lead: the input itself and its weighted gradient, where they can be shown as images.
        strip: the rows of its Jacobian as tiles, or None.
        pictures: charts of this sample.
    """

    title: str
    why: str
    lead: tuple[Tile, ...] = ()
    strip: Strip | None = None
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Gallery:
    """A section of pictures.

    Attributes:
        title: its heading.
        intro: what all of its pictures share.
        pictures, strips, cards: what it shows, in this order.
    """

    title: str
    intro: str
    pictures: tuple[Picture, ...] = ()
    strips: tuple[Strip, ...] = ()
    cards: tuple[Card, ...] = ()

    @property
    def empty(self) -> bool:
        """Nothing to show."""
        return not (self.pictures or self.strips or self.cards)

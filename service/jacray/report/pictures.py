"""Which pictures a result deserves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jacray.report import blocks, overall, samples
from jacray.report.elements import Gallery, Picture
from jacray.report.figures import Series
from jacray.report.material import Material, gather
from jacray.report.views import View

VIEWS = 4  # Jacobians by inputs that are drawn, where outputs and inputs are several
DRAWABLE = 1 << 22  # columns; one row of anything wider is not read


def galleries(result: Any, inputs: Any = None, fields: Mapping[str, Any] | None = None) -> list[Gallery]:
    """The sections of pictures, without the empty ones.

    Args:
        result: what a job gave.
        inputs: the model's inputs, to show them beside their derivatives.
        fields: what else is known of each sample; `target` holds its class.
    """
    material = gather(result, inputs, fields)
    context = overall.spectrum_band(material)
    by_input = [view for view in material.jacobians if view.side == "input" and view.samples and view.size > 0]
    drawn = [view for view in by_input if view.columns <= DRAWABLE][:VIEWS]
    found = [gallery for view in drawn for gallery in _of_view(material, view, context, several=len(by_input) > 1)]
    found = found or [_without_jacobian(material, context)]
    found.append(blocks.gallery(material))
    return [gallery for gallery in found if not gallery.empty]


def _of_view(material: Material, view: View, context: Series | None, several: bool) -> list[Gallery]:
    """Over all samples, then single ones; named where there is more than one Jacobian."""
    found = [overall.gallery(material, view, context), samples.gallery(material, view, context)]
    return [replace(g, title=f"{g.title}: {view.name}") for g in found if not g.empty] if several else found


def _without_jacobian(material: Material, context: Series | None) -> Gallery:
    """What can be shown where no Jacobian by inputs was kept: spectrum and norms, where these were."""
    pictures: list[Picture] = [*overall.spectrum(context)]
    if material.norms is not None:
        pictures += overall.given_norms(material.norms)
    return Gallery("Over all samples", "", tuple(pictures))

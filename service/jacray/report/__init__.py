"""A run's report: one page that needs no network, no script and nothing beside it."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from jacray.report.elements import Gallery
from jacray.report.facts import Facts, collect
from jacray.report.pictures import galleries

__all__ = ["page"]

_BESIDE = {"spec.yaml": "replays this run", "receipt.json": "the whole record", "results.zarr": "the numbers"}


def page(
    result: Any,
    *,
    inputs: Any = None,
    fields: Mapping[str, Any] | None = None,
    title: str = "jacray report",
    beside: Container[str] = (),
) -> str:
    """The page of a run, as HTML.

    Results are read in slices of bounded size, so that a page of a large job costs no more than one of a small job.

    Args:
        result: has `plan`, `receipt`, and as attributes the results that were asked for.
        inputs: the model's inputs, a tensor or a pytree with the batch first; shown beside their derivatives.
        fields: what else is known of each sample, by name; `target` holds its class as a whole number.
        title: the page's heading.
        beside: the names of the files that it lies among, to which it may lead.
    """
    facts = collect(getattr(result, "plan", None), getattr(result, "receipt", None) or {}, inputs)
    drawn = galleries(result, inputs, fields)
    text: str = _template().render(
        title=title,
        facts=facts,
        galleries=drawn,
        sections=_sections(facts, drawn),
        beside={name: what for name, what in _BESIDE.items() if name in beside},
    )
    return text


def _sections(facts: Facts, drawn: Sequence[Gallery]) -> list[tuple[str, str]]:
    """The page's sections in order: anchor and heading."""
    first = [
        ("computed", "What was computed"),
        *([("plan", "The plan")] if facts.plan else []),
        ("checks", "Time and trust"),
    ]
    pictures = [(f"pictures-{number}", gallery.title) for number, gallery in enumerate(drawn, 1)]
    return [*first, *pictures, ("origin", "Where this comes from")]


def _template() -> Any:
    """The page; whatever comes from outside is escaped unless the template says that we made it."""
    environment = Environment(
        loader=PackageLoader("jacray.report", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("page.html.j2")

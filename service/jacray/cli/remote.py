"""What the commands about a service do, behind their arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import click
from jacray_workers.errors import SpecError


def serve_until_stopped(given: Mapping[str, Any]) -> None:
    """Serve, with the address on standard output once it is listening."""
    from jacray.http.serve import serve
    from jacray.http.settings import make_settings

    settings = make_settings(**{**given, "limits": dict(_limits(given["limits"]))})
    serve(settings, click.echo)


def _limits(texts: Iterable[str]) -> Iterable[tuple[str, float]]:
    for text in texts:
        name, _, number = text.partition("=")
        try:
            value = float(number)
        except ValueError:
            raise SpecError("limit", "must be NAME=NUMBER", text) from None
        yield name, int(value) if value.is_integer() else value

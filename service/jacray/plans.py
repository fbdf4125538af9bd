"""Plans read back from the plain JSON data that receipts and stores keep of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from jacray_workers.plan import ArrayPlan, Candidate, Plan


def read_plan(data: Mapping[str, Any]) -> Plan:
    """The plan whose `to_dict`, with infinities as texts, this is."""
    known = {f.name for f in fields(Plan)}
    given: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items() if key in known}
    given["arrays"] = tuple(
        ArrayPlan(**{**a, "shape": tuple(a["shape"]), "dims": tuple(a["dims"])}) for a in data["arrays"]
    )
    given["candidates"] = tuple(_candidate(c) for c in data["candidates"])
    return Plan(**given)


def _candidate(data: Mapping[str, Any]) -> Candidate:
    numbers = {k: float(v) for k, v in data.items() if isinstance(v, str) and v in ("inf", "-inf", "nan")}
    return Candidate(**{**data, **numbers})

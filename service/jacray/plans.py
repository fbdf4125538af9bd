"""Plans read back from the plain JSON data that receipts and stores keep of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal

from jacray_workers.plan import ArrayPlan, Candidate, Plan

Pin = Literal["method", "chunk_size", "memory_budget"]
PINNED: Mapping[Pin, Any] = {"method": "auto", "chunk_size": None, "memory_budget": None}
"""What a plan decides of a request, with the values that leave it to the plan."""


def pins(plan: Plan) -> dict[Pin, Any]:
    """What makes a rerun take the same decisions as this plan, and so give the same bits."""
    return {"method": plan.method, "chunk_size": plan.chunk_size, "memory_budget": plan.budget_bytes}


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

"""JSON Schemas of what travels as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jacray.http.policy import MODELS

_TEXT: Mapping[str, Any] = {"type": "string"}
_WHOLE: Mapping[str, Any] = {"type": "integer"}
_NUMBER: Mapping[str, Any] = {"type": "number"}
DIGEST: Mapping[str, Any] = {"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"}


def mapping(properties: Mapping[str, Any], required: tuple[str, ...] | None = None) -> dict[str, Any]:
    """An object with these properties, all of them required unless said otherwise."""
    return {"type": "object", "properties": properties, "required": list(properties if required is None else required)}


def listing(name: str, item: Mapping[str, Any]) -> dict[str, Any]:
    """An object that holds a list."""
    return mapping({name: {"type": "array", "items": item}})


PROBLEM = mapping(
    {
        "type": _TEXT, "title": _TEXT, "status": _WHOLE, "detail": _TEXT, "kind": _TEXT, "key": _TEXT, "rule": _TEXT,
        "value": {"type": ["string", "null"]}, "way_out": _TEXT,
    },
    ("type", "title", "status", "detail", "kind"),
)  # fmt: skip
UPLOADED = mapping({"digest": DIGEST, "kind": _TEXT, "bytes": _WHOLE, "tensors": _WHOLE})
UPLOAD = mapping({"digest": DIGEST, "kind": _TEXT, "bytes": _WHOLE, "at": _NUMBER})
_COUNTS = dict.fromkeys(("samples", "samples_done", "shards", "shards_done", "retries", "bytes_out"), _WHOLE)
JOB = mapping(
    {
        "id": _TEXT, "user": _TEXT, "key": _TEXT, "planned": {"type": "boolean"}, "submitted": _NUMBER,
        "state": {"enum": ["queued", "running", "done", "failed", "cancelled"]},
        "started": {"type": ["number", "null"]}, "finished": {"type": ["number", "null"]}, "elapsed": _NUMBER,
        **_COUNTS, "method": _TEXT, "digest": _TEXT, "model": _TEXT,
        "problem": {"oneOf": [{"type": "null"}, {"$ref": "#/components/schemas/Problem"}]},
    }
)  # fmt: skip
PLAN = mapping(
    {
        "samples": _WHOLE,
        "shards": _WHOLE,
        "bytes_out": _WHOLE,
        "method": _TEXT,
        "explained": {"type": ["string", "null"]},
    }
)
STATUS = mapping({"status": _TEXT})
READINESS = mapping({"status": _TEXT, "processes": _WHOLE})
RESULTS = mapping({"results": {"type": "object"}, "receipt": {"type": "object"}})


def _work(options: Mapping[str, Any], more: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
    """A body that asks for work, with these options."""
    properties: dict[str, Any] = {
        "model": {
            "type": "object",
            "description": 'a model spec, or {"digest": "sha256:..."} of an uploaded model',
            "properties": {"kind": {"enum": list(MODELS)}, "digest": DIGEST},
        },
        "inputs": {
            "type": ["array", "object"],
            "description": 'nested lists with the batch first, an input spec, or {"digest": "sha256:..."}',
        },
        "request": {
            "type": "object",
            "description": "the request vocabulary: wrt, returns, weights, ...",
            "properties": {
                "returns": {"type": ["array", "string"]},
                "method": {"enum": ["auto", "reverse", "forward", "backward_loop", "layerwise", "chain"]},
            },
        },
        "options": {"type": "object", "properties": options, "additionalProperties": False},
        **(more or {}),
    }
    return {**mapping(properties, ("model", "inputs")), "additionalProperties": False}


SMALL = _work({"batch": {"type": "boolean", "description": "may be computed with other requests"}})
SUBMISSION = _work(
    {"on_error": {"enum": ["fail", "skip"], "description": "skip finishes without samples that always fail"}},
    {"spec": {"type": "object", "description": "the file that it comes from, kept for who fetches the result"}},
)

"""Every operation of the service in one table. The routes and the OpenAPI document are both made from it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jacray.http import job_calls, problems, schemas, wire
from jacray.http.calls import JSON, Answer, Call

if TYPE_CHECKING:
    from jacray.http.service import Service

Do = Callable[["Service", Call], Awaitable[Answer]]
TEXT, HTML, EVENTS = "text/plain", "text/html", "text/event-stream"


@dataclass(frozen=True)
class Parameter:
    """A parameter of the path, the query or the headers.

    Attributes:
        name, where: what it is called, and `path`, `query` or `header`.
        schema: what it may be, as JSON Schema.
        text: what it means.
    """

    name: str
    where: str
    schema: Mapping[str, Any]
    text: str


@dataclass(frozen=True)
class Operation:
    """One thing that the service does.

    Attributes:
        method, path: where.
        name: its name in the document and in metrics.
        text: what it does.
        do: does it.
        answers: status -> media type -> JSON Schema; problems come besides.
        problems: the statuses of its problems, besides those that every operation has.
        takes: media type -> JSON Schema of its body.
        parameters: of path, query and headers.
        headers: what good answers say besides.
        open: needs no token.
    """

    method: str
    path: str
    name: str
    text: str
    do: Do
    answers: Mapping[int, Mapping[str, Any]]
    problems: tuple[int, ...] = ()
    takes: Mapping[str, Any] = field(default_factory=dict)
    parameters: tuple[Parameter, ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    open: bool = False


_BINARY: Mapping[str, Any] = {"type": "string", "format": "binary"}
_BODY = (400, 408, 413, 415)
_DIGEST = Parameter("digest", "path", schemas.DIGEST, "sha256: and 64 hexadecimal digits")
_SMALL = {JSON: schemas.SMALL, wire.MEDIA: _BINARY}
_SUBMISSION = {JSON: schemas.SUBMISSION, wire.MEDIA: _BINARY}


def _uploads(kind: str, what: str) -> list[Operation]:
    path = f"/v1/{kind}"
    return [
        Operation(
            "POST", path, f"upload_{kind}", f"Keep {what} under the sha256 of its bytes; again does nothing.",
            lambda service, call: service.upload(call, kind),
            {201: {JSON: schemas.UPLOADED}, 200: {JSON: schemas.UPLOADED}},
            (*_BODY, 422), {wire.MEDIA: _BINARY}, headers={"Location": "where it is described"},
        ),
        Operation(
            "GET", path, f"list_{kind}", f"Your {kind}, the latest first.",
            lambda service, call: service.uploaded(call, kind), {200: {JSON: schemas.listing(kind, schemas.UPLOAD)}},
        ),
        Operation(
            "GET", f"{path}/{{digest}}", f"get_{kind}", f"One of your {kind}.",
            lambda service, call: service.one_upload(call, kind), {200: {JSON: schemas.UPLOAD}}, (404,),
            parameters=(_DIGEST,),
        ),
        Operation(
            "DELETE", f"{path}/{{digest}}", f"delete_{kind}", f"Forget one of your {kind}.",
            lambda service, call: service.remove_upload(call, kind), {204: {}}, (404,), parameters=(_DIGEST,),
        ),
    ]  # fmt: skip


_ID = Parameter("id", "path", {"type": "string", "pattern": "^[0-9a-f]{1,32}$"}, "the job's id")
_KEY = Parameter(
    "Idempotency-Key", "header", {"type": "string", "minLength": 1, "maxLength": 200, "pattern": "^[!-~]+$"},
    "makes submitting the same job again harmless",
)  # fmt: skip
_AFTER = Parameter("Last-Event-ID", "header", {"type": "integer", "minimum": 0}, "the last event that one has")


_RANGES = (
    Parameter("Range", "header", {"type": "string"}, "bytes=FIRST- or bytes=FIRST-LAST of the message"),
    Parameter("If-Range", "header", {"type": "string"}, "the ETag that the range is meant for"),
    Parameter("Want-Repr-Digest", "header", {"type": "string"}, "sha-256=1 asks for the digest of the whole message"),
)


def _query(name: str, text: str, schema: Mapping[str, Any] | None = None) -> Parameter:
    return Parameter(name, "query", schema or {"type": "integer", "minimum": 0}, text)


_JOBS = (
    Operation(
        "POST", "/v1/jobs", "submit", "Submit a job.", job_calls.submit,
        {201: {JSON: schemas.JOB}, 200: {JSON: schemas.JOB}}, (*_BODY, 409, 422, 429, 500), _SUBMISSION, (_KEY,),
        {"Location": "the job"},
    ),
    Operation(
        "GET", "/v1/jobs", "list_jobs", "Your jobs, the latest first.", job_calls.listing,
        {200: {JSON: schemas.listing("jobs", schemas.JOB)}}, (422,),
        parameters=(
            _query("state", "only jobs in this state", {"enum": ["queued", "running", "done", "failed", "cancelled"]}),
            _query("limit", "at most so many", {"type": "integer", "minimum": 1, "maximum": 10_000}),
        ),
    ),
    Operation(
        "GET", "/v1/jobs/{id}", "get_job", "One job.", job_calls.status, {200: {JSON: schemas.JOB}}, (404, 422),
        parameters=(
            _ID, _query("wait", "seconds to wait for its end", {"type": "integer", "minimum": 0, "maximum": 60}),
        ),
    ),
    Operation(
        "DELETE", "/v1/jobs/{id}", "delete_job", "Forget a job and its result; one that runs is cancelled.",
        job_calls.remove, {204: {}}, (404, 409), parameters=(_ID,),
    ),
    Operation(
        "POST", "/v1/jobs/{id}/cancel", "cancel_job", "End a job soon.", job_calls.cancel, {200: {JSON: schemas.JOB}},
        (404,), parameters=(_ID,),
    ),
    Operation(
        "GET", "/v1/jobs/{id}/plan", "get_plan", "How a job is computed.", job_calls.plan, {200: {JSON: schemas.PLAN}},
        (404, 409), parameters=(_ID,),
    ),
    Operation(
        "GET", "/v1/jobs/{id}/spec", "get_spec", "The file that a job was submitted from.", job_calls.spec,
        {200: {JSON: {"type": "object"}}}, (404,), parameters=(_ID,),
    ),
    Operation(
        "GET", "/v1/jobs/{id}/receipt", "get_receipt", "How a job's numbers came about.", job_calls.receipt,
        {200: {JSON: {"type": "object"}}}, (404, 409), parameters=(_ID,),
    ),
    Operation(
        "GET", "/v1/jobs/{id}/events", "get_events", "A job's events as they happen.", job_calls.events,
        {200: {EVENTS: {"type": "string"}}}, (400, 404), parameters=(_ID, _AFTER),
    ),
    Operation(
        "GET", "/v1/jobs/{id}/result", "get_result",
        "A job's result, or a part of it. A download that broke off goes on with Range and If-Range.", job_calls.result,
        {200: {wire.MEDIA: _BINARY}, 206: {wire.MEDIA: _BINARY}}, (404, 406, 409, 416, 422),
        headers={"ETag": "what tells this message from others", "Accept-Ranges": "bytes"},
        parameters=(
            *_RANGES,
            _ID, _query("result", "names of results, with commas between", {"type": "string"}),
            _query("array", "the key of one array", {"type": "string"}), _query("start", "the first sample"),
            _query("stop", "the sample after the last"),
        ),
    ),
)  # fmt: skip

OPERATIONS: tuple[Operation, ...] = (
    Operation(
        "POST", "/v1/compute", "compute",
        "Compute small work and answer with the results. Requests of one kind that come together are computed as one "
        "batch.",
        lambda service, call: service.compute(call), {200: {wire.MEDIA: _BINARY, JSON: schemas.RESULTS}},
        (*_BODY, 422, 429, 500, 503), _SMALL,
    ),
    *_JOBS,
    *_uploads("models", "an exported model"),
    *_uploads("inputs", "tensors"),
    Operation(
        "GET", "/healthz", "health", "The process runs.", lambda service, call: service.health(call),
        {200: {JSON: schemas.STATUS}}, open=True,
    ),
    Operation(
        "GET", "/readyz", "readiness", "Whether work is taken now.", lambda service, call: service.readiness(call),
        {200: {JSON: schemas.READINESS}, 503: {JSON: schemas.READINESS}}, open=True,
    ),
    Operation(
        "GET", "/metrics", "metrics", "What there is to count, for Prometheus.",
        lambda service, call: service.metrics_text(call), {200: {TEXT: {"type": "string"}}},
    ),
)  # fmt: skip

EVERYWHERE: Mapping[int, str] = {
    400: "the request breaks a rule of HTTP or of this service",
    401: "no token, or an unknown one",
    403: "the request comes from another site's page, or names another host",
    404: "there is nothing of yours here",
    406: "a form of answer that is not given here",
    408: "the body came too slowly",
    409: "it contradicts what is there",
    413: "too many bytes",
    416: "the message has no such bytes",
    415: "a media type that is not taken here",
    422: "it breaks a rule: key, rule, value and way out say which",
    429: "too much of yours waits already, or too many connections are yours",
    500: "a fault of the service",
    503: "the service is starting or stopping",
}
"""What each status of a problem means."""

ALWAYS = (401, 403, 429)
"""Statuses that every operation may answer with, unless it is open."""


def document(version: str) -> dict[str, Any]:
    """The OpenAPI document."""
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _described(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "jacray", "version": version, "description": "Per-sample Jacobians over HTTP."},
        "paths": paths,
        "components": {
            "schemas": {"Problem": schemas.PROBLEM},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _described(operation: Operation) -> dict[str, Any]:
    statuses = sorted({*operation.problems, *(() if operation.open else ALWAYS)})
    answers: dict[str, Any] = {
        str(status): {
            "description": "as asked",
            "content": {media: {"schema": schema} for media, schema in content.items()},
            "headers": {
                name: {"schema": {"type": "string"}, "description": text} for name, text in operation.headers.items()
            },
        }
        for status, content in operation.answers.items()
    }  # fmt: skip
    for status in statuses:
        told = answers.setdefault(str(status), {"description": EVERYWHERE[status], "content": {}})
        told["content"][problems.MEDIA] = {"schema": {"$ref": "#/components/schemas/Problem"}}
    found: dict[str, Any] = {
        "operationId": operation.name, "summary": operation.text, "responses": answers,
        "security": [] if operation.open else [{"token": []}, {}],
    }  # fmt: skip
    if operation.parameters:
        found["parameters"] = [
            {"name": p.name, "in": p.where, "required": p.where == "path", "schema": p.schema, "description": p.text}
            for p in operation.parameters
        ]
    if operation.takes:
        content = {media: {"schema": schema} for media, schema in operation.takes.items()}
        found["requestBody"] = {"required": True, "content": content}
    return found

"""The service against its own OpenAPI document, and against bodies that nobody sane would send."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from jacray.http import wire
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from tests.service.http.test_http_compute import NET, message
from tests.serving import ALICE, Server

CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
    response_headers_conformance, unsupported_method, ignored_auth,
]  # fmt: skip


@schemathesis.serializer(wire.MEDIA)
def as_tensors(_context: Any, value: Any) -> bytes:
    """Whatever was drawn, and now and then a message that is one."""
    drawn = value if isinstance(value, bytes) else str(getattr(value, "data", value)).encode()
    return drawn if len(drawn) % 3 else message(GOOD, ("inputs.0", "F32", [1, 3], bytes(12)))


def examine(server: Server, examples: int, seconds: int) -> int:
    """Put every operation to the test; returns how many requests were sent."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    sent = 0
    for found in schema.get_all_operations():
        operation = found.ok()

        @settings(
            max_examples=examples, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        def check(case: Any) -> None:
            nonlocal sent
            sent += 1
            case.call_and_validate(
                headers={"Authorization": f"Bearer {ALICE}", **(case.headers or {})}, checks=CHECKS, timeout=seconds
            )

        _given(operation)(check)()
    return sent


def _given(operation: Any) -> Any:
    from hypothesis import given

    return given(case=operation.as_strategy())


def test_the_openapi_document_is_true(server: Server) -> None:
    assert examine(server, 12, 60) > 100


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_openapi_document_is_true_in_hundreds_of_ways(server: Server) -> None:
    assert examine(server, 300, 120) > 2000


GOOD = {"model": NET, "inputs": {"tensors": {"key": "inputs.0"}}, "request": {"returns": ["jacobian"]}}
JUNK: tuple[Any, ...] = (
    None, True, 0, -1, 2**63, 1e308, "", "x", "\u0000", [], {}, [[]], [[1, 2], [3]], {"kind": None}, {"kind": "layers"},
    {"kind": "random", "shape": [2**47, 2**47]}, {"kind": "inline", "values": []}, {"digest": "sha256:" + "f" * 64},
    {"tensors": {"key": 1}}, {"tensors": {"dict": [["a"]]}}, [float(10**15)] * 3, {"kind": "npz", "path": "../../etc"},
    "inputs", ["params"], {"module": "0"}, "weight*", ["jacobian"] * 50, {"a": {"b": {"c": [1]}}},
)  # fmt: skip
KEYS = (
    "model", "inputs", "request", "options", "wrt", "returns", "weights", "vectors", "method", "chunk_size", "dtype",
    "memory_budget", "outputs", "form", "seed", "kind", "layers", "in_features", "tensors", "key", "digest", "verify",
    "device", "top_k", "loss", "path", "target", "expression", "batch",
)  # fmt: skip


def malformed(seed: int) -> Iterator[tuple[str, bytes, str]]:
    """Endless bodies: documents with parts replaced, headers that lie, bytes that are flipped, cut or repeated."""
    draw = random.Random(seed)
    whole = message(GOOD, ("inputs.0", "F32", [1, 3], bytes(12)))
    while True:
        path = draw.choice(["/v1/compute", "/v1/compute", "/v1/compute", "/v1/jobs", "/v1/models", "/v1/inputs"])
        way = draw.randrange(6)
        if way == 0:
            yield path, json.dumps(_changed(draw, {**GOOD, "inputs": [[1, 2, 3]]})).encode(), "application/json"
        elif way == 1:
            yield path, message(_changed(draw, GOOD), ("inputs.0", "F32", [1, 3], bytes(12))), wire.MEDIA
        elif way == 2:
            yield path, _spoilt(draw, whole), wire.MEDIA
        elif way == 3:
            yield path, _spoilt(draw, json.dumps({**GOOD, "inputs": [[1, 2, 3]]}).encode()), "application/json"
        elif way == 4:
            shape = [draw.choice([0, 1, 3, -1, 2**47, 2**62, 1.5, None, "3"]) for _ in range(draw.randrange(4))]
            dtype = draw.choice([*wire.ITEM, "C64", "", 7])
            yield (
                path,
                message(GOOD, ("inputs.0", dtype, shape, draw.randbytes(draw.choice([0, 4, 12, 24])))),
                wire.MEDIA,
            )
        else:
            length = draw.choice([0, 1, 2**32, 2**63, 2**64 - 1, draw.randrange(4096)])
            yield path, struct.pack("<Q", length) + draw.randbytes(draw.randrange(200)), wire.MEDIA


def _changed(draw: random.Random, value: Any) -> Any:
    """The document with a few parts replaced, removed or added."""
    if isinstance(value, dict):
        found = {name: _changed(draw, part) if draw.random() < 0.6 else part for name, part in value.items()}
        if draw.random() < 0.3:
            found[draw.choice(KEYS)] = draw.choice(JUNK)
        if found and draw.random() < 0.15:
            found.pop(draw.choice(sorted(found)))
        return found
    if isinstance(value, list):
        return [_changed(draw, part) if draw.random() < 0.5 else part for part in value]
    return draw.choice(JUNK) if draw.random() < 0.25 else value


def _spoilt(draw: random.Random, data: bytes) -> bytes:
    found = bytearray(data)
    for _ in range(draw.randrange(1, 6)):
        at = draw.randrange(len(found)) if found else 0
        what = draw.randrange(4)
        if what == 0 and found:
            found[at] = draw.randrange(256)
        elif what == 1:
            del found[at : at + draw.randrange(1, 40)]
        elif what == 2:
            found[at:at] = draw.randbytes(draw.randrange(1, 20))
        else:
            found[at:at] = found[at : at + draw.randrange(1, 60)]
    return bytes(found)


def fuzz(server: Server, count: int, seed: int) -> dict[int, int]:
    """Send malformed bodies; returns how many answers of each status there were."""
    import http.client

    found: dict[int, int] = {}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    bodies = malformed(seed)
    for _ in range(count):
        path, body, media = next(bodies)
        headers = {"Content-Type": media, "Authorization": f"Bearer {ALICE}"}
        try:
            connection.request("POST", path, body, headers)
            response = connection.getresponse()
            text = response.read()
        except (ConnectionError, http.client.HTTPException):  # it hangs up on bodies that it will not read
            connection.close()
            continue
        found[response.status] = found.get(response.status, 0) + 1
        assert response.status < 500, (path, media, body[:400], text[:800])
        if response.status >= 400:
            told = json.loads(text)
            assert told["status"] == response.status
            assert told["detail"]
    connection.close()
    return found


def test_malformed_bodies_never_break_the_service(server: Server) -> None:
    found = fuzz(server, 500, seed=1)
    assert found.get(422, 0) > 50
    assert found.get(400, 0) > 50
    assert server.ask("GET", "/readyz", token="")[0] in (200, 503)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_ten_thousand_malformed_bodies_never_break_the_service(server: Server) -> None:
    found = fuzz(server, 10_000, seed=2)
    assert sum(found.values()) > 9_000
    server.wait_until_ready()

"""Small work in one round trip: the same numbers as in one's own process, and errors that say what to do."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

import jacray
import numpy as np
import pytest
import torch
from jacray.http import wire
from jacray_workers.models import as_model
from safetensors.torch import save_file

from tests.serving import ALICE, Server

NET: dict[str, Any] = {
    "kind": "layers",
    "layers": [
        {"kind": "Linear", "in_features": 3, "out_features": 16},
        {"kind": "Tanh"},
        {"kind": "Linear", "in_features": 16, "out_features": 2},
    ],
    "seed": 3,
}
X = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
K = torch.randn(5, 2, generator=torch.Generator().manual_seed(2))


def known(**fields: Any) -> Any:
    return jacray.compute(as_model(NET), X, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "reverse"},
        {"method": "backward_loop", "weights": K, "returns": ["weighted_gradient", "outputs"]},
        {"method": "layerwise", "wrt": "params"},
        {"method": "layerwise", "wrt": "params", "form": "factors"},
        {"method": "reverse", "wrt": "params", "weights": K, "returns": ["weighted_gradient"], "reduction": "none"},
        {"method": "forward", "vectors": torch.ones(5, 3), "returns": ["jvp", "norms", "singular_values"]},
        {"method": "reverse", "returns": ["ntk", "gram", "mean_jacobian"]},
        {"method": "reverse", "weights": torch.stack([K, -K]), "returns": ["weighted_gradient"], "dtype": "float64"},
    ],
    ids=lambda fields: "-".join(map(str, fields.get("returns", [fields["method"], fields.get("form", "")]))),
)
def test_the_same_bits_as_in_process(server: Server, fields: dict[str, Any]) -> None:
    here = known(**fields)
    with server.client() as client:
        for _ in range(2):  # the second is warm
            there = client.compute(NET, X, **fields)
            assert there.names == here.names
            for name, value in here:
                _same(getattr(there, name), value)
            assert there.plan.method == here.plan.method
            assert there.receipt["plan_digest"] == there.plan.digest


def _same(a: Any, b: Any) -> None:
    if isinstance(b, dict):
        assert list(a) == list(b)
        for name in b:
            _same(a[name], b[name])
        return
    assert type(a) is type(b)
    assert torch.equal(torch.as_tensor(np.asarray(a)), torch.as_tensor(np.asarray(b)))


def test_pytrees_travel(server: Server) -> None:
    with server.client() as client:
        found = client.compute(NET, (X,), method="reverse")
        named = client.compute(NET, {"input": X}, method="reverse", wrt="inputs.input")
    assert type(found.jacobian) is tuple
    assert torch.equal(found.jacobian[0], known(method="reverse").jacobian)
    assert torch.equal(torch.as_tensor(named.jacobian), found.jacobian[0])


def test_plain_lists_are_a_batch(server: Server) -> None:
    spec = {"kind": "function", "expression": "2*(a[0]**2 + a[1])"}
    with server.client() as client:
        assert client.compute(spec, [[2.0, 4.0]], method="reverse").jacobian.tolist() == [[8.0, 2.0]]


def test_a_request_written_by_hand(server: Server) -> None:
    body = {
        "model": {"kind": "function", "expression": "2*(a[0]**2 + a[1])"}, "inputs": [[2, 4]],
        "request": {"returns": ["jacobian", "outputs"]},
    }  # fmt: skip
    status, headers, found = server.ask("POST", "/v1/compute", body)
    assert (status, headers["content-type"]) == (200, "application/json")
    assert found["results"] == {"jacobian": [[8.0, 2.0]], "outputs": [16.0]}
    assert found["receipt"]["plan"]["samples"] == 1


def test_nan_in_json_is_a_text(server: Server) -> None:
    body = {"model": {"kind": "function", "expression": "sqrt(a[0])"}, "inputs": [[-1.0], [4.0]]}
    status, _, found = server.ask("POST", "/v1/compute", body)
    assert status == 200
    assert found["results"]["jacobian"] == [["nan"], [0.25]]


@pytest.mark.parametrize(
    ("change", "key", "rule"),
    [
        ({"model": {"kind": "layres", "layers": []}}, "model.kind", "must be one of"),
        ({"model": {"kind": "import", "target": "os:system"}}, "model.kind", "may not be import"),
        ({"model": {**NET, "weights": "/etc/passwd"}}, "model.weights", "may not name a file of the service"),
        ({"model": {"kind": "huggingface", "path": "/etc"}}, "model.path", "may not name a file of the service"),
        ({"inputs": {"kind": "npy", "path": "/etc/passwd"}}, "inputs.path", "may not name a file of the service"),
        ({"inputs": {"kind": "npy", "path": "sha256:" + "0" * 64}}, "inputs.path", "names no upload of yours"),
        ({"inputs": {"file": "/etc/passwd"}}, "inputs.file", "must be a number"),
        ({"request": {"retruns": ["jacobian"]}}, "retruns", "is not a known name"),
        ({"request": {"wrt": "inputs.nobody"}}, "wrt", "names"),
        ({"inputs": [[1.0, 2.0]]}, "model", "raised"),
        ({"inputs": [[1.0, 2.0, "x"]]}, "inputs.0.2", "must be a number"),
        ({"modle": 1}, "modle", "is not a known name"),
        ({"options": {"batch": 3}}, "options", "may hold batch"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_key_rule_value_and_way_out(
    server: Server, change: dict[str, Any], key: str, rule: str
) -> None:
    body = {"model": NET, "inputs": X.tolist(), **change}
    status, headers, found = server.ask("POST", "/v1/compute", body)
    assert (status, headers["content-type"]) == (422, "application/problem+json")
    assert found["key"] == key
    assert rule in found["rule"]
    assert found["status"] == 422
    assert found["detail"].startswith(f"{key}: ")


def test_the_client_raises_what_one_would_meet_in_process(server: Server) -> None:
    with server.client() as client:
        with pytest.raises(jacray.RequestError, match="did you mean weights"):
            client.compute(NET, X, weihgts=K)
        with pytest.raises(jacray.RequestError, match="must have one of the shapes"):
            client.compute(NET, X, weights=torch.ones(7, 7), returns=["weighted_gradient"])
        with pytest.raises(jacray.InputError, match="must be made of tensors to travel"):
            client.compute(NET, {"a": object()})
        with pytest.raises(jacray.ModelError, match="must be"):
            client.compute(3, X)


def test_weights_of_a_spec_are_sent_ahead(server: Server, tmp_path: Path) -> None:
    module = as_model(NET)
    save_file({name: value + 1 for name, value in module.state_dict().items()}, tmp_path / "net.safetensors")
    spec = {**NET, "weights": str(tmp_path / "net.safetensors")}
    with server.client() as client:
        found = client.compute(spec, X, method="reverse")
    assert torch.equal(found.jacobian, jacray.jacobian(as_model(spec), X, method="reverse"))


def message(about: Any, *tensors: tuple[str, str, list[int], bytes]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"jacray": json.dumps(about)}}
    at = 0
    for name, dtype, shape, data in tensors:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(data for *_, data in tensors)


def test_bodies_that_are_no_safetensors_are_refused(server: Server) -> None:
    about = {"model": NET, "inputs": {"tensors": {"key": "inputs.0"}}}
    good = message(about, ("inputs.0", "F32", [1, 3], bytes(12)))
    ask = {"Content-Type": wire.MEDIA}
    assert server.ask("POST", "/v1/compute", good, headers=ask)[0] == 200
    for bad in (
        b"", good[:4], good[:30], good[:-1], good + b"x", b"\xff" * 8, struct.pack("<Q", 2) + b"[]",
        message(about, ("inputs.0", "F32", [1, 4], bytes(12))),
        message(about, ("inputs.0", "C64", [1, 3], bytes(12))),
        message(about, ("inputs.0", "F32", [1, -3], bytes(12))),
    ):  # fmt: skip
        status, headers, found = server.ask("POST", "/v1/compute", bad, headers=ask)
        assert (status, headers["content-type"]) == (400, "application/problem+json"), found
    missing = message(about, ("other", "F32", [1, 3], bytes(12)))
    assert server.ask("POST", "/v1/compute", missing, headers=ask)[2]["rule"] == "names a tensor that the body lacks"


def test_other_media_types_are_refused(server: Server) -> None:
    status, _, found = server.ask("POST", "/v1/compute", b"x", headers={"Content-Type": "application/x-pickle"})
    assert (status, found["key"]) == (415, "Content-Type")


def test_unaligned_tensors_and_bools_that_are_neither_are_read_safely(server: Server) -> None:
    about = {"model": {"kind": "function", "expression": "a[0]*3"}, "inputs": {"tensors": {"key": "x"}}}
    data = struct.pack("<d", 2.0)
    body = message(about, ("pad", "BOOL", [1], b"\x07"), ("x", "F64", [1, 1], data))
    status, _, found = server.ask(
        "POST", "/v1/compute", body, headers={"Content-Type": wire.MEDIA, "Accept": "application/json"}
    )
    assert (status, found["results"]["jacobian"]) == (200, [[3.0]])


WIDE = {"kind": "layers", "layers": [{"kind": "Linear", "in_features": 200, "out_features": 100}], "seed": 1}


@pytest.mark.parametrize("samples", [20, 200])
def test_a_large_answer_to_a_small_and_to_a_large_request_arrives_whole(server: Server, samples: int) -> None:
    x = torch.randn(samples, 200)
    here = jacray.jacobian(as_model(WIDE), x, method="reverse")
    with server.client() as client:
        for _ in range(2):
            _same(client.compute(WIDE, x, method="reverse").jacobian, here)
    assert _left(server) == []


def test_a_large_answer_that_nobody_waits_for_leaves_nothing(server: Server) -> None:
    about = {"model": WIDE, "inputs": {"tensors": {"key": "inputs.0"}}, "request": {"method": "reverse"}}
    body = message(about, ("inputs.0", "F32", [20, 200], bytes(16_000)))
    head = f"POST /v1/compute HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {ALICE}\r\n"
    for seconds in (0, 0, 0.02, 0.1, 0.5):
        with server.socket() as connection:
            kind = f"Content-Type: {wire.MEDIA}\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(f"{head}{kind}".encode() + body)
            time.sleep(seconds)
    with server.client() as client:
        client.compute(WIDE, torch.randn(20, 200), method="reverse")
    assert _left(server) == []


def _left(server: Server) -> list[str]:
    """Files that the service still keeps for an answer, after it had time to send all of them."""
    until = time.monotonic() + 10
    while (found := [path.name for path in server.spool.glob("answer-*")]) and time.monotonic() < until:
        time.sleep(0.05)
    return found

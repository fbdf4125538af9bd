"""What somebody sends who means harm: it is refused with a problem, harms nobody else, and leaves the service whole."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from jacray.http import wire
from jacray.http.policy import Policy
from jacray_workers.errors import InputError, ModelError
from safetensors.torch import save

from tests.service.http.test_http_compute import NET
from tests.serving import ALICE, BOB, Server

HEAD = f"Host: localhost\r\nAuthorization: Bearer {ALICE}\r\nContent-Type: application/json\r\n"
WORK = {"model": NET, "inputs": [[1, 2, 3]]}


def talk(server: Server, sent: bytes) -> tuple[int, bytes]:
    """Bytes as they are, and what comes back until the service hangs up: its status, or 0, and all of it."""
    with server.socket() as connection:
        try:
            connection.sendall(sent)
            found = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        except ConnectionError:
            return 0, b""
    return int(found.split(b" ", 2)[1]), found


@pytest.mark.parametrize(
    "inputs",
    [
        "[[1e999, 2, 3]]",
        "[[-1e999, 2, 3]]",
        "[[NaN, 2, 3]]",
        "[[1" + "0" * 5000 + ", 2, 3]]",
        "[" * 129 + "]" * 129,
        "[" * 980 + "]" * 980 + " " * 70_000,  # read in a thread, where more fits than elsewhere
        '{"a":' * 980 + "1" + "}" * 980 + " " * 70_000,
        "[" * 100_000,
    ],
    ids=lambda text: f"{text[:8]} {len(text)}",
)
def test_numbers_and_nesting_that_nobody_could_pass_on_are_refused(server: Server, inputs: str) -> None:
    body = json.dumps(WORK).replace("[[1, 2, 3]]", inputs).encode()
    for path in ("/v1/compute", "/v1/jobs"):
        status, _, found = server.ask("POST", path, body, headers={"Content-Type": "application/json"})
        assert (status, found["key"]) == (400, "body")
    assert server.ask("POST", "/v1/compute", WORK)[0] == 200


def test_brackets_within_texts_are_no_nesting() -> None:
    text = json.dumps({"a\\[": "[{" * 500 + '"\\', "b": [[1.5, -2e-3]]})
    assert wire.load(text, "body") == json.loads(text)


def test_the_message_of_tensors_is_read_as_strictly(server: Server) -> None:
    for about in ('{"request":{"top_k":1e999}}', "[" * 200 + "]" * 200, '{"a":1,"a":2}'):
        header = json.dumps({"__metadata__": {"jacray": about}}).encode()
        body = len(header).to_bytes(8, "little") + header
        assert server.ask("POST", "/v1/compute", body, headers={"Content-Type": wire.MEDIA})[0] == 400


@pytest.mark.parametrize("path", ["a\0b.npy", "\ud800.npy", "../a.npy", "/etc/passwd"])
def test_paths_that_are_none_are_refused(tmp_path: Path, path: str) -> None:
    def nothing(digest: str, key: str) -> Path:
        raise FileNotFoundError(digest, key)

    with pytest.raises(InputError) as refused:
        Policy(nothing, tmp_path).inputs({"kind": "npy", "path": path})
    assert refused.value.argument == "inputs.path"
    with pytest.raises(ModelError):
        Policy(nothing, tmp_path).model({"kind": "graph", "path": path})


@pytest.mark.parametrize("name", ["[", "[::1", "a]", "[x]", "127.0.0.1@evil.example", ""])
def test_hosts_and_origins_that_are_none_are_refused(server: Server, name: str) -> None:
    assert server.ask("GET", "/v1/jobs", headers={"Host": name})[0] == 403
    assert server.ask("POST", "/v1/compute", WORK, headers={"Origin": f"http://{name}"})[0] == 403


@pytest.mark.parametrize(
    "fields",
    [
        "Content-Length: 2\r\nContent-Length: 3\r\n",
        "Content-Length: 2\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\r\nContent-Length: 2\r\n",
        "Transfer-Encoding: xchunked\r\n",
        "Content-Length: -1\r\n",
        "Content-Length: 99999999999999999999999\r\n",
        "X : y\r\nContent-Length: 2\r\n",
    ],
)
def test_heads_that_two_readers_would_read_differently_are_refused(server: Server, fields: str) -> None:
    status, found = talk(server, f"POST /v1/compute HTTP/1.1\r\n{HEAD}{fields}\r\n{{}}".encode())
    assert status == 400
    head, _, text = found.partition(b"\r\n\r\n")
    assert b"content-type: application/problem+json" in head
    assert json.loads(text)["status"] == 400, "in the one shape of errors"


def test_fields_after_a_body_change_nothing_and_are_bounded(server: Server) -> None:
    start = "POST /v1/compute HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    body = "Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n2\r\n{}\r\n0\r\n"
    trailer = f"Authorization: Bearer {ALICE}\r\n"
    assert talk(server, f"{start}{body}{trailer}\r\n".encode())[0] == 401
    assert talk(server, f"{start}{trailer}{body}\r\n".encode())[0] == 422
    large = f"{start}{trailer}{body}X: {'y' * 3_000_000}".encode()
    assert talk(server, large)[0] == 0, "it hangs up"
    size = f"{start}{trailer}{body}".replace("\r\n2\r\n", f"\r\n2;{'y' * 3_000_000}\r\n").encode()
    assert talk(server, size)[0] == 0
    small = "".join(f"1\r\n{c}\r\n" for c in json.dumps(WORK)) + "0\r\n\r\n"
    whole = f"{start}{trailer}Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n{small}"
    assert talk(server, whole.encode())[0] == 200, "the smallest chunks are slow, and no fault"


def test_the_head_of_a_stream_ends_at_once(server: Server) -> None:
    wide = {"kind": "layers", "layers": [{"kind": "Linear", "in_features": 600, "out_features": 600}] * 3, "seed": 0}
    with server.client() as client:
        job = client.submit(wide, torch.ones(1000, 600), method="backward_loop", chunk_size=10)
        connection = server.connection()
        connection.request("HEAD", f"/v1/jobs/{job.id}/events", headers={"Authorization": f"Bearer {ALICE}"})
        assert connection.getresponse().read() == b""
        connection.request("GET", f"/v1/jobs/{job.id}", headers={"Authorization": f"Bearer {ALICE}"})
        assert json.loads(connection.getresponse().read())["state"] in ("queued", "running")
        connection.close()
        job.cancel()


def test_another_persons_job_is_no_job_in_any_operation(server: Server) -> None:
    identity = server.ask("POST", "/v1/jobs", WORK)[2]["id"]
    assert server.ask("GET", f"/v1/jobs/{identity}?wait=60")[2]["state"] == "done"
    rests = ("", "/plan", "/spec", "/receipt", "/events", "/result", "/result?array=jacobian")
    every = [*(("GET", rest) for rest in rests), ("HEAD", "/result"), ("POST", "/cancel"), ("DELETE", "")]
    for method, rest in every:
        theirs = server.ask(method, f"/v1/jobs/{identity}{rest}", token=BOB)
        nobodys = server.ask(method, f"/v1/jobs/{'0' * 12}{rest}", token=BOB)
        assert theirs[0] == nobodys[0] == 404, (method, rest)
        assert json.dumps(theirs[2], default=str).replace(identity, "0" * 12) == json.dumps(nobodys[2], default=str)
    assert server.ask("GET", f"/v1/jobs/{identity}")[2]["state"] == "done"


def test_an_upload_that_one_forgets_while_another_keeps_it_stays(server: Server) -> None:
    media = {"Content-Type": wire.MEDIA}
    for turn in range(20):
        body = save({"x": torch.full((1, 3), float(turn))})
        digest = server.ask("POST", "/v1/inputs", body, headers=media)[2]["digest"]
        with ThreadPoolExecutor(2) as pool:
            gone = pool.submit(server.ask, "DELETE", f"/v1/inputs/{digest}")
            kept = pool.submit(server.ask, "POST", "/v1/inputs", body, token=BOB, headers=media)
        assert (gone.result()[0], kept.result()[0]) == (204, 201)
        work = {"model": NET, "inputs": {"digest": digest}}
        assert server.ask("POST", "/v1/compute", work, token=BOB)[0] == 200

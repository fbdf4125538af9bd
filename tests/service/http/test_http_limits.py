"""Who gets in, how much anyone may ask, and what becomes of slow and half-open clients."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jacray
import pytest
import torch
from jacray.http import wire
from jacray_workers.models import as_model
from safetensors.torch import save

from tests.service.http.test_http_compute import NET, message
from tests.serving import ALICE, BOB, Server, serving

LIMITS = {
    "body_bytes": 300_000, "json_bytes": 20_000, "json_numbers": 50, "stored_bytes": 300_000, "result_bytes": 1_000_000,
    "job_bytes": 2_000_000, "jobs_per_user": 2, "running_jobs": 1, "compute_seconds": 8, "job_seconds": 6,
    "header_seconds": 1, "idle_seconds": 2, "connections": 50, "connections_per_user": 20,
    "kept_jobs": 3,
}  # fmt: skip
LONG = {"kind": "random", "shape": [20_000, 64]}
DEEP = {"kind": "layers", "layers": [{"kind": "Linear", "in_features": 64, "out_features": 64}, {"kind": "Tanh"}] * 30}


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    limits = [f"--limit={name}={number}" for name, number in LIMITS.items()]
    with serving(tmp_path_factory.mktemp("strict") / "state", "--workers", "1", *limits) as found:
        yield found


def test_no_token_no_entry(server: Server) -> None:
    for token in ("", "wrong", ALICE[:-1], ALICE + "x", "alice"):
        for method, path in (("GET", "/v1/jobs"), ("POST", "/v1/compute"), ("GET", "/metrics"), ("GET", "/v1/models")):
            status, headers, found = server.ask(method, path, token=token)
            assert (status, headers["www-authenticate"]) == (401, "Bearer"), path
            assert found["key"] == "Authorization"
    basic = {"Authorization": f"Basic {ALICE}"}
    assert server.ask("GET", "/v1/jobs", token="", headers=basic)[0] == 401
    assert server.ask("GET", "/healthz", token="")[0] == 200
    assert server.ask("GET", "/openapi.json", token="")[0] == 200


def test_tokens_are_never_written_down(server: Server) -> None:
    server.ask("GET", "/v1/jobs", token="a-token-that-is-wrong-but-long")
    server.ask("GET", "/v1/jobs")
    said = server.said()
    assert ALICE not in said
    assert "a-token-that-is-wrong" not in said
    state = b"".join(path.read_bytes() for path in server.state.rglob("*") if path.is_file())
    assert ALICE.encode() not in state


def test_pages_of_other_sites_are_refused(server: Server) -> None:
    foreign = {"Host": "evil.example"}
    assert server.ask("GET", "/v1/jobs", headers=foreign)[0] == 403
    origin = {"Origin": "http://evil.example"}
    assert server.ask("POST", "/v1/compute", {}, headers=origin)[0] == 403
    assert server.ask("GET", "/v1/jobs", headers={"Origin": f"http://127.0.0.1:{server.port}"})[0] == 200


def test_unknown_paths_and_methods_have_the_same_shape(server: Server) -> None:
    status, headers, found = server.ask("GET", "/v1/nothing")
    assert (status, headers["content-type"], found["status"]) == (404, "application/problem+json", 404)
    status, headers, found = server.ask("PATCH", "/v1/jobs")
    assert (status, headers["content-type"]) == (405, "application/problem+json")
    assert "POST" in headers["allow"]


def test_uploads_belong_to_their_user(server: Server) -> None:
    body = save({"weight": torch.ones(3)})
    media = {"Content-Type": wire.MEDIA}
    status, headers, found = server.ask("POST", "/v1/inputs", body, headers=media)
    assert (status, headers["location"]) == (201, f"/v1/inputs/{found['digest']}")
    again = server.ask("POST", "/v1/inputs", body, headers=media)
    assert (again[0], again[2]["digest"]) == (200, found["digest"])
    path = headers["location"]
    assert server.ask("GET", path)[2]["bytes"] == len(body)
    assert server.ask("GET", path, token=BOB)[0] == 404
    assert server.ask("DELETE", path, token=BOB)[0] == 404
    work = {"model": {"kind": "function", "expression": "a[0]*2"}, "inputs": {"digest": found["digest"]}}
    assert server.ask("POST", "/v1/compute", work, token=BOB)[2]["rule"] == "names no upload of yours"
    # bob's own copy is his, and outlives alice's
    assert server.ask("POST", "/v1/inputs", body, token=BOB, headers=media)[0] == 201
    assert server.ask("DELETE", path)[0] == 204
    assert server.ask("GET", path)[0] == 404
    assert server.ask("GET", path, token=BOB)[0] == 200
    spec = {
        "model": {"kind": "function", "expression": "a*2"},
        "inputs": {"kind": "safetensors", "path": found["digest"]},
    }
    status, _, answer = server.ask("POST", "/v1/compute", spec, token=BOB)
    assert (status, answer["results"]["jacobian"]) == (200, [2.0, 2.0, 2.0])


def test_inputs_that_were_sent_once_can_be_named(server: Server) -> None:
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(4))
    found = server.ask("POST", "/v1/inputs", save({"x": x}), headers={"Content-Type": wire.MEDIA})[2]
    with server.client() as client:
        small = client.compute(NET, {"digest": found["digest"]}, method="reverse")
        job = client.submit(NET, {"digest": found["digest"]}, method="reverse")
        here = jacray.jacobian(as_model(NET), x, method="reverse")
        assert torch.equal(small.jacobian, here)
        assert torch.equal(job.result(timeout=60).jacobian, here)


@pytest.mark.parametrize("path", ["/v1/compute", "/v1/jobs", "/v1/inputs"])
def test_bodies_that_are_too_large_are_refused_as_they_come(strict: Server, path: str) -> None:
    media = {"Content-Type": wire.MEDIA}
    status, _, found = strict.ask("POST", path, bytes(300_001), headers=media)
    assert (status, found["key"]) == (413, "body")
    connection = http.client.HTTPConnection("127.0.0.1", strict.port, timeout=30)
    connection.request("POST", path, iter([bytes(60_000)] * 6), {**media, "Authorization": f"Bearer {ALICE}"},
                       encode_chunked=True)  # fmt: skip
    assert connection.getresponse().status == 413
    connection.close()
    assert strict.ask("POST", path, b"[" * 20_001, headers={"Content-Type": "application/json"})[0] in (413, 415)


def test_results_that_are_too_large_are_refused_before_they_are_computed(strict: Server) -> None:
    spec = {"kind": "layers", "layers": [{"kind": "Linear", "in_features": 500, "out_features": 600}]}
    with strict.client() as client:
        with pytest.raises(jacray.BudgetError, match="submit it as a job"):
            client.compute(spec, torch.zeros(1, 500))
        with pytest.raises(jacray.BudgetError, match="must give a result of at most"):
            client.submit(spec, torch.zeros(2, 500))
    body = {"model": NET, "inputs": torch.zeros(9, 3).tolist()}
    status, _, found = strict.ask("POST", "/v1/compute", body)
    assert (status, found["key"]) == (422, "Accept")


def test_a_user_keeps_no_more_than_he_may(strict: Server) -> None:
    media = {"Content-Type": wire.MEDIA}
    first = strict.ask("POST", "/v1/inputs", save({"x": torch.zeros(40_000)}), headers=media)
    assert first[0] == 201
    second = strict.ask("POST", "/v1/inputs", save({"x": torch.ones(40_000)}), headers=media)
    assert (second[0], second[2]["way_out"]) == (413, "delete uploads that are no longer needed")
    assert strict.ask("DELETE", f"/v1/inputs/{first[2]['digest']}")[0] == 204


def test_work_that_takes_too_long_is_ended_and_the_service_goes_on(strict: Server) -> None:
    with strict.client() as client:
        with pytest.raises(jacray.JobError, match="must be computed within 8 s"):
            client.compute(DEEP, LONG, method="backward_loop", chunk_size=1, returns=["norms"])
        strict.wait_until_ready()
        assert client.compute(NET, torch.zeros(1, 3)).jacobian.shape == (1, 2, 3)
        job = client.submit(DEEP, LONG, method="backward_loop", chunk_size=1, returns=["norms"])
        with pytest.raises(jacray.JobError, match="must be computed within 6 s"):
            job.result(timeout=60)
        assert job.status().state == "failed"


def test_a_user_with_too_many_jobs_is_told_to_wait_and_others_are_not(strict: Server) -> None:
    with strict.client() as alice, strict.client(BOB) as bob:
        slow = {"method": "backward_loop", "chunk_size": 1, "returns": ["norms"], "verify": False}
        jobs = [alice.submit(DEEP, {**LONG, "seed": i}, **slow) for i in range(2)]
        body = {"model": NET, "inputs": [[0, 0, 0]]}
        status, headers, found = strict.ask("POST", "/v1/jobs", body)
        assert (status, found["key"]) == (429, "jobs")
        assert int(headers["retry-after"]) > 0
        his = bob.submit(NET, torch.zeros(1, 3))
        for job in jobs:
            job.cancel()
        assert his.result(timeout=60).jacobian.shape == (1, 2, 3)
        assert all(job.wait(60) for job in jobs)
        assert {job.status().state for job in jobs} <= {"cancelled", "failed"}


def test_the_latest_jobs_are_kept(strict: Server) -> None:
    with strict.client(BOB) as client:
        jobs = []
        for i in range(5):
            jobs.append(client.submit(NET, torch.full((1, 3), float(i))))
            jobs[-1].result(timeout=60)
        for job in jobs[:2]:
            _until(lambda job=job: strict.ask("GET", f"/v1/jobs/{job.id}", token=BOB)[0] == 404)
        kept = [job["id"] for job in client.jobs()]
        assert kept[0] == jobs[-1].id
        _until(lambda: len(client.jobs()) <= 3)
        _until(lambda: len(list((strict.state / "jobs").iterdir())) <= 3 + 3)


def _until(true: Any, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.05)


def _cut(connection: socket.socket) -> bool:
    """Whether the service ends the connection by itself."""
    connection.settimeout(20)
    try:
        while True:
            if not connection.recv(1 << 16):
                return True
    except ConnectionError:
        return True
    except TimeoutError:
        return False


def test_half_open_and_slow_clients_are_cut_off(strict: Server) -> None:
    silent, trickling, endless = strict.socket(), strict.socket(), strict.socket()
    trickling.sendall(b"GET /healthz HTTP/1.1\r\nHost: local")
    endless.sendall(b"GET /healthz HTTP/1.1\r\nX: " + b"x" * 100_000)
    stuck = strict.socket()
    head = f"POST /v1/compute HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {ALICE}\r\n"
    stuck.sendall(f"{head}Content-Type: {wire.MEDIA}\r\nContent-Length: 1000\r\n\r\nabc".encode())
    stuck.settimeout(20)
    answer = stuck.recv(1 << 16)
    assert answer.startswith(b"HTTP/1.1 408")
    assert _cut(stuck)
    assert _cut(silent)
    assert _cut(trickling)
    assert _cut(endless)
    for connection in (silent, trickling, endless, stuck):
        connection.close()
    assert strict.ask("GET", "/healthz", token="")[0] == 200


def test_who_does_not_take_his_answer_is_cut_off(server: Server, tmp_path: Path) -> None:
    limits = ["--limit=idle_seconds=1"]
    with serving(tmp_path / "state", "--workers", "1", *limits) as impatient:
        lazy = socket.socket()
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect(("127.0.0.1", impatient.port))
        about = {"model": {"kind": "layers", "layers": [{"kind": "Linear", "in_features": 500, "out_features": 4000}]},
                 "inputs": {"tensors": {"key": "inputs.0"}}}  # fmt: skip
        body = message(about, ("inputs.0", "F32", [4, 500], bytes(8000)))
        head = f"POST /v1/compute HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {ALICE}\r\n"
        lazy.sendall(f"{head}Content-Type: {wire.MEDIA}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        time.sleep(4)
        lazy.settimeout(20)
        size = 0
        with lazy:
            try:
                while piece := lazy.recv(1 << 20):
                    size += len(piece)
            except ConnectionError:
                pass
        assert size < 4 * 500 * 4000 * 4
        assert impatient.ask("GET", "/healthz", token="")[0] == 200


def test_too_many_connections_are_refused_and_do_no_harm(strict: Server) -> None:
    many = []
    for _ in range(60):
        try:
            many.append(strict.socket())
        except OSError:
            break
    time.sleep(2.5)
    for connection in many:
        connection.close()
    assert strict.ask("GET", "/healthz", token="")[0] == 200


def test_nobody_holds_all_connections(strict: Server) -> None:
    def ask(connection: http.client.HTTPConnection, token: str, path: str = "/v1/models") -> tuple[int, Any]:
        connection.request("GET", path, headers={"Authorization": f"Bearer {token}"})
        answer = connection.getresponse()
        return answer.status, (answer.headers, json.loads(answer.read()))

    with contextlib.ExitStack() as stack:
        many = [stack.enter_context(contextlib.closing(strict.connection())) for _ in range(24)]
        found = [ask(connection, ALICE) for connection in many]
        assert [status for status, _ in found] == [200] * 20 + [429] * 4
        headers, told = found[-1][1]
        assert (told["key"], headers["retry-after"], headers["connection"]) == ("connections", "1", "close")
        assert ask(many[0], ALICE)[0] == 200, "on those that she has she may go on"
        bob = stack.enter_context(contextlib.closing(strict.connection()))
        assert ask(bob, BOB)[0] == 200
        assert ask(many[1], BOB)[0] == 200, "a connection belongs to who asked on it last"
        assert ask(stack.enter_context(contextlib.closing(strict.connection())), ALICE)[0] == 200
    assert strict.ask("GET", "/v1/models")[0] == 200


def test_small_work_and_states_count_as_other_requests_do(strict: Server) -> None:
    with contextlib.ExitStack() as stack:
        many = [stack.enter_context(contextlib.closing(strict.connection())) for _ in range(21)]
        body = message(
            {"model": NET, "inputs": {"tensors": {"key": "inputs.0"}}}, ("inputs.0", "F32", [1, 3], bytes(12))
        )
        headers = {"Authorization": f"Bearer {ALICE}", "Content-Type": wire.MEDIA}
        statuses = []
        for connection in many:
            connection.request("POST", "/v1/compute", body, headers)
            answer = connection.getresponse()
            answer.read()
            statuses.append(answer.status)
        assert statuses == [200] * 20 + [429]


def _healthy(connection: socket.socket) -> bool:
    try:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        return connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
    except ConnectionError:
        return False


def test_who_shows_no_token_does_not_hold_all_connections(strict: Server) -> None:
    with contextlib.ExitStack() as stack:
        answered = [_healthy(stack.enter_context(strict.socket())) for _ in range(30)]
        assert answered == [True] * 20 + [False] * 10
    assert strict.ask("GET", "/healthz", token="")[0] == 200


def test_a_process_that_dies_is_replaced(strict: Server) -> None:
    import os
    import signal

    import psutil

    assert strict.process is not None
    children = psutil.Process(strict.process.pid).children()
    compute = [child for child in children if "jacray.http.compute" in child.cmdline()]
    assert len(compute) == 1
    os.kill(compute[0].pid, signal.SIGKILL)
    with strict.client() as client:
        assert client.compute(NET, torch.zeros(1, 3)).jacobian.shape == (1, 2, 3)


def test_health_is_answered_while_everything_is_busy(server: Server) -> None:
    with server.client() as client:
        stop = threading.Event()

        def load() -> None:
            while not stop.is_set():
                client.compute(DEEP, torch.randn(30, 64), method="backward_loop", chunk_size=1, returns=["norms"])

        threads = [threading.Thread(target=load) for _ in range(3)]
        for thread in threads:
            thread.start()
        answers = [server.ask("GET", "/healthz", token="")[0] for _ in range(50)]
        stop.set()
        for thread in threads:
            thread.join()
        assert answers == [200] * 50


def test_metrics_tell_what_happened(server: Server) -> None:
    text = server.ask("GET", "/metrics")[2].decode()
    for name in ("jacray_requests_total", "jacray_batch_requests_count", "jacray_queue_depth", "jacray_cache_total",
                 "jacray_station_seconds_bucket", "jacray_bytes_total"):  # fmt: skip
        assert name in text, name
    assert json.dumps(text).count("alice") == 0

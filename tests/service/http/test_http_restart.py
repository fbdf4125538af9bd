"""A service that is killed, and one that is stopped: what was accepted is done by the next."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jacray
import psutil
import pytest
import torch
from jacray.http import wire
from jacray_workers.models import as_model
from safetensors.torch import save

from tests.service.http.test_http_compute import NET
from tests.service.http.test_http_limits import DEEP
from tests.serving import ALICE, Server

SLOW: dict[str, Any] = {
    "method": "backward_loop", "chunk_size": 4, "returns": ["norms", "jacobian"], "verify": False,
}  # fmt: skip
MANY = {"kind": "random", "shape": [120, 64], "seed": 3}


def started(client: jacray.Client, server: Server, samples: int = 120) -> Any:
    job = client.submit(DEEP, {**MANY, "shape": [samples, 64]}, **SLOW)
    until = time.monotonic() + 100
    while job.status().state == "queued":
        assert time.monotonic() < until, server.said()
        time.sleep(0.02)
    return job


def children(server: Server) -> list[psutil.Process]:
    assert server.process is not None
    return psutil.Process(server.process.pid).children(recursive=True)


def test_a_killed_service_takes_its_jobs_up_again(tmp_path: Path) -> None:
    server = Server(tmp_path / "state", ("--workers", "1")).start()
    left = children(server)
    try:
        with server.client(retries=40) as client:
            done = client.submit(NET, torch.ones(2, 3), method="reverse")
            done.result(timeout=100)
            job, queued = started(client, server), client.submit(NET, torch.zeros(4, 3), method="reverse")
            found: list[Any] = []
            waiter = threading.Thread(target=lambda: found.append(job.result(timeout=200)))
            waiter.start()
            upload = server.socket()
            body = save({"x": torch.ones(5_000_000)})
            upload.sendall(
                f"POST /v1/inputs HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {ALICE}\r\n"
                f"Content-Type: {wire.MEDIA}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
                + body[:8_000_000]
            )
            time.sleep(0.3)
            port = server.port
            server.stop(signal.SIGKILL)
            upload.close()
            assert not psutil.wait_procs(left, timeout=30)[1], "no process outlives the service"
            server.start(port)
            assert list((server.state / "incoming").iterdir()) == []
            waiter.join(200)
            here = jacray.compute(as_model(DEEP), _inputs(), **SLOW)
            torch.testing.assert_close(found[0].jacobian, here.jacobian)
            assert queued.result(timeout=100).jacobian.shape == (4, 2, 3)
            assert client.job(done.id).result().jacobian.shape == (2, 2, 3)
            sent = server.ask("POST", "/v1/inputs", body, headers={"Content-Type": wire.MEDIA})
            assert sent[0] == 201
    finally:
        if server.process is not None and server.process.poll() is None:
            assert server.stop() == 0


def _inputs() -> torch.Tensor:
    from jacray_workers import sources
    from jacray_workers.sources.specs import Random

    loaded = sources.load(Random(shape=(120, 64), seed=3), Path())
    return torch.as_tensor(loaded.inputs)


@pytest.mark.slow
def test_a_stopped_service_ends_in_order_and_leaves_what_it_could_not_finish(tmp_path: Path) -> None:
    server = Server(tmp_path / "state", ("--workers", "1", "--limit", "stop_seconds=1")).start()
    left = children(server)
    with server.client() as client:
        job = started(client, server, 10_000)
        assert server.stop() == 0
    assert not psutil.wait_procs(left, timeout=30)[1]
    assert "Traceback" not in server.said()
    server.start()
    try:
        with server.client() as client:
            again = client.job(job.id)
            assert again.status().state in ("queued", "running")
            again.cancel()
            assert again.wait(60)
    finally:
        server.stop()


def runner(server: Server, other_than: int = 0) -> int:
    """The process that runs jobs, once there is another one than before."""
    until = time.monotonic() + 100
    while True:
        found = [child.pid for child in children(server) if "jacray.http.runner" in _words(child)]
        if found and found[0] != other_than:
            return found[0]
        assert time.monotonic() < until, server.said()
        time.sleep(0.02)


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has just ended
        return []


def kill_runner(server: Server) -> int:
    pid = runner(server)
    os.kill(pid, signal.SIGKILL)
    return pid


def until(job: Any, server: Server, holds: Callable[[Any], bool]) -> None:
    """Ask for a job's state until something holds of it."""
    end = time.monotonic() + 100
    while not holds(job.status()):
        assert time.monotonic() < end, (job.status(), server.said())
        time.sleep(0.005)


SMALL: dict[str, Any] = {"method": "reverse", "verify": False}


def test_whatever_its_jobs_were_doing_when_the_runner_was_killed_they_all_end(tmp_path: Path) -> None:
    server = Server(tmp_path / "state", ("--workers", "1", "--limit", "running_jobs=2")).start()
    try:
        with server.client() as client:
            running, planning = started(client, server), client.submit(NET, torch.ones(3, 3), **SMALL)
            waiting = [client.submit(NET, torch.full((2, 3), float(i)), **SMALL) for i in range(3)]
            waiting[2].cancel()
            killed = kill_runner(server)
            end = time.monotonic() + 30
            while "the process that runs jobs ended" not in server.said():
                assert time.monotonic() < end
            # It is gone, and the next is not there yet: what comes now must not be given to the one that is gone.
            late = [client.submit(NET, torch.full((2, 3), 7.0), **SMALL) for _ in range(3)]
            late[2].cancel()
            running.status()
            for job in (running, planning, *waiting[:2], *late[:2]):
                job.result(timeout=100)
            for job in (waiting[2], late[2]):
                assert job.wait(100)
                assert job.status().state in ("cancelled", "done")
            assert runner(server) != killed
            here = jacray.jacobian(as_model(NET), torch.full((2, 3), 7.0), method="reverse")
            assert all(torch.equal(job.result().jacobian, here) for job in late[:2])
            assert running.status().samples_done == 120
    finally:
        server.stop()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["starting", "running", "committing", "cancelled", "streaming", "twice"])
def test_a_killed_runner_costs_its_jobs_nothing_but_time(tmp_path: Path, moment: str) -> None:
    server = Server(tmp_path / "state", ("--workers", "1")).start()
    try:
        with server.client() as client:
            done = client.submit(DEEP, MANY, **{**SLOW, "seed": 1})
            here = done.result(timeout=200)
            job = client.submit(DEEP, MANY, **SLOW)
            if moment in ("running", "cancelled", "twice"):
                until(job, server, lambda status: status.state == "running" and status.samples_done > 10)
            if moment == "committing":
                until(job, server, lambda status: status.samples_done == 120)
            if moment == "cancelled":
                job.cancel()
            if moment == "streaming":  # of a job that is done: the service streams it, whatever becomes of the runner
                found: list[Any] = []
                reader = threading.Thread(target=lambda: found.append(client.job(done.id).result()))
                reader.start()
            killed = kill_runner(server)
            if moment == "twice":
                again = runner(server, other_than=killed)
                until(job, server, lambda status: status.state == "running")
                os.kill(again, signal.SIGKILL)
            if moment == "streaming":
                reader.join(100)
                assert torch.equal(found[0].jacobian, here.jacobian)
            assert job.wait(200)
            if moment == "cancelled":
                assert job.status().state == "cancelled"
            else:
                assert torch.equal(job.result().jacobian, here.jacobian)
                assert job.status().samples_done == 120
            late = client.submit(NET, torch.ones(2, 3), **SMALL)
            assert late.result(timeout=100).jacobian.shape == (2, 2, 3)
    finally:
        server.stop()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_twenty_kills_lose_nothing(tmp_path: Path) -> None:
    server = Server(tmp_path / "state", ("--workers", "1")).start()
    port, keys = server.port, [f"job-{i}" for i in range(20)]
    with server.client(retries=60) as client:
        jobs = []
        for i, key in enumerate(keys):
            killer = threading.Timer(0.05 * (i % 7), lambda: server.stop(signal.SIGKILL))
            killer.start()
            sent: list[Any] = []
            sender = threading.Thread(
                target=lambda key=key, sent=sent, i=i: sent.append(
                    client.submit(NET, torch.full((2, 3), float(i)), key=key, method="reverse")
                )
            )
            sender.start()
            killer.join()
            server.start(port)
            sender.join(120)
            jobs.append(sent[0])
        assert len({job.id for job in jobs}) == len(jobs)
        for i, job in enumerate(jobs):
            here = jacray.jacobian(as_model(NET), torch.full((2, 3), float(i)), method="reverse")
            assert torch.equal(job.result(timeout=100).jacobian, here)
    server.stop()

"""The service's own figures: real servers, every client that makes load in a process of its own."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jacray
import torch
from torch import nn

from benchmarks.service.load import Counted, Load, loading
from benchmarks.service.peers import timed
from benchmarks.service.serving import address, files, get, serving, small_work

CLIENTS, GENERATORS = 64, 2
PROBES = 50.0  # health checks a second
SETTLE = 0.5
WARMING = 2  # times as long: until every process has planned batches of every size
ASKED = 1000.0  # requests a second of health and status


def linear(inputs: int, outputs: int) -> dict[str, Any]:
    """A layer of a spec."""
    return {"kind": "Linear", "in_features": inputs, "out_features": outputs}


def layers(*parts: dict[str, Any]) -> dict[str, Any]:
    """A spec of a net."""
    return {"kind": "layers", "layers": list(parts)}


TANH = {"kind": "Tanh"}
SMALL = layers(linear(3, 64), TANH, linear(64, 2))
WIDE = layers(linear(200, 1000))
JOB = layers(linear(64, 512), TANH, linear(512, 512), TANH, linear(512, 16))
JOB_FIELDS: dict[str, Any] = {"returns": ["norms"], "method": "reverse", "chunk_size": 32, "verify": False}
SIDE = 64
DEPTHS = {"small": 24, "dear": 240}


@dataclass(frozen=True)
class Effort:
    """How long is measured.

    Attributes:
        calls: of the small gradient; of everything else in proportion.
        rounds: of each side of a ratio, turn by turn.
        seconds: of each load.
        samples: of the job that runs under load.
    """

    calls: int = 300
    rounds: int = 3
    seconds: float = 2.0
    samples: int = 12_000


FULL, QUICK = Effort(), Effort(calls=20, rounds=1, seconds=0.5, samples=1000)


def measure(effort: Effort) -> dict[str, Any]:
    """All of it, as plain data; times in seconds."""
    return {"latency": latency(effort), **batching(effort), "job": undisturbed(effort)}


def latency(effort: Effort) -> dict[str, list[float]]:
    """Round trips of one client that nobody else competes with."""
    one, k_one = torch.randn(1, 3), torch.randn(1, 2)
    x, k = torch.randn(8, 3), torch.randn(8, 2)
    many, wide = torch.randn(512, 3), torch.randn(100, 200)
    asked: dict[str, Any] = {"returns": ["weighted_gradient"]}
    with serving("--workers", "2") as url, jacray.Client(url) as client:
        calls: dict[str, tuple[Callable[[], Any], int]] = {
            "gradient": (lambda: client.compute(SMALL, x, weights=k, **asked), effort.calls),
            "gradient of one": (lambda: client.compute(SMALL, one, weights=k_one, **asked), effort.calls),
            "jacobians": (lambda: client.compute(SMALL, many), effort.calls // 3),
            "result": (lambda: client.compute(WIDE, wide), max(3, effort.calls // 20)),
        }
        return {name: timed(call, count) for name, (call, count) in calls.items()}


def deep(depth: int, folder: Path) -> Path:
    """The file of a net of many layers: alone it costs mostly the calls of its operations, which a batch shares."""
    torch.manual_seed(0)
    parts = [part for _ in range(depth) for part in (nn.Linear(SIDE, SIDE), nn.Tanh())]
    return jacray.export(nn.Sequential(*parts), torch.zeros(1, SIDE), folder / f"deep-{depth}.safetensors")


@contextlib.contextmanager
def crowd(url: str, names: Sequence[str]) -> Iterator[tuple[list[Counted], Counted]]:
    """Clients that each ask as fast as they are answered, and somebody who asks for the service's health."""
    host, port = address(url)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        health = files(Path(folder), [get(url, "/healthz")])
        probe = stack.enter_context(loading(Load(host, port, health, rate=PROBES, settle=SETTLE)))
        share = [list(names[i::GENERATORS]) for i in range(GENERATORS)]
        clients = [stack.enter_context(loading(Load(host, port, part, len(part), settle=SETTLE))) for part in share]
        yield clients, probe


def saturated(url: str, names: Sequence[str], seconds: float) -> tuple[float, list[float]]:
    """Answers a second, and the seconds that health checks took meanwhile."""
    with crowd(url, names) as (clients, probe):
        time.sleep(SETTLE + seconds)
    return sum(counted.rate for counted in clients), probe.times


def batching(effort: Effort) -> dict[str, Any]:
    """Throughput with batching and without, turn by turn, and health checks meanwhile."""
    sides = {"batched": (), "single": ("--limit", "window_seconds=0")}
    rates: dict[str, dict[str, list[float]]] = {name: {side: [] for side in sides} for name in DEPTHS}
    health: dict[str, list[float]] = {side: [] for side in sides}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        urls = {side: stack.enter_context(serving("--workers", "2", *extra)) for side, extra in sides.items()}
        nets = {name: deep(depth, folder) for name, depth in DEPTHS.items()}
        asked = {(name, side): files(folder, questions(urls[side], nets[name])) for name in nets for side in sides}
        for turn in range(effort.rounds + 1):
            for (name, side), names in asked.items():
                rate, probes = saturated(urls[side], names, effort.seconds * (1 if turn else WARMING))
                if turn:  # the first makes everything warm
                    rates[name][side].append(rate)
                    health[side] += probes
    return {"batching": rates, "health": health}


def questions(url: str, net: Path) -> list[bytes]:
    """One request of each client: samples of their own, one model, which is sent ahead as a module's is."""
    with jacray.Client(url) as client:
        model = {"digest": client.upload(net)}
    return [
        small_work(url, model, torch.randn(1, SIDE), weights=torch.randn(1, SIDE), returns=["weighted_gradient"])
        for _ in range(CLIENTS)
    ]


def undisturbed(effort: Effort) -> dict[str, Any]:
    """Seconds of a job on one worker alone and while others ask for health and for its status, turn by turn."""
    found: dict[str, Any] = {"asked": ASKED, "alone": [], "loaded": [], "rates": [], "answers": []}
    x = torch.randn(effort.samples, SIDE)
    with serving("--workers", "1") as url, jacray.Client(url) as client:
        client.submit(JOB, x[:200], **JOB_FIELDS).result()
        for _ in range(effort.rounds):
            began = time.perf_counter()
            client.submit(JOB, x, **JOB_FIELDS).result()
            found["alone"].append(time.perf_counter() - began)
            began = time.perf_counter()
            job = client.submit(JOB, x, **JOB_FIELDS)
            with asking(url, ["/healthz", f"/v1/jobs/{job.id}"]) as counted:
                job.result()
                found["loaded"].append(time.perf_counter() - began)
            found["rates"].append(counted.rate)
            found["answers"] += counted.times
    return found


@contextlib.contextmanager
def asking(url: str, paths: Sequence[str]) -> Iterator[Counted]:
    """Clients that ask for these pages, in turn, so many times a second."""
    host, port = address(url)
    with tempfile.TemporaryDirectory() as folder:
        names = files(Path(folder), [get(url, path) for path in paths])
        with loading(Load(host, port, names, connections=8, rate=ASKED, settle=0.1)) as counted:
            yield counted

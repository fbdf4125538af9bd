"""What a client of the soak does: one deed at a time, each with its answer checked."""

from __future__ import annotations

import http.client
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import jacray
import torch
from jacray.http import wire
from jacray_workers.models import as_model
from safetensors.torch import save
from torch import Tensor, nn

from tests.serving import Server


def _linear(inputs: int, outputs: int) -> dict[str, Any]:
    return {"kind": "Linear", "in_features": inputs, "out_features": outputs}


TANH = {"kind": "Tanh"}
SPECS: dict[str, dict[str, Any]] = {
    "net": {"kind": "layers", "seed": 3, "layers": [_linear(3, 16), TANH, _linear(16, 2)]},
    "deep": {"kind": "layers", "seed": 4, "layers": [_linear(32, 32), TANH] * 6},
    "wide": {"kind": "layers", "seed": 5, "layers": [_linear(300, 400)]},
}
NET, DEEP, WIDE = SPECS.values()
LONG: dict[str, Any] = {"method": "backward_loop", "chunk_size": 1, "returns": ["norms"], "verify": False}
PLACES = 40
"""So many different samples are asked for, and so many answers are known."""


class Handmade(nn.Module):
    """No spec describes it: it travels as a graph file."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))

    def forward(self, x: Tensor) -> Tensor:
        """Two numbers a sample."""
        return torch.sin(x * self.scale)[..., :2] ** 2


@cache
def samples(spec: str) -> Tensor:
    """The samples that a model is asked about."""
    width = {"net": 3, "deep": 32, "wide": 300, "handmade": 3}[spec]
    return torch.randn(PLACES, width, generator=torch.Generator().manual_seed(7))


@cache
def model(spec: str) -> Any:
    """The model as this process has it."""
    return Handmade() if spec == "handmade" else as_model(SPECS[spec])


@cache
def known(spec: str) -> Tensor:
    """The Jacobians of all its samples, computed here without the service."""
    return torch.as_tensor(jacray.jacobian(model(spec), samples(spec), method="reverse"))


@dataclass
class Person:
    """One client with a connection of its own kind, and what it has to know."""

    server: Server
    token: str
    draw: random.Random
    client: jacray.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = self.server.client(self.token)

    def some(self, spec: str, most: int = 6) -> slice:
        """Some samples in a row."""
        start = self.draw.randrange(PLACES - most)
        return slice(start, start + self.draw.randrange(1, most + 1))

    def ask(self, method: str, path: str, body: Any = None, **more: Any) -> tuple[int, dict[str, str], Any]:
        """A request by hand."""
        return self.server.ask(method, path, body, token=self.token, **more)


def small(me: Person) -> None:
    """A weighted gradient in one round trip."""
    spec = me.draw.choice(["net", "deep"])
    at, rows = me.some(spec), known(spec)
    k = torch.randn(at.stop - at.start, rows.shape[1])
    found = me.client.compute(
        {"net": NET, "deep": DEEP}[spec], samples(spec)[at], weights=k, returns=["weighted_gradient"]
    )
    torch.testing.assert_close(found.weighted_gradient, torch.einsum("bo,boi->bi", k, rows[at]), rtol=1e-4, atol=1e-5)


def by_hand(me: Person) -> None:
    """A small request in JSON."""
    at = me.some("net")
    status, _, found = me.ask("POST", "/v1/compute", {"model": NET, "inputs": samples("net")[at].tolist()})
    assert status == 200, found
    torch.testing.assert_close(torch.tensor(found["results"]["jacobian"]), known("net")[at], rtol=1e-4, atol=1e-5)


def large(me: Person) -> None:
    """An answer of some megabytes, which travels by a file."""
    at = me.some("wide", 10)
    found = me.client.compute(WIDE, samples("wide")[at]).jacobian
    torch.testing.assert_close(torch.as_tensor(found), known("wide")[at], rtol=1e-4, atol=1e-5)


def graph(me: Person) -> None:
    """A module that no spec describes."""
    at = me.some("handmade")
    found = me.client.compute(model("handmade"), samples("handmade")[at])
    torch.testing.assert_close(torch.as_tensor(found.jacobian), known("handmade")[at], rtol=1e-4, atol=1e-5)


def job(me: Person) -> None:
    """Submit, poll, fetch, look at it as the page does, and mostly delete."""
    at = me.some("net", 30)
    mine = me.client.submit(NET, samples("net")[at], returns=["jacobian", "norms"], verify=me.draw.random() < 0.3)
    found = mine.result(timeout=120)
    torch.testing.assert_close(torch.as_tensor(found.jacobian), known("net")[at], rtol=1e-4, atol=1e-5)
    one = mine.array("jacobian", 0, 1)
    torch.testing.assert_close(one, known("net")[at][:1], rtol=1e-4, atol=1e-5)
    for path in ("/plan", "/receipt", "/events"):
        assert me.ask("GET", f"/v1/jobs/{mine.id}{path}")[0] == 200
    if me.draw.random() < 0.8:
        mine.delete()


def cancelled(me: Person) -> None:
    """A long job that is given up soon."""
    mine = me.client.submit(DEEP, {"kind": "random", "shape": [20_000, 32]}, **LONG)
    mine.cancel()
    assert mine.wait(120)
    assert mine.status().state == "cancelled"
    mine.delete()


def upload(me: Person) -> None:
    """Inputs that are sent ahead, named, and deleted."""
    at = me.some("net")
    body = save({"x": samples("net")[at] + 0.0, "pad": torch.rand(me.draw.choice([1, 400_000]))})
    status, _, told = me.ask("POST", "/v1/inputs", body, headers={"Content-Type": wire.MEDIA})
    assert status in (200, 201), told
    spec = {"kind": "safetensors", "path": told["digest"], "arrays": "x"}
    found = me.client.compute(NET, spec, method="reverse")
    torch.testing.assert_close(found.jacobian, known("net")[at], rtol=1e-4, atol=1e-5)
    assert me.ask("DELETE", f"/v1/inputs/{told['digest']}")[0] == 204


def mistakes(me: Person) -> None:
    """What is refused, each with its status."""
    for expected, method, path, body in (
        (404, "GET", f"/v1/jobs/{me.draw.randrange(1 << 40):012x}", None),
        (422, "POST", "/v1/compute", {"model": NET, "inputs": [[1, 2]]}),
        (422, "POST", "/v1/compute", {"model": {"kind": "nothing"}, "inputs": [[1]]}),
        (422, "POST", "/v1/jobs", {"model": NET, "inputs": [[1, 2, 3]], "request": {"returns": ["jacobain"]}}),
        (400, "POST", "/v1/compute", b"{"),
        (404, "GET", "/v1/nothing", None),
    ):
        headers = {"Content-Type": "application/json"} if isinstance(body, bytes) else {}
        status, _, found = me.ask(method, path, body, headers=headers)
        assert status == expected, (status, path, found)
    assert me.server.ask("GET", "/v1/jobs", token="somebody-without-any-right")[0] == 401


def looks(me: Person) -> None:
    """The page, its parts, counts and health."""
    for path in ("/", "/page/app.js", "/openapi.json", "/v1/jobs", "/v1/models", "/metrics", "/healthz", "/readyz"):
        assert me.ask("GET", path)[0] == 200, path


def hangs_up(me: Person) -> None:
    """A client that leaves in the middle of a body, and one in the middle of its answer."""
    head = f"POST /v1/inputs HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {me.token}\r\n"
    with me.server.socket() as gone:
        gone.sendall(f"{head}Content-Type: {wire.MEDIA}\r\nContent-Length: 9000000\r\n\r\n".encode() + bytes(2_000_000))
    connection = http.client.HTTPConnection("127.0.0.1", me.server.port, timeout=60)
    body = json.dumps({"model": WIDE, "inputs": samples("wide")[:8].tolist()})
    headers = {"Authorization": f"Bearer {me.token}", "Content-Type": "application/json", "Accept": wire.MEDIA}
    connection.request("POST", "/v1/compute", body, headers)
    response = connection.getresponse()
    assert response.status == 200
    response.read(1000)
    response.close()
    connection.close()


DEEDS: tuple[tuple[int, Callable[[Person], None]], ...] = (
    (60, small), (15, by_hand), (6, large), (6, graph), (8, job), (2, cancelled), (6, upload), (6, mistakes),
    (6, looks), (2, hangs_up),
)  # fmt: skip
"""How often, and what."""

"""`python -m benchmarks.service`: the service on loopback, and its peers where they are installed. Prints one table.

Every figure comes from real servers in processes of their own. The batched and the unbatched throughput are measured
with the same clients, one after the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jacray
import torch
from jacray.http import wire
from jacray.http.messages import Message

SMALL = {
    "kind": "layers",
    "layers": [
        {"kind": "Linear", "in_features": 3, "out_features": 64},
        {"kind": "Tanh"},
        {"kind": "Linear", "in_features": 64, "out_features": 2},
    ],
}
WIDE = {"kind": "layers", "layers": [{"kind": "Linear", "in_features": 200, "out_features": 1000}]}
DEEP = {
    "kind": "layers",
    "layers": [{"kind": "Linear", "in_features": 64, "out_features": 64}, {"kind": "Tanh"}] * 24,
}
CLIENTS = 64


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[str]:
    """A server's URL."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "jacray.cli", "serve", "--port", "0", "--state", folder, "--ray-address",
                   "inline", "--log-level", "error", *arguments]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603 - our own command
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found is not None
        try:
            with jacray.Client(found[0]) as client:
                until_ready(client)
            yield found[0]
        finally:
            process.terminate()
            process.wait()


def until_ready(client: Any) -> None:
    """Wait until the service takes work."""
    while True:
        with contextlib.suppress(jacray.JacrayError):
            client.connections.json("GET", "/readyz")
            return


def percentiles(call: Callable[[], Any], count: int) -> tuple[float, float]:
    """The median and the 99th percentile of a call's milliseconds."""
    for _ in range(min(10, count)):
        call()
    times = []
    for _ in range(count):
        began = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - began))
    times.sort()
    return times[count // 2], times[int(count * 0.99)]


def request(url: str, model: Any, x: torch.Tensor, **fields: Any) -> bytes:
    """A whole HTTP request for small work."""
    message = Message()
    message.about["inputs"] = message.put(x, "inputs")
    message.about["request"] = {
        name: message.put(value, name) if isinstance(value, torch.Tensor) else value for name, value in fields.items()
    }
    message.about["model"] = model
    header, parts = message.encode()
    body = b"".join([header, *parts])
    host = url.removeprefix("http://")
    lines = (
        f"POST /v1/compute HTTP/1.1\r\nHost: {host}",
        f"Content-Type: {wire.MEDIA}",
        f"Content-Length: {len(body)}",
    )
    return "\r\n".join([*lines, "", ""]).encode() + body


async def load(url: str, bodies: list[bytes], seconds: float) -> tuple[float, list[float]]:
    """Requests a second of concurrent clients that each wait for their answer, and health's milliseconds meanwhile."""
    host, port = url.removeprefix("http://").split(":")
    done, until = 0, time.perf_counter() + seconds
    health: list[float] = []

    async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> None:
        writer.write(body)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        size = re.search(rb"content-length: (\d+)", head)
        assert size is not None
        await reader.readexactly(int(size[1]))

    async def client(body: bytes) -> None:
        nonlocal done
        reader, writer = await asyncio.open_connection(host, int(port))
        while time.perf_counter() < until:
            await ask(reader, writer, body)
            done += 1
        writer.close()

    async def pulse() -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        get = f"GET /healthz HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
        while time.perf_counter() < until:
            began = time.perf_counter()
            await ask(reader, writer, get)
            health.append(1e3 * (time.perf_counter() - began))
            await asyncio.sleep(0.01)
        writer.close()

    await asyncio.gather(pulse(), *(client(body) for body in bodies))
    return done / seconds, sorted(health)


def throughput(seconds: float, *arguments: str) -> tuple[float, list[float]]:
    """Requests a second of 64 clients with a small net of many layers, once everything is warm."""
    with serving("--workers", "2", *arguments) as url:
        bodies = [request(url, DEEP, torch.randn(1, 64), weights=torch.randn(1, 64), returns=["weighted_gradient"])
                  for _ in range(CLIENTS)]  # fmt: skip
        asyncio.run(load(url, bodies, 4.0))
        return asyncio.run(load(url, bodies, seconds))


def ours(rows: dict[str, Any]) -> None:
    """The service's own figures."""
    x, k = torch.randn(8, 3), torch.randn(8, 2)
    with serving("--workers", "2") as url, jacray.Client(url) as client:
        rows["small weighted gradient, 8 samples (p50, p99 ms)"] = percentiles(
            lambda: client.compute(SMALL, x, weights=k, returns=["weighted_gradient"]), 300
        )
        many = torch.randn(512, 3)
        rows["Jacobians of 512 samples 3 -> 2 (p50, p99 ms)"] = percentiles(lambda: client.compute(SMALL, many), 100)
        wide = torch.randn(100, 200)
        rows["80 MB of result (p50, p99 ms)"] = percentiles(lambda: client.compute(WIDE, wide), 10)
    batched, health = throughput(8.0)
    single, _ = throughput(8.0, "--limit", "window_seconds=0")
    rows[f"{CLIENTS} clients, batched (requests/s)"] = batched
    rows[f"{CLIENTS} clients, one by one (requests/s)"] = single
    rows["gain of batching"] = batched / single
    rows["health while saturated (p50, p99 ms)"] = (health[len(health) // 2], health[int(len(health) * 0.99)])


UMBRIDGE = """
import sys, torch, umbridge
net = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.Tanh(), torch.nn.Linear(64, 2))
torch.set_num_threads(1)
class Net(umbridge.Model):
    def __init__(self): super().__init__("net")
    def get_input_sizes(self, config): return [3]
    def get_output_sizes(self, config): return [2]
    def __call__(self, parameters, config): return [net(torch.tensor(parameters[0])).tolist()]
    def gradient(self, out_wrt, in_wrt, parameters, sens, config):
        x = torch.tensor(parameters[0], requires_grad=True)
        net(x).backward(torch.tensor(sens)); return x.grad.tolist()
    def supports_evaluate(self): return True
    def supports_gradient(self): return True
umbridge.serve_models([Net()], int(sys.argv[1]))
"""


def umbridge_peer(rows: dict[str, Any], port: int = 4949) -> None:
    """UM-Bridge's server and client: one sample a call is all that its protocol knows."""
    try:
        import umbridge
    except ImportError:
        rows["UM-Bridge"] = "not installed"
        return
    command = [sys.executable, "-c", UMBRIDGE, str(port)]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet)  # noqa: S603 - our own
    try:
        model = None
        while model is None:
            with contextlib.suppress(Exception):
                model = umbridge.HTTPModel(f"http://localhost:{port}", "net")
            time.sleep(0.2)
        rows["UM-Bridge: weighted gradient of ONE sample (p50, p99 ms)"] = percentiles(
            lambda: model.gradient(0, 0, [[0.1, 0.2, 0.3]], [1.0, 0.5]), 200
        )
    finally:
        process.kill()
        process.wait()


TESSERACT = """
from typing import Any
import torch
from pydantic import BaseModel
from tesseract_core.runtime import Array, Differentiable, Float32

torch.set_num_threads(1)
net = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.Tanh(), torch.nn.Linear(64, 2))


class InputSchema(BaseModel):
    x: Differentiable[Array[(None, 3), Float32]]


class OutputSchema(BaseModel):
    y: Differentiable[Array[(None, 2), Float32]]


def evaluate(x: torch.Tensor) -> torch.Tensor:
    return net(x)


def apply(inputs: InputSchema) -> OutputSchema:
    return OutputSchema(y=evaluate(torch.as_tensor(inputs.x)).detach().numpy())


def vector_jacobian_product(
    inputs: InputSchema, vjp_inputs: set[str], vjp_outputs: set[str], cotangent_vector: dict[str, Any]
):
    x = torch.as_tensor(inputs.x).requires_grad_()
    (grad,) = torch.autograd.grad(evaluate(x), x, torch.as_tensor(cotangent_vector["y"]))
    return {"x": grad.numpy()}


def jacobian(inputs: InputSchema, jac_inputs: set[str], jac_outputs: set[str]):
    return {"y": {"x": torch.func.jacrev(evaluate)(torch.as_tensor(inputs.x)).detach().numpy()}}
"""


def tesseract_peer(rows: dict[str, Any], port: int = 4950) -> None:
    """tesseract-core's server and client, with what its pages say: `jacrev` over the batch, and a torch VJP."""
    command = Path(sys.executable).with_name("tesseract-runtime")
    if not command.exists():
        rows["Tesseract"] = "not installed"
        return
    from tesseract_core import Tesseract

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tesseract_api.py").write_text(TESSERACT, encoding="utf-8")
        variables = {**os.environ, "TESSERACT_API_PATH": f"{folder}/tesseract_api.py", "OMP_NUM_THREADS": "1"}
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": variables}
        words = [str(command), "serve", "--host", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen(words, cwd=folder, **quiet)  # noqa: S603 - it writes its logs where it stands
        try:
            peer = Tesseract.from_url(f"http://127.0.0.1:{port}")
            while True:
                with contextlib.suppress(Exception):
                    peer.health()
                    break
                time.sleep(0.2)
            x, k = torch.randn(8, 3).numpy(), torch.randn(8, 2).numpy()
            rows["Tesseract: small weighted gradient, 8 samples (p50, p99 ms)"] = percentiles(
                lambda: peer.vector_jacobian_product({"x": x}, ["x"], ["y"], {"y": k}), 200
            )
            many = torch.randn(512, 3).numpy()
            rows["Tesseract: Jacobians of 512 samples 3 -> 2 (p50, p99 ms)"] = percentiles(
                lambda: peer.jacobian({"x": many}, ["x"], ["y"]), 3
            )
        finally:
            process.kill()
            process.wait()


def main() -> None:
    """Measure, print, and write the rows as JSON where a path is given."""
    torch.set_num_threads(1)
    rows: dict[str, Any] = {}
    ours(rows)
    umbridge_peer(rows)
    tesseract_peer(rows)
    for name, value in rows.items():
        shown = " ".join(f"{v:.2f}" for v in value) if isinstance(value, tuple) else value
        print(f"{name:<60} {shown if isinstance(shown, str) else f'{shown:.1f}'}")
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

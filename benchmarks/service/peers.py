"""`python -m benchmarks.service.peers NAME`: one peer's server and client on loopback; prints its times as JSON.

Run by the Python of the peers' own environment, so nothing of jacray is imported here.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

START_SECONDS = 60.0

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


def timed(call: Callable[[], Any], count: int) -> list[float]:
    """Seconds of each of `count` calls, after a few that do not count."""
    for _ in range(max(1, count // 20)):
        call()
    times = []
    for _ in range(count):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return times


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def running(command: list[str], folder: str, **variables: str) -> Iterator[None]:
    """A peer's server, ended afterwards. It may write its logs where it stands."""
    process = subprocess.Popen(  # noqa: S603 - our own command
        command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield
    finally:
        process.kill()
        process.wait()


def until(call: Callable[[], Any]) -> Any:
    """The call's answer once it stops failing.

    Raises:
        TimeoutError: it never did; the last failure is its cause.
    """
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            return call()
        except Exception as error:  # whatever its client raises while the server is not there yet
            if time.monotonic() > end:
                raise TimeoutError(f"the peer's server did not answer within {START_SECONDS:g} s") from error
            time.sleep(0.2)


def umbridge(folder: str, calls: int) -> dict[str, Any]:
    """UM-Bridge: one sample a call is all that its protocol knows."""
    import umbridge as package

    port = free_port()
    with running([sys.executable, "-c", UMBRIDGE, str(port)], folder):
        model = until(lambda: package.HTTPModel(f"http://localhost:{port}", "net"))
        gradient = timed(lambda: model.gradient(0, 0, [[0.1, 0.2, 0.3]], [1.0, 0.5]), calls)
    return {"package": "umbridge", "times": {"gradient of one": gradient}}


def tesseract(folder: str, calls: int) -> dict[str, Any]:
    """tesseract-core, with what its pages say: `jacrev` over the batch, and a torch VJP."""
    from tesseract_core import Tesseract

    (Path(folder) / "tesseract_api.py").write_text(TESSERACT, encoding="utf-8")
    port = free_port()
    program = str(Path(sys.executable).with_name("tesseract-runtime"))
    command = [program, "serve", "--host", "127.0.0.1", "--port", str(port)]
    with running(command, folder, TESSERACT_API_PATH=f"{folder}/tesseract_api.py"):
        peer = Tesseract.from_url(f"http://127.0.0.1:{port}")
        until(peer.health)
        x, k, many = torch.randn(8, 3).numpy(), torch.randn(8, 2).numpy(), torch.randn(512, 3).numpy()
        gradient = timed(lambda: peer.vector_jacobian_product({"x": x}, ["x"], ["y"], {"y": k}), calls)
        jacobians = timed(lambda: peer.jacobian({"x": many}, ["x"], ["y"]), max(2, calls // 40))
    return {"package": "tesseract-core", "times": {"gradient": gradient, "jacobians": jacobians}}


PEERS: dict[str, Callable[[str, int], dict[str, Any]]] = {"umbridge": umbridge, "tesseract": tesseract}


def main() -> None:
    """Measure the peer that the first argument names, with as many calls as the second says."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = PEERS[sys.argv[1]](folder, int(sys.argv[2]))
    found["version"] = importlib.metadata.version(found["package"])
    print(json.dumps(found))


if __name__ == "__main__":
    main()

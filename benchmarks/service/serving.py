"""A service in a process of its own, and whole HTTP requests to it."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jacray
import torch
from jacray.http import wire
from jacray.http.messages import Message

START_SECONDS = 120.0


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[str]:
    """The URL of a service that takes work."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "jacray.cli", "serve", "--port", "0", "--state", folder, "--ray-address",
                   "inline", "--log-level", "error", *arguments]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603 - our own command
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"http://\S+", line)
            if found is None:
                raise RuntimeError(f"the service did not start: {line}")
            with jacray.Client(found[0]) as client:
                until_ready(client)
            yield found[0]
        finally:
            process.terminate()
            process.wait()


def until_ready(client: Any) -> None:
    """Wait until the service takes work.

    Raises:
        TimeoutError: it never did.
    """
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        with contextlib.suppress(jacray.JacrayError):
            client.connections.json("GET", "/readyz")
            return
        time.sleep(0.05)
    raise TimeoutError(f"the service was not ready within {START_SECONDS:g} s")


def address(url: str) -> tuple[str, int]:
    """Host and port."""
    host, port = url.removeprefix("http://").rsplit(":", 1)
    return host, int(port)


def small_work(url: str, model: Any, x: torch.Tensor, **fields: Any) -> bytes:
    """A whole request for small work, as `Client.compute` would send it."""
    message = Message()
    message.about["inputs"] = message.put(x, "inputs")
    message.about["request"] = {
        name: message.put(value, name) if isinstance(value, torch.Tensor) else value for name, value in fields.items()
    }
    message.about["model"] = model
    header, parts = message.encode()
    body = b"".join([header, *parts])
    lines = (
        "POST /v1/compute HTTP/1.1",
        f"Host: {url.removeprefix('http://')}",
        f"Content-Type: {wire.MEDIA}",
        f"Content-Length: {len(body)}",
    )
    return "\r\n".join([*lines, "", ""]).encode() + body


def get(url: str, path: str) -> bytes:
    """A whole request for a page."""
    return f"GET {path} HTTP/1.1\r\nHost: {url.removeprefix('http://')}\r\n\r\n".encode()


def files(folder: Path, bodies: list[bytes]) -> list[str]:
    """Files of whole requests, for a load."""
    names = []
    for body in bodies:
        path = folder / f"request-{len(list(folder.iterdir()))}"
        path.write_bytes(body)
        names.append(str(path))
    return names

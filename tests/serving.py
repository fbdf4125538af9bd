"""A real server in a process of its own, on a free port, as a user would start it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jacray

ALICE, BOB = "alice-has-a-long-token", "bob-has-another-long-token"
TOKENS = f"alice:{ALICE},bob:{BOB}"


@dataclass
class Server:
    """A running `jacray serve`."""

    state: Path
    arguments: tuple[str, ...] = ()
    tokens: str = TOKENS
    authority: Path | None = None
    url: str = ""
    process: subprocess.Popen[str] | None = field(default=None, repr=False)

    def start(self, port: int = 0) -> Server:
        command = [
            sys.executable, "-m", "jacray.cli", "serve", "--port", str(port), "--state", str(self.state),
            "--ray-address", "inline", *self.arguments,
        ]  # fmt: skip
        environment = {**os.environ, "JACRAY_TOKENS": self.tokens}
        self.log = self.state.with_suffix(".log").open("a")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"(https?://\S+)", line)
        assert found is not None, (line, self.said())
        self.url = found[1]
        self.wait_until_ready()
        return self

    def wait_until_ready(self, seconds: float = 120) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.ask("GET", "/readyz", token="")[0] == 200:
                    return
            time.sleep(0.05)
        raise TimeoutError(self.said())

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    @property
    def spool(self) -> Path:
        """The folder of what lives a moment."""
        return Path((self.state / "spool").read_text(encoding="utf-8"))

    def said(self) -> str:
        return self.state.with_suffix(".log").read_text()

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(how)
        code = self.process.wait(60)
        self.log.close()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def client(self, token: str = ALICE, **given: Any) -> jacray.Client:
        return jacray.Client(self.url, token=token, **given)

    def ask(
        self, method: str, path: str, body: Any = None, *, token: str = ALICE, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], Any]:
        """One request by hand: status, headers, and the body read as JSON where it is."""
        connection = self.connection()
        sent = {"Authorization": f"Bearer {token}"} if token else {}
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        if data is not None and not isinstance(body, bytes):
            sent["Content-Type"] = "application/json"
        try:
            connection.request(method, path, data, {**sent, **(headers or {})})
            response = connection.getresponse()
            text = response.read()
        finally:
            connection.close()
        told = {name.lower(): value for name, value in response.getheaders()}
        is_json = "json" in told.get("content-type", "")
        return response.status, told, json.loads(text) if is_json and text else text

    def connection(self) -> http.client.HTTPConnection:
        if self.authority is None:
            return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        trust = ssl.create_default_context(cafile=str(self.authority))
        return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=60, context=trust)

    def socket(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)


@contextlib.contextmanager
def serving(state: Path, *arguments: str, tokens: str = TOKENS, authority: Path | None = None) -> Iterator[Server]:
    server = Server(state, arguments, tokens, authority).start()
    try:
        yield server
    finally:
        if server.process is not None and server.process.poll() is None:
            server.stop()

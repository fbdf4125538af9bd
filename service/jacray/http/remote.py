"""The client of a service: the same calls as on one's own machine, and the same results."""

from __future__ import annotations

import json
import threading
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

from jacray_workers.errors import JobError, ModelError, Plain, RequestError
from jacray_workers.request import Request, make_request

from jacray.client import Client
from jacray.failures import OnError
from jacray.fields import AllFields
from jacray.http import wire
from jacray.http.connection import Connections
from jacray.http.messages import result_of
from jacray.http.outgoing import message_of
from jacray.http.remote_job import RemoteJob
from jacray.result import Result


class RemoteClient(Client):
    """Made by `Client("http://HOST:PORT")`.

    Args:
        address: the service's URL.
        token: what lets one in; JACRAY_TOKEN by default.
        timeout: how many seconds a connection may stand still.
        retries: how often a request that was dropped is sent again.
    """

    def __init__(self, address: str, *, token: str | None = None, timeout: float = 300.0, retries: int = 5) -> None:
        self._address = address
        self._connections = Connections(address, token, timeout, retries)
        self._open = True
        self._sent: dict[Any, str] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(
        self,
        model: Any,
        x: Any,
        *,
        request: Request | None = None,
        key: str | None = None,
        on_error: OnError = "fail",
        user: str = "",
        **fields: Unpack[AllFields],
    ) -> RemoteJob:
        """Submit a job. It is the service's: it goes on when this client is closed.

        Args:
            model: an `nn.Module` or a model spec.
            x: a tensor or a pytree of tensors, the batch first, or an input spec as a mapping.
            request: a request made before; `fields` change some of it.
            key: submitting again under the same key gives the same job; one of its own by default.
            on_error: only `fail`: a service ends a job with its first error.
            user: only empty: the token tells whose job it is.
            **fields: the fields of `Request`.

        Raises:
            UserError: what breaks a rule.
        """
        if on_error != "fail" or user:
            name, value = ("user", user) if user else ("on_error", on_error)
            raise RequestError(name, "cannot be set for a job over HTTP", value, "leave it out")
        message = message_of(model, x, make_request(request, **fields), self._upload)
        header, parts = message.encode()
        headers = {"Idempotency-Key": key or uuid.uuid4().hex, "Accept": "application/json"}
        with self._connections.open("POST", "/v1/jobs", parts=[header, *parts], headers=headers) as response:
            shown = json.loads(response.read())
        return RemoteJob(self._connections, shown)

    def job(self, identity: str) -> RemoteJob:
        """A job that was submitted before, from anywhere.

        Raises:
            JacrayError: there is none of yours.
        """
        return RemoteJob(self._connections, self._connections.json("GET", f"/v1/jobs/{identity}"))

    def jobs(self, state: str | None = None) -> list[dict[str, Any]]:
        """Your jobs, the latest first, as the service describes them."""
        query = {"state": state} if state else None
        found: list[dict[str, Any]] = self._connections.json("GET", "/v1/jobs", query=query)["jobs"]
        return found

    def compute(self, model: Any, x: Any, *, request: Request | None = None, **fields: Unpack[AllFields]) -> Result:
        """Compute small work in one round trip.

        Args:
            model: an `nn.Module` or a model spec.
            x: a tensor or a pytree of tensors, the batch first.
            request: a request made before; `fields` change some of it.
            **fields: the fields of `Request`.

        Raises:
            UserError: what breaks a rule, or is too large or too slow for one round trip.
        """
        message = message_of(model, x, make_request(request, **fields), self._upload)
        header, parts = message.encode()
        data = self._connections.tensors("/v1/compute", [header, *parts])
        return result_of(wire.read_header(data), data)

    def upload(self, what: Any) -> str:
        """Send a file of weights ahead; returns the digest that specs may name."""
        return self._upload(what)

    def scale(self, workers: int) -> None:
        """Refused: a service's workers are its own.

        Raises:
            RequestError: always.
        """
        raise RequestError("workers", "cannot be changed over HTTP", workers, "ask whoever runs the service")

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._open

    def close(self) -> None:
        """End the connections. Jobs go on: they are the service's."""
        self._open = False
        self._connections.close()

    def __repr__(self) -> str:
        return f"Client({self._address!r}{', closed' if self.closed else ''})"

    def _upload(self, what: Any) -> str:
        if self.closed:
            raise JobError("client", "is closed", None, "make a new jacray.Client")
        path = Path(what)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ModelError("model.weights", f"must be readable: {error.strerror}", Plain(str(path))) from None
        with self._connections.open("POST", "/v1/models", parts=[data]) as response:
            return str(wire.load(response.read(), "answer")["digest"])

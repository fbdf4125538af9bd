"""The client of a service: the same calls as on one's own machine, and the same results."""

from __future__ import annotations

import hashlib
import json
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from jacray_workers.errors import InputError, JobError, RequestError
from jacray_workers.request import Request, make_request

from jacray.client import Client
from jacray.failures import ON_ERROR, OnError
from jacray.fields import AllFields
from jacray.http import wire
from jacray.http.connection import Connections, Verify
from jacray.http.messages import result_of
from jacray.http.outgoing import message_of
from jacray.http.remote_job import RemoteJob
from jacray.result import Result

T = TypeVar("T")


class RemoteClient(Client):
    """Made by `Client("http://HOST:PORT")`.

    Attributes:
        connections: to the service.

    Args:
        address: the service's URL.
        token: what lets one in; JACRAY_TOKEN by default.
        timeout: how many seconds a connection may stand still.
        retries: how often a request that was dropped is sent again.
        verify: whom to trust over https: True the system's authorities, a path those in that file or folder, False
            anybody. By default what JACRAY_CA names, else the system's.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        timeout: float = 300.0,
        retries: int = 5,
        verify: Verify = None,
    ) -> None:
        self._address = address
        self.connections = Connections(address, token, timeout, retries, verify)
        self._open = True
        self._sent = set[str]()
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
        to: Any = None,
        key: str | None = None,
        on_error: OnError = "fail",
        user: str = "",
        spec: Mapping[str, Any] | None = None,
        **fields: Unpack[AllFields],
    ) -> RemoteJob:
        """Submit a job. It is the service's: it goes on when this client is closed.

        Args:
            model: an `nn.Module` or a model spec.
            x: a tensor or a pytree of tensors, the batch first, or an input spec as a mapping.
            request: a request made before; `fields` change some of it.
            to: only None: a service keeps its results itself.
            key: submitting again under the same key gives the same job; one of its own by default.
            on_error: `fail` ends the job with its first error; `skip` finishes the others, leaves NaN at the samples
                that always fail, and lists them in the receipt.
            user: only empty: the token tells whose job it is.
            spec: the file that it comes from, kept with the job for who fetches it.
            **fields: the fields of `Request`.

        Raises:
            UserError: what breaks a rule.
        """
        if user or to is not None:
            name, value = ("user", user) if user else ("to", to)
            raise RequestError(name, "cannot be set for a job over HTTP", value, "leave it out")
        if on_error not in ON_ERROR:
            raise RequestError("on_error", f"must be one of {', '.join(ON_ERROR)}", on_error)
        asked = make_request(request, **fields)
        more = {"options": {"on_error": on_error}, **({} if spec is None else {"spec": dict(spec)})}
        headers = {"Idempotency-Key": key or uuid.uuid4().hex, "Accept": "application/json"}

        def send() -> dict[str, Any]:
            header, parts = message_of(model, x, asked, self._upload, more).encode()
            with self.connections.open("POST", "/v1/jobs", parts=[header, *parts], headers=headers) as response:
                found: dict[str, Any] = json.loads(response.read())
                return found

        return RemoteJob(self.connections, self._with_uploads(send))

    def job(self, identity: str) -> RemoteJob:
        """A job that was submitted before, from anywhere.

        Raises:
            JacrayError: there is none of yours.
        """
        return RemoteJob(self.connections, self.connections.json("GET", f"/v1/jobs/{identity}"))

    def jobs(self, state: str | None = None) -> list[dict[str, Any]]:
        """Your jobs, the latest first, as the service describes them."""
        query = {"state": state} if state else None
        found: list[dict[str, Any]] = self.connections.json("GET", "/v1/jobs", query=query)["jobs"]
        return found

    def compute(
        self, model: Any, x: Any, *, request: Request | None = None, batch: bool = True, **fields: Unpack[AllFields]
    ) -> Result:
        """Compute small work in one round trip.

        Args:
            model: an `nn.Module` or a model spec.
            x: a tensor or a pytree of tensors, the batch first.
            request: a request made before; `fields` change some of it.
            batch: may be computed together with others' work of its kind. Alone, an answer's last bits do not depend
                on what came at the same time.
            **fields: the fields of `Request`.

        Raises:
            UserError: what breaks a rule, or is too large or too slow for one round trip.
        """
        asked = make_request(request, **fields)

        def send() -> memoryview:
            more = {} if batch else {"options": {"batch": False}}
            header, parts = message_of(model, x, asked, self._upload, more).encode()
            return self.connections.tensors("/v1/compute", [header, *parts])

        data = self._with_uploads(send)
        return result_of(wire.read_header(data), data)

    def upload(self, path: str | Path) -> str:
        """Send a file of tensors ahead; returns the digest that specs may name as `weights` or `path`.

        Raises:
            JacrayError: it is no safetensors file, or too large.
        """
        return self._upload(Path(path).read_bytes)

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
        self.connections.close()

    def __repr__(self) -> str:
        return f"Client({self._address!r}{', closed' if self.closed else ''})"

    def _with_uploads(self, send: Callable[[], T]) -> T:
        """Send work; what it names was perhaps deleted from the service since it was sent ahead."""
        try:
            return send()
        except InputError as error:
            if "names no upload" not in error.rule or not self._sent:
                raise
        with self._lock:
            self._sent.clear()
        return send()

    def _upload(self, read: Callable[[], bytes]) -> str:
        """Send bytes ahead, unless this client has sent them before."""
        if self.closed:
            raise JobError("client", "is closed", None, "make a new jacray.Client")
        data = read()
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        with self._lock:
            known = digest in self._sent
        if not known:
            with self.connections.open("POST", "/v1/models", parts=[data]) as response:
                response.read()
            with self._lock:
                self._sent.add(digest)
        return digest

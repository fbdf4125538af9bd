"""The client of a service: the same calls as on one's own machine, and the same results."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

from jacray_workers.errors import JobError, ModelError, Plain
from jacray_workers.request import Request, make_request

from jacray.client import Client
from jacray.fields import AllFields
from jacray.http import wire
from jacray.http.connection import Connections
from jacray.http.messages import result_of
from jacray.http.outgoing import message_of
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

"""The web server's connections with bounds that it lacks: how many, and how slow and large a request's head may be.

Also bounded is what comes around the pieces of a body, and fields that follow a body change nothing of its head.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from jacray.http import problems, wire
from jacray.http.problems import HttpError, problem
from jacray.http.settings import Limits

_MAX_HEAD = 1 << 16


class BoundedProtocol(HttpToolsProtocol):
    """One connection. A half-open one, or one whose request's head trickles in, is cut off."""

    limits: Limits
    _deadline: asyncio.TimerHandle | None = None
    _idle_bytes = 0
    _in_head = False

    def connection_made(self, transport: Any) -> None:
        """Take the connection, unless there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            transport.abort()
        else:
            self._expect()

    def data_received(self, data: bytes) -> None:
        """Count what belongs to no body: a head that is not complete, sizes of chunks, fields that follow a body."""
        cycle: Any = self.cycle  # None before the first request, whatever its type says
        if self._deadline is None and (cycle is None or cycle.response_complete):
            self._expect()
        self._idle_bytes += len(data)
        super().data_received(data)
        if self._idle_bytes > _MAX_HEAD:
            self._cut()

    def on_message_begin(self) -> None:
        """A request begins."""
        self._in_head = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A field. One that follows the body is left out: it could give the request another sender."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._expected()
        self._idle_bytes, self._in_head = 0, False
        self.scope["jacray.abort"] = self.transport.abort  # type: ignore[typeddict-unknown-key]
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body of a request that is not answered yet."""
        if self._deadline is None:
            self._idle_bytes = 0
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - the parent's words say no more
        """Refuse what is no HTTP, in the one shape of errors."""
        text = wire.dump(problem(HttpError(400, "request", "must be a request of HTTP/1.1 in good order"))).encode()
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: {problems.MEDIA}\r\ncontent-length: {len(text)}\r\n"
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + text)
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended."""
        self._expected()
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        """End an idle connection. To close it is to wait until the last bytes have left, which may never be."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def _expect(self) -> None:
        self._idle_bytes = 0
        self._deadline = self.loop.call_later(self.limits.header_seconds, self._cut)

    def _expected(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _cut(self) -> None:
        self._expected()
        self.transport.abort()


def protocol(limits: Limits) -> type[BoundedProtocol]:
    """The class of connections with these bounds."""
    return type("Protocol", (BoundedProtocol,), {"limits": limits})

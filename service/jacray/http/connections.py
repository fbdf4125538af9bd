"""The web server's connections with bounds that it lacks: how many, and how slow and large a request's head may be."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from jacray.http.settings import Limits

_MAX_HEAD = 1 << 16


class BoundedProtocol(HttpToolsProtocol):
    """One connection. A half-open one, or one whose request's head trickles in, is cut off."""

    limits: Limits
    _deadline: asyncio.TimerHandle | None = None
    _head = 0

    def connection_made(self, transport: Any) -> None:
        """Take the connection, unless there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            transport.abort()
        else:
            self._expect()

    def data_received(self, data: bytes) -> None:
        """Count what belongs to a head that is not complete."""
        cycle: Any = self.cycle  # None before the first request, whatever its type says
        if self._deadline is None and (cycle is None or cycle.response_complete):
            self._expect()
        if self._deadline is not None:
            self._head += len(data)
        super().data_received(data)
        if self._deadline is not None and self._head > _MAX_HEAD:
            self._cut()

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._expected()
        self.scope["jacray.abort"] = self.transport.abort  # type: ignore[typeddict-unknown-key]
        super().on_headers_complete()

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
        self._head = 0
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

"""The web server's connections with bounds that it lacks: how many, and how slow and large a request's head may be.

Also bounded is what comes around the pieces of a body, and fields that follow a body change nothing of its head.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from jacray.http import problems, wire
from jacray.http.calls import Answer
from jacray.http.lane import Lane
from jacray.http.problems import HttpError, problem
from jacray.http.settings import Limits
from jacray.http.shares import Share, Shares

logger = logging.getLogger(__name__)

_MAX_HEAD = 1 << 16
SendAnswer = Callable[[Answer, Any, Any, float], Awaitable[None]]


class BoundedProtocol(HttpToolsProtocol):
    """One connection. A half-open one, or one whose request's head trickles in, is cut off."""

    limits: Limits
    lane: Lane | None = None
    send_answer: SendAnswer
    shares: Shares
    _share: Share
    _deadline: asyncio.TimerHandle | None = None
    _idle_bytes = 0
    _in_head = False
    _held: list[bytes] | None = None  # the body so far of a request that may go the short way

    def connection_made(self, transport: Any) -> None:
        """Take the connection, unless there are too many, in all or from where it comes."""
        super().connection_made(transport)
        self._share = Share(self.shares, self.client[0] if self.client else "")
        if len(self.connections) > self.limits.connections or not self._share.granted:
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
        if self._held is not None:  # it did not come whole
            self._go_long()
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
        mine: Any = self.scope
        mine["jacray.abort"], mine["jacray.belongs"] = self.transport.abort, self._share.belongs
        cycle: Any = self.cycle
        alone = (cycle is None or cycle.response_complete) and not self.flow.write_paused
        if self.lane is not None and alone and self.parser.get_http_version() == "1.1":
            self._held = []
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body of a request that is not answered yet."""
        if self._deadline is None:
            self._idle_bytes = 0
        if self._held is not None:
            self._held.append(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The request has come whole."""
        if self._held is not None and self.lane is not None:
            self.scope["method"] = self.parser.get_method().decode("ascii")
            short = Short(self, self.scope, keep_alive=self.parser.should_keep_alive())
            before, self.cycle = self.cycle, cast(Any, short)
            body = b"".join(self._held)
            try:
                taken = self.lane.take(self.parser.get_method(), self.url, self.headers, body, short)
            except Exception as error:
                logger.error("the short way failed", exc_info=error)
                taken = short.response_complete
            if taken:
                self._held = None
                return
            self.cycle = before
            self._go_long()
        super().on_message_complete()

    def _go_long(self) -> None:
        """Let the framework answer a request whose body, or some of it, was held back."""
        pieces, self._held = self._held or [], None
        super().on_headers_complete()
        for piece in pieces:
            super().on_body(piece)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - the parent's words say no more
        """Refuse what is no HTTP, in the one shape of errors."""
        text = wire.dump(problem(HttpError(400, "request", "must be a request of HTTP/1.1 in good order"))).encode()
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: {problems.MEDIA}\r\ncontent-length: {len(text)}\r\n"
        self._held = None
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + text)
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended."""
        self._expected()
        self._share.end()
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


class Short:
    """A request that goes the short way, as the web server knows its requests."""

    body = b""  # nothing of it comes later
    more_body = False

    def __init__(self, connection: BoundedProtocol, scope: Any, *, keep_alive: bool) -> None:
        self._connection, self._scope, self.keep_alive = connection, scope, keep_alive
        self.response_complete = self.disconnected = False
        self.message_event = _Nobody()

    def belongs(self, user: str) -> bool:
        """Whether this user may have this connection."""
        return self._connection._share.belongs(user)

    def tell(self, answer: Answer) -> None:
        """Send the answer."""
        connection = self._connection
        if self.disconnected or connection.transport.is_closing():
            self.response_complete = True
            return
        if not isinstance(answer.body, bytes | memoryview):
            self._stream(answer)
            return
        self.response_complete = True
        parts: list[bytes | memoryview] = [_status(answer.status, answer.media, len(answer.body))]
        for name, value in (*connection.server_state.default_headers, *_encoded(answer.headers)):
            parts += [name, b": ", value, b"\r\n"]
        parts += [b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n", answer.body]
        connection.transport.write(b"".join(parts))
        if not self.keep_alive:
            connection.transport.close()
        connection.on_response_complete()

    def _stream(self, answer: Answer) -> None:
        """Let the framework send what comes in pieces."""
        connection = self._connection
        cycle = RequestResponseCycle(
            scope=self._scope, transport=connection.transport, flow=connection.flow, logger=connection.logger,
            access_logger=connection.access_logger, access_log=False, message_event=asyncio.Event(),
            default_headers=connection.server_state.default_headers, expect_100_continue=False,
            keep_alive=self.keep_alive, on_response=connection.on_response_complete,
        )  # fmt: skip
        if connection.cycle is cast(Any, self):
            connection.cycle = cycle

        async def send(scope: Any, _receive: Any, send: Any) -> None:
            await connection.send_answer(answer, scope, send, connection.limits.idle_seconds)

        task = connection.loop.create_task(cycle.run_asgi(send))
        # As the web server keeps its own: it waits for them before it ends.
        connection.tasks.add(task)
        task.add_done_callback(connection.tasks.discard)


class _Nobody:
    """Nobody waits for more of a request that has come whole."""

    def set(self) -> None:
        """More has come, or the connection has ended."""


@functools.lru_cache(maxsize=256)
def _status(status: int, media: str, size: int) -> bytes:
    start = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
    return f"{start}content-type: {media}\r\ncontent-length: {size}\r\n".encode()


def _encoded(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]


def protocol(limits: Limits, shares: Shares, lane: Lane | None, send_answer: SendAnswer) -> type[BoundedProtocol]:
    """The class of connections with these bounds.

    Args:
        limits: the bounds.
        shares: counts whose the connections are.
        lane: answers what it can before the framework hears of it.
        send_answer: sends an answer that comes in pieces.
    """
    fields = {"limits": limits, "lane": lane, "send_answer": staticmethod(send_answer), "shares": shares}
    return type("Protocol", (BoundedProtocol,), fields)

"""A request and its answer as the service sees them, whatever framework carries them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from jacray_workers.errors import Plain

from jacray.http import problems, wire
from jacray.http.problems import HttpError
from jacray.http.settings import Limits

JSON = "application/json"
SPILL = 1 << 20
GRACE = 10.0
_IN_THREAD = 1 << 16


async def _nothing() -> AsyncIterator[bytes]:
    for piece in tuple[bytes, ...]():
        yield piece


@dataclass(frozen=True)
class Call:
    """A request.

    Attributes:
        user: whose.
        path, query: its parameters.
        headers: names in lower case.
        body: its bytes as they come.
    """

    user: str
    path: Mapping[str, str]
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: AsyncIterator[bytes] = field(default_factory=_nothing)

    @property
    def media(self) -> str:
        """The media type of the body."""
        return self.headers.get("content-type", JSON).partition(";")[0].strip().lower()

    @property
    def accept(self) -> str:
        """The form that the answer should have, `json` or `tensors`: as asked, else the body's own."""
        wanted = self.headers.get("accept", "")
        if wire.MEDIA in wanted:
            return "tensors"
        return "json" if JSON in wanted or self.media == JSON else "tensors"


@dataclass(frozen=True)
class Answer:
    """What is sent back.

    Attributes:
        status: the status code.
        body: all of it, or pieces as they come.
        media: its media type.
        headers: further headers.
        size: how many bytes in all, where `body` comes in pieces and that is known.
    """

    status: int = 200
    body: bytes | memoryview | AsyncIterator[bytes | memoryview] = b""
    media: str = JSON
    headers: Mapping[str, str] = field(default_factory=dict)
    size: int | None = None


def said(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    """JSON data as an answer."""
    return Answer(status, wire.dump(value).encode(), headers=headers or {})


def failed(found: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Answer:
    """A problem as an answer."""
    return Answer(int(found["status"]), wire.dump(found).encode(), problems.MEDIA, headers or {})


@dataclass
class Body:
    """A body that has come whole.

    Attributes:
        media: what it is: JSON or safetensors.
        size: how many bytes.
        digest: the sha256 of its bytes, in hexadecimal.
        parts: the bytes, where they are few.
        file: the file that holds them, where they are many.
    """

    media: str
    size: int = 0
    digest: str = ""
    parts: list[bytes] = field(default_factory=list)
    file: Path | None = None

    def start(self, count: int) -> bytes:
        """The first bytes."""
        if self.file is None:
            return b"".join(self.parts)[:count]
        with self.file.open("rb") as stream:
            return stream.read(count)

    def forget(self) -> None:
        """Remove the file, if nobody took it."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    async def header(self) -> wire.Header:
        """The header of a body in safetensors, whose size is checked against the body's.

        Raises:
            WireError: it is not safetensors.
        """
        size = wire.header_size(self.start(wire.PREFIX))
        data = self.start(size)
        header: wire.Header = await _aside(wire.read_header, data, size)
        if header.total != self.size:
            rule = f"must have the {header.total} bytes that its header speaks of"
            raise wire.WireError("body", rule, Plain(f"{self.size} bytes"))
        return header

    async def json(self) -> Any:
        """A body in JSON.

        Raises:
            WireError: it is none.
        """
        return await _aside(lambda data: wire.load(data, "body"), self.start(self.size), self.size)


async def _aside(work: Any, data: bytes, size: int) -> Any:
    """Small work here; large work in a thread, so that the event loop goes on."""
    return work(data) if size < _IN_THREAD else await asyncio.to_thread(work, data)


async def receive(call: Call, limits: Limits, folder: Path, *, store: bool = False) -> Body:
    """Read a body: many bytes go to a file while they come.

    Args:
        call: the request.
        limits: bounds of size and slowness.
        folder: where the file is made.
        store: keep it in a file however small it is.

    Raises:
        HttpError: another media type, too many bytes, or too slow.
    """
    media = call.media
    if media not in (JSON, wire.MEDIA):
        raise HttpError(415, "Content-Type", f"must be {JSON} or {wire.MEDIA}", Plain(media or "empty"))
    most = limits.json_bytes if media == JSON else limits.body_bytes
    told = call.headers.get("content-length", "0")
    if told.isdigit() and int(told) > most:
        raise _too_large(most, int(told))
    body, held = Body(media), 0
    hasher = hashlib.sha256() if store else None
    with contextlib.ExitStack() as stack:
        stream: BinaryIO | None = None
        try:
            async for chunk in _in_time(call.body, limits):
                body.size += len(chunk)
                if body.size > most:
                    raise _too_large(most, body.size)
                body.parts.append(chunk)
                held += len(chunk)
                if held >= SPILL:
                    stream = stream or stack.enter_context(_file(body, folder))
                    await asyncio.to_thread(_write, stream, body.parts, hasher)
                    body.parts, held = [], 0
            if store or stream is not None:
                stream = stream or stack.enter_context(_file(body, folder))
                await asyncio.to_thread(_write, stream, body.parts, hasher)
                body.parts = []
                await asyncio.to_thread(_settle, stream, store)
        except BaseException:
            body.forget()
            raise
    body.digest = hasher.hexdigest() if hasher is not None else ""
    return body


async def _in_time(chunks: AsyncIterator[bytes], limits: Limits) -> AsyncIterator[bytes]:
    """The chunks, for as long as they come fast enough."""
    loop = asyncio.get_running_loop()
    began, size = loop.time(), 0
    while True:
        # Two rules: no long pause, and no steady trickle that would hold a connection for hours.
        patience = min(limits.idle_seconds, GRACE + size / limits.body_rate - (loop.time() - began))
        try:
            async with asyncio.timeout(max(patience, 0.01)):
                chunk = await anext(chunks, None)
        except TimeoutError:
            rule = f"must come at {limits.body_rate} bytes a second, without pauses of {limits.idle_seconds:g} s"
            raise HttpError(408, "body", rule, Plain(f"{size} bytes so far"), "", {"Connection": "close"}) from None
        if chunk is None:
            return
        size += len(chunk)
        if chunk:
            yield chunk


def _too_large(most: int, size: int) -> HttpError:
    way_out = "send fewer samples at a time, or ask the operator to raise the limit"
    return HttpError(
        413, "body", f"must have at most {most:,} bytes", Plain(f"{size:,}"), way_out, {"Connection": "close"}
    )


def _file(body: Body, folder: Path) -> BinaryIO:
    body.file = folder / f"body-{uuid.uuid4().hex}"
    return body.file.open("xb", buffering=SPILL)


def _write(stream: BinaryIO, parts: list[bytes], hasher: Any) -> None:
    for part in parts:
        if hasher is not None:
            hasher.update(part)
        stream.write(part)


def _settle(stream: BinaryIO, durable: bool) -> None:
    stream.flush()
    if durable:
        os.fsync(stream.fileno())


def taken_over(path: Path) -> BinaryIO:
    """A file that somebody wrote for us, opened. Its name is gone: nothing is left of it once it is closed."""
    stream = path.open("rb")
    path.unlink(missing_ok=True)
    return stream


async def file_pieces(stream: BinaryIO, size: int, most: int = 1 << 22) -> AsyncIterator[bytes]:
    """A file in pieces, read in a thread; it is closed behind the last.

    Args:
        stream: the file, open.
        size: how many of its bytes.
        most: bytes of a piece.
    """
    with stream:
        left = size
        while left > 0:
            piece = await asyncio.to_thread(stream.read, min(left, most))
            if not piece:
                return
            left -= len(piece)
            yield piece

"""Frames between the processes of one service: a JSON head and raw bytes over a socket pair. Nothing is pickled."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
import threading
from collections.abc import Mapping, Sequence
from typing import Any

_SIZES = struct.Struct("!QQ")
LIFELINE = "JACRAY_LIFELINE"


def encode(head: Mapping[str, Any], payload: Sequence[bytes | memoryview] = ()) -> bytes:
    """A frame's head and sizes; the payload follows as it is."""
    text = json.dumps(head, separators=(",", ":")).encode()
    return _SIZES.pack(len(text), sum(len(part) for part in payload)) + text


def send(sock: socket.socket, head: Mapping[str, Any], payload: Sequence[bytes | memoryview] = ()) -> None:
    """Write a frame; blocks until the other side has room."""
    start = encode(head, payload)
    if sum(len(part) for part in payload) < 1 << 16:
        sock.sendall(b"".join((start, *payload)))
        return
    sock.sendall(start)
    for part in payload:
        sock.sendall(part)


def receive(sock: socket.socket) -> tuple[Any, bytearray] | None:
    """Read a frame; None where the other side has left. The payload starts at a multiple of eight bytes in memory."""
    sizes = _exactly(sock, _SIZES.size)
    if sizes is None:
        return None
    head_size, payload_size = _SIZES.unpack(sizes)
    head, payload = _exactly(sock, head_size), _exactly(sock, payload_size)
    return None if head is None or payload is None else (json.loads(head), payload)


def _exactly(sock: socket.socket, size: int) -> bytearray | None:
    found = bytearray(size)
    view = memoryview(found)
    while view:
        count = sock.recv_into(view)
        if not count:
            return None
        view = view[count:]
    return found


async def read(stream: asyncio.StreamReader) -> tuple[Any, bytes]:
    """Read a frame on the event loop.

    Raises:
        asyncio.IncompleteReadError: the other side has left.
    """
    head_size, payload_size = _SIZES.unpack(await stream.readexactly(_SIZES.size))
    head = json.loads(await stream.readexactly(head_size))
    return head, await stream.readexactly(payload_size) if payload_size else b""


def hold_on(fd: int) -> None:
    """End this process when the one that started it is gone, whatever this one is doing then.

    Args:
        fd: the reading end of a pipe that only the parent can write to.
    """

    def wait() -> None:
        while os.read(fd, 1):
            pass
        os._exit(0)

    threading.Thread(target=wait, name="jacray-lifeline", daemon=True).start()

"""Processes that work for the service: started, fed over socket pairs, ended when they take too long."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jacray_workers.errors import FaultError

from jacray.http import channel

logger = logging.getLogger(__name__)

START_SECONDS = 120.0


class ProcessLostError(FaultError):
    """The process ended while it worked."""


class Process:
    """One child process that answers frames, one at a time.

    Args:
        module: what `python -m` runs; it takes the descriptors of a socket and of a lifeline.
        settings: the first frame.
        threads: torch threads.
    """

    def __init__(self, module: str, settings: Mapping[str, Any], threads: int) -> None:
        self.module, self.settings, self.threads = module, settings, threads
        self.pid = 0
        self.ready = False
        self._child: asyncio.subprocess.Process | None = None
        self._lifeline = -1

    async def start(self) -> None:
        """Start the process and wait until it has loaded what it needs.

        Raises:
            ProcessLostError: it ended before it was ready.
        """
        ours, theirs = socket.socketpair()
        reading, self._lifeline = os.pipe()
        fds = (theirs.fileno(), reading)
        try:
            self._child = await asyncio.create_subprocess_exec(
                sys.executable, "-m", self.module, *map(str, fds), pass_fds=fds, env=_environment(self.threads),
                stdin=asyncio.subprocess.DEVNULL,
            )  # fmt: skip
        finally:
            theirs.close()
            os.close(reading)
        self.pid = self._child.pid
        self.incoming, self.outgoing = await asyncio.open_connection(sock=ours, limit=1 << 22)
        async with asyncio.timeout(START_SECONDS):
            answer, _ = await self.exchange({**self.settings, "threads": self.threads})
        if "failed" in answer:
            raise ProcessLostError(answer["failed"]["detail"])
        self.ready = True

    async def exchange(self, head: Mapping[str, Any], payload: Sequence[bytes | memoryview] = ()) -> tuple[Any, bytes]:
        """Send a frame and wait for its answer.

        Raises:
            ProcessLostError: the process ended first.
        """
        await self.send(head, payload)
        return await self.receive()

    async def send(self, head: Mapping[str, Any], payload: Sequence[bytes | memoryview] = ()) -> None:
        """Send a frame.

        Raises:
            ProcessLostError: the process has ended.
        """
        try:
            self.outgoing.writelines([channel.encode(head, payload), *payload])
            await self.outgoing.drain()
        except (ConnectionError, OSError) as error:
            raise self._lost() from error

    async def receive(self) -> tuple[Any, bytes]:
        """Wait for a frame.

        Raises:
            ProcessLostError: the process ended first.
        """
        try:
            return await channel.read(self.incoming)
        except (asyncio.IncompleteReadError, ConnectionError, OSError) as error:
            raise self._lost() from error

    async def stop(self, grace: float = 0.0) -> None:
        """End the process: it is given so many seconds to leave by itself once its socket is closed."""
        self.ready = False
        child, self._child = self._child, None
        if hasattr(self, "outgoing"):
            self.outgoing.close()
        if child is not None:
            with contextlib.suppress(TimeoutError):
                if grace:
                    await asyncio.wait_for(child.wait(), grace)
            if child.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    child.kill()
            await child.wait()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1

    def _lost(self) -> ProcessLostError:
        return ProcessLostError(f"the process {self.module} ended unexpectedly")


def _environment(threads: int) -> dict[str, str]:
    """What a child inherits: our search path, its thread count, and large pages for torch's memory."""
    paths = os.pathsep.join(dict.fromkeys(path for path in sys.path if path))
    return {
        "OMP_WAIT_POLICY": "PASSIVE", "THP_MEM_ALLOC_ENABLE": "1", **os.environ, "PYTHONPATH": paths,
        "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1",
    }  # fmt: skip

"""`python -m benchmarks.service.load`: HTTP clients in a process of their own, until their input ends.

The first line of standard input says what to ask (`Load`, as JSON). When the input ends they wait for the answers that
are under way, and print what they counted as JSON. Only the standard library is loaded: it starts in a blink and costs
little beside the service that it shares the machine with.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class Load:
    """What the clients ask.

    Attributes:
        host, port: whom.
        requests: files with whole HTTP requests.
        connections: so many clients, each of which waits for its answer before it asks again; the first begins with
            the first request, the second with the second, and each goes on to the next.
        rate: requests a second of them all; None asks as fast as the answers come.
        settle: seconds at the beginning that do not count.
    """

    host: str
    port: int
    requests: Sequence[str]
    connections: int = 1
    rate: float | None = None
    settle: float = 0.0


@dataclass
class Counted:
    """What came of it.

    Attributes:
        seconds: from the end of settling to the end of the input.
        times: seconds that each answer within them took; where there is a rate, from when its request was due.
    """

    seconds: float = 0.0
    times: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.times) / self.seconds


@contextlib.contextmanager
def loading(load: Load) -> Iterator[Counted]:
    """Clients that ask while the block runs; what they counted is filled in at its end.

    Raises:
        RuntimeError: they failed, or an answer was not a success; their last words are in the text.
    """
    command = [sys.executable, "-m", "benchmarks.service.load"]
    process = subprocess.Popen(  # noqa: S603 - our own module
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert process.stdin is not None
    counted = Counted()
    try:
        process.stdin.write(json.dumps(asdict(load)) + "\n")
        process.stdin.flush()
        yield counted
        out, err = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    if process.returncode:
        raise RuntimeError(f"the clients failed:\n{err.strip()[-2000:]}")
    found = json.loads(out)
    counted.seconds, counted.times = found["seconds"], found["times"]


class Clients:
    """The clients of a load, on one event loop."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.bodies = [Path(name).read_bytes() for name in load.requests]
        self.stopped = asyncio.Event()
        self.counted = Counted()

    async def run(self) -> None:
        """Ask until told to stop."""
        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number in range(self.load.connections):
                group.create_task(self.client(number, began))
            await self.stopped.wait()
            self.counted.seconds = time.perf_counter() - began - self.load.settle

    async def client(self, number: int, began: float) -> None:
        """One connection."""
        reader, writer = await asyncio.open_connection(self.load.host, self.load.port)
        turn = 0
        while not self.stopped.is_set():
            due = await self.due(began, turn * self.load.connections + number)
            if self.stopped.is_set():
                break
            await ask(reader, writer, self.bodies[(number + turn) % len(self.bodies)])
            end = time.perf_counter()
            if end - began >= self.load.settle and not self.stopped.is_set():
                self.counted.times.append(end - due)
            turn += 1
        writer.close()

    async def due(self, began: float, count: int) -> float:
        """Wait until the count-th request may be sent; returns the moment from which its answer is waited for.

        Where there is a rate that is the moment it was due, also for one that an earlier answer held up: else a
        service that stands still for a second would count as one slow answer.
        """
        if self.load.rate is None:
            return time.perf_counter()
        due = began + count / self.load.rate
        left = due - time.perf_counter()
        if left > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopped.wait(), left)
        return due


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> bytes:
    """One round trip on an open connection; returns the answer's body.

    Raises:
        RuntimeError: the answer is not a success.
    """
    writer.write(body)
    head = await reader.readuntil(b"\r\n\r\n")
    found = LENGTH.search(head)
    answer = await reader.readexactly(int(found[1])) if found else b""
    if found is None or not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"not a success: {(head + answer)[:1000].decode(errors='replace')}")
    return answer


async def main() -> None:
    """Read what to ask, ask until the input ends, print."""
    told: dict[str, Any] = json.loads(sys.stdin.readline())
    clients, loop = Clients(Load(**told)), asyncio.get_running_loop()

    def until_the_end() -> None:
        while os.read(0, 4096):  # not sys.stdin's lock, which the interpreter wants when a client fails
            pass
        with contextlib.suppress(RuntimeError):  # the loop is closed: a client failed
            loop.call_soon_threadsafe(clients.stopped.set)

    threading.Thread(target=until_the_end, daemon=True).start()
    await clients.run()
    print(json.dumps(asdict(clients.counted)))


if __name__ == "__main__":
    asyncio.run(main())

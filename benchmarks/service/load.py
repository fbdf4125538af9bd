"""`python -m benchmarks.service.load`: HTTP clients in a process of their own, until their input ends.

The first line of standard input says what to ask (`Load`, as JSON). When the input ends they wait for the answers that
are under way, and print what they counted as JSON. Only the standard library is loaded: it starts in a blink and costs
little beside the service that it shares the machine with.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import re
import selectors
import socket
import subprocess
import sys
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
    """The clients of a load, in one loop over their sockets: what they cost is little beside what they ask for."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.bodies = [Path(name).read_bytes() for name in load.requests]
        self.counted = Counted()
        self.clients = [Client(number, load) for number in range(load.connections)]
        # `select` waits for microseconds where the others round up to milliseconds, which would make requests late.
        self.waiting = selectors.DefaultSelector() if load.rate is None else selectors.SelectSelector()
        self.due: list[tuple[float, int]] = []  # when whose next request may be sent, where there is a rate

    def run(self, end: int) -> None:
        """Ask until there is nothing left to read from the descriptor `end`.

        Raises:
            RuntimeError: an answer is not a success, or a connection ended.
        """
        self.began = time.perf_counter()
        self.waiting.register(end, selectors.EVENT_READ)
        for client in self.clients:
            self.waiting.register(client.socket, selectors.EVENT_READ, client)
            self.next(client)
        stopped = False
        while not stopped:
            for key, _ in self.waiting.select(self.patience()):
                if key.data is None:
                    stopped = stopped or not os.read(end, 4096)
                elif key.data.receive():
                    self.answered(key.data)
            self.send_due()
        self.counted.seconds = time.perf_counter() - self.began - self.load.settle
        for client in self.clients:
            client.finish()

    def next(self, client: Client) -> None:
        """Let a client's next request be sent: now, or when it is due."""
        if self.load.rate is None:
            self.ask(client, time.perf_counter())
        else:
            count = client.turn * self.load.connections + client.number
            heapq.heappush(self.due, (self.began + count / self.load.rate, client.number))

    def patience(self) -> float | None:
        """Seconds until the next request is due; None where none is."""
        return max(self.due[0][0] - time.perf_counter(), 0.0) if self.due else None

    def send_due(self) -> None:
        """Send what is due.

        An answer's time runs from the moment at which its request was due, also for one that an earlier answer held
        up: else a service that stands still for a second would count as one slow answer.
        """
        while self.due and self.due[0][0] <= time.perf_counter():
            due, number = heapq.heappop(self.due)
            self.ask(self.clients[number], due)

    def ask(self, client: Client, due: float) -> None:
        """Send a client's next request."""
        client.send(self.bodies[(client.number + client.turn) % len(self.bodies)], due)

    def answered(self, client: Client) -> None:
        """A client has its answer."""
        now = time.perf_counter()
        if now - self.began >= self.load.settle:
            self.counted.times.append(now - client.due)
        client.turn += 1
        self.next(client)


class Client:
    """One connection, which waits for its answer before it asks again."""

    def __init__(self, number: int, load: Load) -> None:
        self.number, self.turn, self.due = number, 0, 0.0
        self.socket = socket.create_connection((load.host, load.port), timeout=60.0)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.asked, self.come, self.size = False, b"", 0

    def send(self, body: bytes, due: float) -> None:
        """Send a whole request."""
        self.due, self.asked, self.come, self.size = due, True, b"", 0
        self.socket.sendall(body)

    def receive(self) -> bool:
        """Take what has come; returns whether the answer is whole.

        Raises:
            RuntimeError: it is not a success, or the connection ended.
        """
        piece = self.socket.recv(1 << 18)
        if not piece:
            raise RuntimeError("the service ended a connection")
        self.come = self.come + piece if self.come else piece
        if not self.size:
            end = self.come.find(b"\r\n\r\n")
            found = LENGTH.search(self.come, 0, end + 2) if end >= 0 else None
            if end >= 0 and (found is None or not self.come.startswith(b"HTTP/1.1 200")):
                raise RuntimeError(f"not a success: {self.come[:1000].decode(errors='replace')}")
            self.size = end + 4 + int(found[1]) if found is not None else 0
        self.asked = not 0 < self.size <= len(self.come)
        return not self.asked

    def finish(self) -> None:
        """Wait for the answer that is under way, and leave."""
        while self.asked:
            self.receive()
        self.socket.close()


def main() -> None:
    """Read what to ask, ask until the input ends, print."""
    told: dict[str, Any] = json.loads(open(0, "rb", buffering=0, closefd=False).readline())  # noqa: SIM115 - it is not ours to close
    clients = Clients(Load(**told))
    clients.run(0)
    print(json.dumps(asdict(clients.counted)))


if __name__ == "__main__":
    main()

"""What the server's processes hold while they are soaked: memory, open files, threads; and whether it stays flat."""

from __future__ import annotations

import statistics
import threading
import time
from dataclasses import dataclass, field

import psutil

GROWTH = 0.05
ROOM = 24 << 20
"""From the second quarter of the time to the last, the median of a process's own memory may grow by 5 % or 24 MiB,
whichever is more: allocators keep what they got, and a leak of 60 bytes a request would be more."""


@dataclass
class Process:
    """One process and what was seen of it.

    Attributes:
        name: the module it runs, and its pid.
        memory: at each look, the bytes that it shares with nobody.
        files, threads: likewise.
    """

    name: str
    times: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)

    def part(self, low: float, high: float, of: list[int]) -> float:
        """The median of what was seen between two fractions of the time."""
        first, last = self.times[0], self.times[-1]
        span = last - first
        found = [v for t, v in zip(self.times, of, strict=True) if first + low * span <= t <= first + high * span]
        return statistics.median(found)

    def growth(self) -> tuple[float, float]:
        """The memory of the second quarter, and of the last."""
        return self.part(0.25, 0.5, self.memory), self.part(0.75, 1.0, self.memory)

    def flat(self) -> bool:
        """Whether memory, files and threads stayed."""
        before, after = self.growth()
        files = self.part(0.75, 1.0, self.files) - self.part(0.25, 0.5, self.files)
        threads = self.part(0.75, 1.0, self.threads) - self.part(0.25, 0.5, self.threads)
        return after - before <= max(GROWTH * before, ROOM) and files <= 40 and threads <= 12


class Watch:
    """Looks at a process and all its children now and then, in a thread."""

    def __init__(self, pid: int, every: float) -> None:
        self.root, self.every = psutil.Process(pid), every
        self.seen: dict[int, Process] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look_often, name="soak-watch", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End."""
        self._stop.set()
        self._thread.join()

    def pids(self) -> set[int]:
        """The processes that there are now."""
        return {self.root.pid, *(child.pid for child in self.root.children(recursive=True))}

    def _look_often(self) -> None:
        while not self._stop.wait(self.every):
            for process in (self.root, *self.root.children(recursive=True)):
                try:
                    self._look(process)
                except psutil.Error:  # it ended meanwhile, or is not ours to look at
                    continue

    def _look(self, process: psutil.Process) -> None:
        with process.oneshot():
            memory, files, threads = process.memory_full_info().uss, process.num_fds(), process.num_threads()
        seen = self.seen.setdefault(process.pid, Process(f"{_name(process)} {process.pid}"))
        seen.times.append(time.monotonic())
        seen.memory.append(memory)
        seen.files.append(files)
        seen.threads.append(threads)


def _name(process: psutil.Process) -> str:
    words = process.cmdline()
    known = next((word for word in words if word.startswith("jacray.")), None)
    return known or (words[0].rsplit("/", 1)[-1][:40] if words else process.name())

"""One process's connection to Ray, shared by its clients: the last to leave closes what the first opened."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from jacray_workers.errors import RequestError

from jacray.executors.keeper import Keeper
from jacray.executors.options import WorkerOptions


@dataclass(frozen=True)
class Line:
    """How a connection is made, ended and looked for.

    Attributes:
        connect: opens one.
        disconnect: closes it.
        there: whether there is one, whoever opened it.
    """

    connect: Callable[[WorkerOptions], None]
    disconnect: Callable[[], None]
    there: Callable[[], bool]


class Lease:
    """This process's one connection to Ray, shared by its clients; the last to leave closes what the first opened."""

    _lock = threading.Lock()
    _keeper: Keeper | None = None
    _opened = WorkerOptions()
    _users = 0

    def __init__(self, keeper: Keeper | None, *, owned: bool) -> None:
        self._mine, self.owned = keeper, owned

    @classmethod
    def take(cls, options: WorkerOptions, line: Line) -> Lease:
        """Join the connection that there is, or open one.

        Raises:
            RequestError: the one that there is leads elsewhere, or was opened with another runtime environment.
        """
        address = options.address
        with cls._lock:
            if cls._keeper is not None and cls._keeper.failed:
                cls._keeper, cls._users = None, 0
            if cls._keeper is None and not line.there():
                cls._keeper, cls._opened = Keeper(lambda: line.connect(options), line.disconnect), options
            if cls._keeper is None:
                return cls(None, owned=False)
            opened = cls._opened.address
            if address.startswith("ray://") and address != opened:
                raise RequestError(
                    "address", "one process talks to one Ray at a time", address, f"close the client of {opened}"
                )
            if options.runtime_env and options.runtime_env != cls._opened.runtime_env:
                raise RequestError(
                    "runtime_env", "must be the same for every client of a process", dict(options.runtime_env),
                    "give it to the first client, or close that one",
                )  # fmt: skip
            cls._users += 1
            return cls(cls._keeper, owned=opened == "local")

    def wait(self) -> None:
        """Wait until the connection stands."""
        if self._mine is not None:
            self._mine.wait()

    def give_back(self) -> None:
        """Leave; close the connection if nobody else is on it."""
        with Lease._lock:
            if self._mine is None or self._mine is not Lease._keeper:
                return
            Lease._users -= 1
            if Lease._users == 0:
                Lease._keeper = None
                self._mine.stop()

"""A thread that opens something, holds it, and closes it."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Keeper(threading.Thread):
    """Opens something in a thread that lives as long as the thing.

    Linux ends a child process when the thread that started it ends. So a Ray started from a caller's short-lived
    thread would die with that thread; one started from here does not, and still goes down with the process.

    Args:
        open_it: called in the thread, once.
        close_it: called in the thread when `stop` is, unless opening failed.
    """

    def __init__(self, open_it: Callable[[], None], close_it: Callable[[], None]) -> None:
        super().__init__(name="jacray-keeper", daemon=True)
        self._open_it, self._close_it = open_it, close_it
        self._opened, self._stop_now = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        """Open, wait, close."""
        try:
            self._open_it()
        except BaseException as error:  # noqa: BLE001  (raised again in whoever waits)
            self._error = error
            return
        finally:
            self._opened.set()
        self._stop_now.wait()
        self._close_it()

    def wait(self) -> None:
        """Wait until it is open.

        Raises:
            BaseException: what opening raised.
        """
        self._opened.wait()
        if self._error is not None:
            raise self._error

    @property
    def failed(self) -> bool:
        """Whether opening failed."""
        return self._opened.is_set() and self._error is not None

    def stop(self) -> None:
        """Close, and wait until it is closed."""
        self._opened.wait()
        self._stop_now.set()
        self.join()

"""Ctrl-C once stops a command in order; again, at once. A request to terminate counts as Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from jacray.cli.failures import INTERRUPTED

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Inside, the first signal raises `KeyboardInterrupt` and the second ends the process without looking back.

    What the process started ends with it: Ray's processes are told by Linux when their parent is gone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = False

    def hear(_number: int, _frame: FrameType | None) -> None:
        nonlocal heard
        if heard:
            os._exit(INTERRUPTED)
        heard = True
        # The lowest level there is: the signal may have come in the middle of any other print.
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"\njacray: stopping; again to stop at once\n")
        raise KeyboardInterrupt

    before = {number: signal.signal(number, hear) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            # Once stopping, the second signal may also come while the process takes leave: it still ends it at once.
            signal.signal(number, signal.SIG_DFL if heard else handler)

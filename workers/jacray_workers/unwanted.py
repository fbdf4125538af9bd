"""Long work that hears when it is no longer wanted: who runs it says how to ask, and its loops look now and then.

A chunk may take many seconds, and between chunks is then too seldom to ask. Nothing can end a kernel's one call of an
operator from outside, but between a sample's rows, the nodes of a graph and the passes of an iteration there is time.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

_asked = threading.local()


@contextlib.contextmanager
def listening(ask: Callable[[], None]) -> Iterator[None]:
    """Inside, and in this thread, `look` calls `ask`, which raises where the work is no longer wanted."""
    before = getattr(_asked, "ask", None)
    _asked.ask = ask
    try:
        yield
    finally:
        _asked.ask = before


def look() -> None:
    """See whether this work is still wanted.

    Raises:
        JobError: it is not.
    """
    ask = getattr(_asked, "ask", None)
    if ask is not None:
        ask()

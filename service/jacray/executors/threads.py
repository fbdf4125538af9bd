"""torch's thread count, set for a while."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

_lock = threading.Lock()
_depth = 0
_outside = 0


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Compute with `count` threads inside.

    The count is partly the calling thread's own (OpenMP's and MKL's) and partly the process's. So every thread sets
    it for itself, and the process's is put back by the last to leave: each restoring what it found would leave the
    process with another's setting where two overlap.
    """
    before = _enter()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        _leave(before)


def _enter() -> int:
    global _depth, _outside  # noqa: PLW0603  (the count itself is global)
    # The first look in a thread gives it the process's count, over one that was set for it before.
    found = torch.get_num_threads()
    with _lock:
        if _depth == 0:
            _outside = found
        _depth += 1
        return _outside


def _leave(before: int) -> None:
    global _depth  # noqa: PLW0603
    with _lock:
        _depth -= 1
        torch.set_num_threads(before)

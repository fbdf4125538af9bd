"""What torch has once for a whole process, and how several threads that differentiate get along with it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

_forward = threading.RLock()
_generators = threading.RLock()
_lock = threading.Lock()
_inside = 0
_attention = contextlib.ExitStack()


@contextlib.contextmanager
def own_draws() -> Iterator[None]:
    """The global random generators, for whoever seeds them, or looks whether somebody draws from them.

    They are the process's: between one thread's seed and its draws another's would change the numbers of both.
    """
    with _generators:
        yield


@contextlib.contextmanager
def forward_mode() -> Iterator[None]:
    """Forward mode, one thread at a time.

    torch counts the levels of dual numbers for the whole process: two threads at once get errors, or crash it.
    """
    with _forward:
        yield


def in_forward_mode() -> bool:
    """Whether this thread differentiates forward now; that another one does is no concern of its own."""
    level: int = torch.autograd.forward_ad._current_level
    if level < 0:
        return False
    if not _forward.acquire(blocking=False):  # held by another thread, which opened that level
        return False
    _forward.release()
    return True


@contextlib.contextmanager
def math_attention() -> Iterator[None]:
    """Attention by the unfused kernel: only that one has rules for vmap, for forward mode and for a second backward.

    The choice is the process's: the first thread that wants it makes it, the last that leaves takes it back.
    """
    global _inside  # noqa: PLW0603 - it counts for the whole process, as torch's own flags do
    with _lock:
        if not _inside:
            _attention.enter_context(sdpa_kernel(SDPBackend.MATH))
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _attention.close()

"""The C library's heap: how much of what was freed stays with the process for what comes next."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from typing import Any

# Blocks up to MAPPED bytes, the most that glibc takes, come from the heap, of which up to KEPT stay when all is freed.
MAPPED, KEPT = 1 << 25, 1 << 28
# The share of a memory budget that may stay.
SHARE = 1 / 16
# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
_TUNABLES = ("malloc.trim_threshold", "malloc.mmap_threshold")
# What the library was told last; empty while it goes by itself.
_told: list[int] = []


def settle(budget: int) -> None:
    """Keep memory of medium size for what comes next, as far as that is little beside a budget of so many bytes.

    What a chunk makes is freed at its end, and glibc hands it back to the system at once: the next chunk's first writes
    then wait for the same pages to be cleared and mapped, which takes as long as its arithmetic. Where the user has set
    these bounds in the environment they stay; so they do where the budget is small.

    Source: mallopt(3).
    """
    share = min(int(budget * SHARE), KEPT)
    if _told == [share] or (share < MAPPED and not _told):
        return
    change = _libc("mallopt")
    if change is not None and not _set_by_user():
        change(_M_MMAP_THRESHOLD, MAPPED)
        change(_M_TRIM_THRESHOLD, share)
        _told[:] = [share]


def give_back() -> None:
    """Give everything that was freed back to the system."""
    trim = _libc("malloc_trim")
    if trim is not None:
        trim(0)


def _set_by_user() -> bool:
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return any(name in os.environ for name in _VARIABLES) or any(name in tunables for name in _TUNABLES)


@functools.cache
def _libc(name: str) -> Callable[..., Any] | None:
    """A function of glibc; other C libraries may have none of this name."""
    try:
        found: Callable[..., Any] = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):
        return None
    return found

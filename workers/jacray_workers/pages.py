"""Memory for results: huge pages where the system has them, used again once nobody holds what was in it.

Fresh memory is dear: the system clears it and maps it page by page when it is first written, which takes many times as
long as the writing. A large result therefore lies in a mapping of its own that asks for huge pages; when the last
tensor on it is gone, the mapping is kept for the next result, and the system is told that it may take the pages back
whenever it needs them (`MADV_FREE`). Nothing is ever handed out while a tensor, a view or an array still lies on it.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import psutil
import torch
from torch import Tensor

HUGE = 1 << 21
# Below this the allocator of the C library reuses memory by itself.
LEAST = 1 << 20
# The share of the machine's memory that idle mappings may take.
SHARE = 1 / 8
_ADVICE = ("MADV_HUGEPAGE", "MADV_FREE")


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Like `torch.empty`; on the CPU, where it is large, in memory that an earlier result may have used."""
    size = math.prod(shape) * dtype.itemsize
    if size < LEAST or (device is not None and device.type != "cpu") or not all(hasattr(mmap, a) for a in _ADVICE):
        return torch.empty(shape, dtype=dtype, device=device)
    return _POOL.take(size, dtype).view(shape)


def like(t: Tensor, shape: Sequence[int]) -> Tensor:
    """Memory of another tensor's type on its device, for something in between that may be large."""
    small = math.prod(shape) * t.dtype.itemsize < HUGE
    return torch.empty(shape, dtype=t.dtype, device=t.device) if small else empty(shape, t.dtype, t.device)


def reshaped(t: Tensor, shape: Sequence[int]) -> Tensor:
    """`t.reshape(shape)`, a copy only where there is no view."""
    if t.nbytes < HUGE or t.is_contiguous():
        return t.reshape(shape)
    try:
        return t.view(shape)
    except RuntimeError:
        return like(t, t.shape).copy_(t).view(shape)


class _Pool:
    """Mappings without a user, the one used last at the end."""

    def __init__(self) -> None:
        # Reentrant: a tensor may be collected, and come back here, while this very thread holds it.
        self._lock = threading.RLock()
        self._idle: list[mmap.mmap] = []
        self._most = int(psutil.virtual_memory().total * SHARE)

    def take(self, size: int, dtype: torch.dtype) -> Tensor:
        """A flat tensor of so many bytes."""
        pages = self._found(size) or _mapped(size)
        lease = (ctypes.c_char * size).from_buffer(pages)
        # Every tensor on the memory holds the lease, so this is called when the last one is gone.
        weakref.finalize(lease, self._give_back, pages).atexit = False
        return torch.frombuffer(lease, dtype=dtype)

    def release(self) -> None:
        """Let go of every idle mapping."""
        with self._lock:
            self._idle.clear()

    def _found(self, size: int) -> mmap.mmap | None:
        with self._lock:
            # Not a much larger one: what is idle in it would be kept from others.
            fits = [pages for pages in self._idle if size <= len(pages) <= 2 * size + HUGE]
            if not fits:
                return None
            best = min(reversed(fits), key=len)
            self._idle = [pages for pages in self._idle if pages is not best]
            return best

    def _give_back(self, pages: mmap.mmap) -> None:
        pages.madvise(mmap.MADV_FREE)
        with self._lock:
            self._idle.append(pages)
            held = sum(map(len, self._idle))
            while held > self._most:
                held -= len(self._idle.pop(0))


def _mapped(size: int) -> mmap.mmap:
    flags: Any = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    try:
        pages = mmap.mmap(-1, -(-size // HUGE) * HUGE, flags=flags)
    except OSError as error:
        raise MemoryError(f"cannot map {size} bytes: {error}") from error
    pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


_POOL = _Pool()


def release() -> None:
    """Give the memory of dropped results back to the system now."""
    _POOL.release()

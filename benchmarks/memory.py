"""How much memory a call takes, as the system sees it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def available() -> int:
    """Bytes of main memory that can be had without swapping."""
    return int(psutil.virtual_memory().available)


def peak_of(call: Callable[[], Any], device: str = "cpu") -> int | None:
    """The growth of memory at its highest while a call runs, its result included; None where unknown."""
    return watched(call, device)[1]


def watched(call: Callable[[], Any], device: str = "cpu") -> tuple[Any, int | None]:
    """What a call returns, and the growth of memory at its highest while it runs; None where that is unknown.

    On a GPU the allocator's count; in main memory the process's resident memory, of which Linux keeps a high-water mark
    that a write of 5 to `clear_refs` sets back. Memory that an allocator kept from earlier calls is given back to the
    system first, so that it does not hide what this one takes.
    """
    trim()
    if device != "cpu":
        return _watched_on(call, device)
    try:
        _CLEAR.write_text("5")
        before = _field("VmRSS")
    except OSError:
        return call(), None
    result = call()
    return result, max(_field("VmHWM") - before, 0)


def _watched_on(call: Callable[[], Any], device: str) -> tuple[Any, int]:
    import torch

    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    return result, int(torch.cuda.max_memory_allocated(device)) - before


def trim() -> None:
    """Drop garbage, and have the C library give free memory back where it can."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _field(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {name}")


def nbytes(result: Any) -> int:
    """Bytes of the tensors in a result, once per piece of memory; factors count as what they hold."""
    seen: dict[int, int] = {}
    _collect(result, seen)
    return sum(seen.values())


def _collect(value: Any, seen: dict[int, int]) -> None:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            _collect(item, seen)
    elif hasattr(value, "nbytes_factored"):
        factors = value.factors()
        _collect(factors, seen) if factors else seen.update({id(value): value.nbytes_factored})
    elif hasattr(value, "untyped_storage"):
        storage = value.untyped_storage()
        # What is kept alive is the storage; what was asked for is the elements. A view of much more counts as itself.
        seen[storage.data_ptr()] = max(seen.get(storage.data_ptr(), 0), min(storage.nbytes(), value.nbytes))
    elif hasattr(value, "nbytes"):
        seen[id(value)] = int(value.nbytes)

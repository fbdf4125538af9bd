"""What the machine can do, measured in the run that uses it: products of matrices and writes to memory."""

from __future__ import annotations

import contextlib
import datetime as dt
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

WRITTEN = 1 << 29  # bytes per measured write: far above any cache
SIDE = 2048  # of the square matrices
PACKAGES = (
    "torch", "numpy", "jax", "jaxlib", "backpack-for-pytorch", "torchjd", "laplace-torch", "asdfghjkl", "nngeometry",
    "opacus", "transformers",
)  # fmt: skip
SETTINGS = ("THP_MEM_ALLOC_ENABLE", "GLIBC_TUNABLES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "JAX_PLATFORMS")


def best(call: Callable[[], Any], seconds: float, at_least: int = 3, settle: Callable[[], Any] = lambda: None) -> float:
    """The shortest of several calls, over at least this many seconds; `settle` waits for what a call left running."""
    call()
    settle()
    shortest, count, began = float("inf"), 0, time.perf_counter()
    while count < at_least or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        call()
        settle()
        shortest = min(shortest, time.perf_counter() - start)
        count += 1
    return shortest


def waiter(device: str | torch.device) -> Callable[[], Any]:
    """What waits until a device has done all that it was given."""
    where = torch.device(device)
    return (lambda: torch.cuda.synchronize(where)) if where.type == "cuda" else (lambda: None)


def matrix_rate(seconds: float = 1.0, device: str = "cpu", side: int = SIDE) -> float:
    """Floating-point operations per second: the best float32 product of two square matrices, into a buffer."""
    a, b, out = (torch.randn(side, side, device=device) for _ in range(3))
    return 2 * side**3 / best(lambda: torch.mm(a, b, out=out), seconds, settle=waiter(device))


def write_rate(seconds: float = 1.0, device: str = "cpu", size: int = WRITTEN) -> float:
    """Bytes per second into memory that is already mapped, by torch's fill on all its threads.

    It bounds every method from below, also those that must first be given fresh memory by the system. Of ones: some
    machines write zeros several times faster than anything else.
    """
    buffer = torch.zeros(size // 4, device=device)
    return size / best(lambda: buffer.fill_(1.0), seconds, settle=waiter(device))


def fresh_write_rate(seconds: float = 1.0, device: str = "cpu", size: int = WRITTEN) -> float:
    """Bytes per second of torch's fill into memory that the system has to map first, as a new result needs it."""
    return size / best(lambda: torch.empty(size // 4, device=device).fill_(1.0), seconds, settle=waiter(device))


def copy_rate(seconds: float = 1.0, device: str = "cpu", size: int = WRITTEN) -> float:
    """Bytes written per second by a copy within one memory; as many are read."""
    source, target = (torch.ones(size // 4, device=device) for _ in range(2))
    return size / best(lambda: target.copy_(source), seconds, settle=waiter(device))


def home_rate(seconds: float = 1.0, device: str = "cuda", size: int = WRITTEN) -> float:
    """Bytes per second from a GPU into page-locked main memory: what the bus carries."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty(size // 4, pin_memory=True)
    return size / best(lambda: target.copy_(source, non_blocking=True), seconds, settle=waiter(device))


def rates(seconds: float = 1.0, device: str = "cpu") -> dict[str, float]:
    """All three rates."""
    return {
        "operations_per_second": matrix_rate(seconds, device),
        "bytes_per_second": write_rate(seconds, device),
        "fresh_bytes_per_second": fresh_write_rate(seconds, device),
    }


def describe() -> dict[str, Any]:
    """The machine, the versions and the settings of this process, as plain data."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "versions": {name: _version(name) for name in PACKAGES},
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
        "huge_pages": _huge_pages(),
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "load": os.getloadavg()[0],
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _huge_pages() -> str:
    with contextlib.suppress(OSError, IndexError):
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        return text.split("[")[1].split("]")[0]
    return "unknown"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"

"""How much memory there is, how much a piece of work takes, and how many samples therefore fit at once."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from jacray_workers import pages
from jacray_workers.planning import heap
from jacray_workers.planning.watching import Watcher

# What is left to the system, to fragmentation and to kernels' own workspaces when no budget is given.
SAFE_SHARE = 0.5
# The fit sees tensors, not the workspaces inside kernels or the allocator's slack.
SLACK = 1.25
# Plans below this share of the budget are taken at their word; what few samples promise has been wrong by ten times.
NEAR = 1 / 16
# Kernels that copy what they take and what they make into a layout of their own.
_COPYING = frozenset((torch.ops.aten.convolution, torch.ops.aten.convolution_backward))
# What torch and the libraries below it say when memory runs out, where they have no class of their own for it.
_WORDS = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "Cannot allocate memory", "std::bad_alloc")


def free_bytes(device: torch.device) -> int:
    """Bytes that can be had now: of the GPU, or of main memory within this process's control group."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(int(psutil.virtual_memory().available), _cgroup_free())


def _cgroup_free() -> int:
    """What the control group (a container's limit) leaves, or a very large number where there is no limit."""
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        return limit - int(Path("/sys/fs/cgroup/memory.current").read_text())
    return 1 << 60


def measure(work: Callable[[], Any], device: torch.device, given: Sequence[Any] = ()) -> int:
    """The peak bytes of tensors alive at once that `work` made, beyond those that stood before.

    Of what stood before a view made under the call looks like new memory, unless it is among `given`: the inputs, of
    which a chunk is a slice, may be far larger than all that a chunk makes.

    On a GPU the allocator's own count; on a CPU every storage made under the call is watched from birth to death, which
    is exact for tensors and the same on every run.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before: int = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    watch = _Watch(given)
    with watch:
        work()
    return watch.peak


class _Watch(Watcher):
    """Counts the bytes of live storages that appear under it."""

    def __init__(self, given: Sequence[Any] = ()) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known = {t.untyped_storage()._cdata for t in given if isinstance(t, Tensor)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [t for t in (result if isinstance(result, tuple | list) else (result,)) if type(t) is Tensor]
        for tensor in made:
            self._see(tensor)
        if getattr(func, "_overloadpacket", None) in _COPYING:
            given = [t for t in args if isinstance(t, Tensor)]
            self.peak = max(self.peak, self.live + sum(t.nbytes for t in (*given, *made)))
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


@dataclass(frozen=True)
class Line:
    """Peak bytes as a line in the number of samples: `base + slope * samples`."""

    base: float
    slope: float

    def at(self, samples: int) -> int:
        """Predicted peak bytes, with slack."""
        return math.ceil((self.base + self.slope * samples) * SLACK)

    def fit_in(self, budget: int) -> int:
        """The most samples whose predicted peak stays within the budget; 0 where not even one does."""
        if self.at(1) > budget:
            return 0
        room = budget / SLACK - self.base
        return 1 << 40 if self.slope <= 0 else max(1, int(room / self.slope))


def fit(points: Sequence[tuple[int, int]]) -> Line:
    """The line through two measurements (samples, peak bytes); never one that falls."""
    (n0, b0), (n1, b1) = points[0], points[-1]
    slope = max((b1 - b0) / (n1 - n0), 0.0) if n1 != n0 else b0 / n0
    return Line(max(b0 - slope * n0, 0.0), slope)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or in main memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, RuntimeError):
        return any(words in str(error) for words in _WORDS)
    # An error that was raised with another as its cause says what that one said.
    return error.__cause__ is not None and out_of_memory(error.__cause__)


def release(device: torch.device) -> None:
    """After running out: give back what the failed attempt still holds."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        trim()


def resident() -> int:
    """Bytes of main memory that this process holds now."""
    return int(_process(os.getpid()).memory_info().rss)


def trim() -> None:
    """Give memory back to the system that the C library and idle buffers hold for later.

    The C library keeps up to tens of megabytes of what was freed, and more between what is still in use: nothing beside
    gigabytes, and a good part of a small budget.
    """
    pages.release()
    heap.give_back()


class Keeper:
    """Between the chunks of a job that comes near its budget, gives back what is held for later beyond half of it."""

    def __init__(self, peak: int, budget: int, device: torch.device) -> None:
        near = device.type == "cpu" and peak > budget * NEAR
        heap.settle(budget)
        self._most = resident() + budget // 2 if near else 0

    def look(self) -> None:
        """Look, and give back where it is much."""
        if self._most and resident() > self._most:
            trim()


@functools.cache
def _process(pid: int) -> psutil.Process:
    return psutil.Process(pid)

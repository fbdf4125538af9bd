"""Results on their way from a GPU to main memory, while the GPU computes on.

A copy into ordinary memory holds the GPU up and runs at a fraction of the bus. So a block goes piece by piece through
two page-locked slots: the bus fills one on a stream of its own while a thread empties the other into the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

SLOTS = 2
SLOT_BYTES = 1 << 25  # large enough that the bus runs at its full rate, small enough to be locked at once


class Landing:
    """Copies values into targets in the order they are handed over; `wait` returns when all have arrived.

    Values are put chunk by chunk. A chunk's are held on the device while the next chunk is computed and no longer: its
    first `put` waits until those before have arrived. So a chunk needs one chunk's blocks beside its own.
    """

    def __init__(self, device: torch.device, *, slot_bytes: int = SLOT_BYTES) -> None:
        """Nothing is locked or started before the first value.

        Args:
            device: where the values are. On the CPU the same steps are taken without page locks and streams.
            slot_bytes: size of a slot.
        """
        self._device = device
        self._slot_bytes = slot_bytes
        self._cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._cuda else None
        self._slots: list[Tensor] = []
        self._thread: ThreadPoolExecutor | None = None
        self._before: list[Future[None]] = []
        self._now: list[Future[None]] = []

    def put(self, target: Tensor, value: Tensor) -> None:
        """Copy `value` into `target`, of the same shape, some time before `wait` returns.

        The value's memory must not be written to before the chunk after the next begins.

        Raises:
            Exception: what an earlier copy raised.
        """
        # Made contiguous and of the target's type where it is: the bus should carry whole stretches.
        ready = value.detach().to(target.dtype).contiguous()
        event = None
        if self._cuda:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))
        _arrived(self._before)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="jacray-landing")
        self._now.append(self._thread.submit(self._copy, target, ready, event))

    def turn(self) -> None:
        """A chunk ends here.

        Raises:
            Exception: what a copy of the chunk before raised.
        """
        _arrived(self._before)
        self._before, self._now = self._now, []

    def wait(self) -> None:
        """Return when everything that was put has arrived.

        Raises:
            Exception: what a copy raised.
        """
        _arrived(self._before)
        _arrived(self._now)

    def close(self) -> None:
        """Wait without a word about what failed, and end the thread."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
            self._thread = None
        self._slots.clear()
        self._before, self._now = [], []

    def _copy(self, target: Tensor, value: Tensor, event: Any) -> None:
        if not target.is_contiguous():
            whole = torch.empty_like(target, memory_format=torch.contiguous_format)
            self._copy(whole, value, event)
            target.copy_(whole)
            return
        pending: list[tuple[Tensor, Tensor, Any]] = []
        for turn, (to, piece) in enumerate(_pieces(target, value, self._slot_bytes)):
            slot = self._slot(turn % SLOTS)[: piece.numel() * piece.element_size()].view(piece.dtype)
            pending.append((to, slot, self._fetch(slot, piece, event)))
            if len(pending) == SLOTS:
                _land(*pending.pop(0))
        while pending:
            _land(*pending.pop(0))

    def _fetch(self, slot: Tensor, piece: Tensor, event: Any) -> Any:
        """Start filling a slot; what is returned tells when it is full."""
        if self._stream is None:
            slot.copy_(piece)
            return None
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(event)
            slot.copy_(piece, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self._stream)
        return done

    def _slot(self, index: int) -> Tensor:
        while len(self._slots) <= index:
            self._slots.append(torch.empty(self._slot_bytes, dtype=torch.uint8, pin_memory=self._cuda))
        return self._slots[index]


def _arrived(copies: list[Future[None]]) -> None:
    """Wait for these, in order, and forget each: one that failed is told of once."""
    while copies:
        copies.pop(0).result()


def _pieces(target: Tensor, value: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Matching flat stretches of both, of at most `size` bytes."""
    to, source = target.view(-1), value.view(-1)
    step = max(1, size // value.element_size())
    for start in range(0, source.numel(), step):
        yield to[start : start + step], source[start : start + step]


def _land(to: Tensor, slot: Tensor, done: Any) -> None:
    if done is not None:
        done.synchronize()
    to.copy_(slot)

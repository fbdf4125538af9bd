"""A model that meets with accidents: at chosen samples, a chosen number of times."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from tests.toys import Identity


class Careful(nn.Module):
    """A small net that takes its time and steps into traps.

    A trap is a file `KIND-SAMPLE-TIMES` in a folder. The first number of each sample says which sample it is.

    Args:
        traps: the folder.
        seconds: how long a call takes at least.
    """

    def __init__(self, traps: str, seconds: float = 0.01) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
        self.traps, self.seconds = traps, seconds

    def forward(self, x: Tensor) -> Tensor:
        return self.net(_Step.apply(x, self.traps, self.seconds))


class _Step(Identity):
    """The identity, which springs the traps of the samples that it sees."""

    @staticmethod
    def forward(x: Tensor, traps: str, seconds: float) -> Tensor:
        time.sleep(seconds)
        samples = {round(float(first)) for first in x.detach().reshape(-1, x.shape[-1])[:, 0]}
        for trap in Path(traps).glob("*-*-*"):
            kind, sample, times = trap.name.split("-")
            if int(sample) in samples and _takes(trap, int(times)):
                _act(kind)
        return x.clone()


def _takes(trap: Path, times: int) -> bool:
    """Whether the trap springs once more, counted over all processes."""
    used = trap.parent / "used"
    used.mkdir(exist_ok=True)
    for use in range(times):
        with contextlib.suppress(FileExistsError):
            with (used / f"{trap.name}-{use}").open("x") as mark:
                mark.write(str(os.getpid()))
            return True
    return False


def _act(kind: str) -> None:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "hang":
        time.sleep(10_000)
    if kind == "compute":  # one call into torch that takes half a minute or more, and hears nothing
        points = torch.zeros(2000, 1000, dtype=torch.float64)
        torch.cdist(points, points + 1, p=3.5)
    if kind == "raise":
        raise ValueError("poison")
    if kind == "memory":
        torch.empty(1 << 50, dtype=torch.uint8)


def set_trap(traps: Path, kind: str, sample: int, times: int = 1) -> None:
    """Lay a trap; springs so many times in all."""
    traps.mkdir(parents=True, exist_ok=True)
    (traps / f"{kind}-{sample}-{times}").touch()


def sprung(traps: Path) -> int:
    """How many times traps sprang."""
    return len(list((traps / "used").glob("*"))) if (traps / "used").is_dir() else 0


def caught(traps: Path) -> list[int]:
    """The processes that stepped into traps."""
    marks = [mark.read_text() for mark in (traps / "used").glob("*")] if (traps / "used").is_dir() else []
    return sorted({int(text) for text in marks if text})


def make(traps: str, seconds: float = 0.01) -> Careful:
    """The factory that specs name."""
    return Careful(traps, seconds)

"""Models that show what happens to them: they wait, fail, end their process, or tell where their memory lies.

They behave only where jobs are computed, not where they are checked and planned, so a test can submit them.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from pathlib import Path

import torch
from torch import Tensor, nn


def mlp(sizes: tuple[int, ...] = (5, 16, 3), seed: int = 0) -> nn.Sequential:
    """A smooth net with fixed weights."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Scaled(nn.Module):
    """A model whose numbers a plain attribute decides."""

    def __init__(self, scale: float = 2.0) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.scale = scale
        self.names = {"b", "a", "c"}

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale


def scaled(scale: float = 2.0) -> Scaled:
    torch.manual_seed(0)
    return Scaled(scale)


class Toy(nn.Module):
    """A linear layer that knows whether it is in a job's worker, a process or a thread."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(5, 3)
        self.home = (os.getpid(), threading.get_ident())

    @property
    def at_work(self) -> bool:
        return (os.getpid(), threading.get_ident()) != self.home

    def forward(self, x: Tensor) -> Tensor:
        if self.at_work:
            self.work(x)
        return torch.tanh(self.linear(x))

    def work(self, x: Tensor) -> None:
        raise NotImplementedError


class Gated(Toy):
    """Waits for a file before it computes."""

    def __init__(self, gate: Path) -> None:
        super().__init__()
        self.gate = gate

    def work(self, x: Tensor) -> None:
        while not self.gate.exists():
            time.sleep(0.01)


class KillsOnce(Toy):
    """Ends its process by SIGKILL the first time it works after the gate has opened."""

    def __init__(self, mark: Path) -> None:
        super().__init__()
        self.mark = mark

    def work(self, x: Tensor) -> None:
        try:
            self.mark.touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)


class KillsAlways(Toy):
    """Ends every process that computes it."""

    def work(self, x: Tensor) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class MineError(Exception):
    """An error class of the user's own, with more than a message."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(code, text)
        self.code = code

    def __str__(self) -> str:
        return f"{self.args[1]} (code {self.code})"


class Raises(Toy):
    """Raises the user's own error."""

    def work(self, x: Tensor) -> None:
        raise MineError(7, "the reactor is cold")


class Scales(nn.Module):
    """Writes into its own parameters before each use, so that every worker that shares them would see others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.linear.weight.data.mul_(2)
        return torch.tanh(self.linear(x))


class ScalesAtWork(Toy):
    """Writes into its own parameters on workers only."""

    def work(self, x: Tensor) -> None:
        self.linear.weight.data.mul_(2)


class Deep(nn.Module):
    """Takes its time: every row is pulled back through many layers, each a matter of milliseconds."""

    def __init__(self, layers: int = 60, width: int = 1024) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.inner = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x))


class WhereMemoryLies(nn.Module):
    """Three outputs of 1 or 0 times the input: parameter, buffer and plain attribute in memory shared by processes."""

    def __init__(self) -> None:
        super().__init__()
        self.parameter = nn.Parameter(torch.ones(1000))
        self.register_buffer("buffer", torch.ones(1000))
        self.attribute = torch.ones(1000)

    def forward(self, x: Tensor) -> Tensor:
        held = (self.parameter, self.buffer, self.attribute)
        return x.sum(dim=-1, keepdim=True) * torch.tensor([float(shared(t)) for t in held])


def shared(tensor: Tensor) -> bool:
    """Whether a tensor's memory is mapped from the object store of Ray."""
    address = tensor.untyped_storage().data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(part, 16) for part in line.split()[0].split("-"))
        if low <= address < high:
            return "plasma" in line
    return False


class Poisoned(nn.Module):
    """Raises at samples whose first number is above a bound, for as long as a file is there."""

    def __init__(self, poison: Path, bound: float = 30.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(5, 3)
        self.poison = str(poison)
        self.bound = bound

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(Checked.apply(x, self.poison, self.bound)))


class Identity(torch.autograd.Function):
    """The derivatives of the identity, which sees its numbers as they are, also under vmap; two more arguments."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(_ctx, g):
        return g, None, None

    @staticmethod
    def jvp(_ctx, t, *_):
        return t


class Checked(Identity):
    """The identity, which raises at numbers beyond a bound."""

    @staticmethod
    def forward(x: Tensor, poison: str, bound: float) -> Tensor:
        if Path(poison).exists() and float(x.detach().max()) > bound:
            raise ValueError("poison")
        return x.clone()


class Waits(nn.Module):
    """Waits for a file where it sees a sample; the same everywhere, so that one plan serves all."""

    def __init__(self, gate: Path, sample: Tensor) -> None:
        super().__init__()
        self.net = mlp()
        self.gate = str(gate)
        self.register_buffer("sample", sample.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(Held.apply(x, self.sample, self.gate))


class Held(Identity):
    """The identity, which waits for a file where it sees a sample."""

    @staticmethod
    def forward(x: Tensor, sample: Tensor, gate: str) -> Tensor:
        while not Path(gate).exists() and bool((x == sample).all(-1).any()):
            time.sleep(0.02)
        return x.clone()


class Scarce(nn.Module):
    """Runs out of memory for more samples than `most` at a time, once `armed`; counts the samples that it computed.

    Args:
        most: samples.
        error: what it says then.
        copies: how often its outputs are repeated.
    """

    def __init__(self, most: int, error: Exception, copies: int = 1) -> None:
        super().__init__()
        self.most, self.error, self.copies = most, error, copies
        self.seen: list[int] = []
        self.armed = [False]

    def forward(self, x: Tensor) -> Tensor:
        if self.armed[0]:
            if x.shape[0] > self.most:
                raise self.error
            self.seen.append(x.shape[0])
        return torch.cat([x.pow(3).cumsum(dim=1)] * self.copies, dim=1)

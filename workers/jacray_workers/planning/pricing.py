"""What a method costs, from the shapes and one run of the model: operations, bytes, peak, launches, seconds."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from jacray_workers.planning.watching import Watcher
from jacray_workers.problem.problem import Problem

# How much slower arithmetic runs through vmap's batching rules than through plain kernels, and how many calls of an
# operator it makes for each of the model's: both measured over the benchmark nets, and only a start for the race.
VMAP_ARITHMETIC = 1.5
VMAP_LAUNCHES = 4.0
# A first call may take this many times what a trial may take and still be followed by a second.
FIRST_CALL = 3


@dataclass(frozen=True)
class Machine:
    """What this machine does in a second.

    Attributes:
        rate: float operations in a large matrix product.
        bandwidth: bytes written to memory already mapped.
        launch: seconds for a call of an operator on a tiny tensor.
    """

    rate: float
    bandwidth: float
    launch: float


@dataclass(frozen=True)
class Forward:
    """One sample's forward pass.

    Attributes:
        operations: floating-point operations.
        bytes: bytes of every tensor it makes.
        launches: calls of operators.
        coarsest: the least precise float type that it passes through.
    """

    operations: float
    bytes: float
    launches: float
    coarsest: torch.dtype


@functools.cache
def machine(device: torch.device, threads: int) -> Machine:
    """Measure this machine once per process, device and thread count; takes a few tens of milliseconds."""
    del threads
    n = 512 if device.type == "cpu" else 4096
    # No random numbers: they would come out of the caller's stream.
    a, b = torch.full((n, n), 0.5, device=device), torch.empty(n, n, device=device)
    product = clock(lambda: torch.mm(a, a, out=b), device)
    buffer = torch.empty(1 << 24, device=device)
    fill = clock(lambda: buffer.fill_(1.0), device)
    tiny = torch.ones(1, device=device)
    launch = clock(lambda: [tiny.add(1.0) for _ in range(100)], device) / 100
    return Machine(2 * n**3 / product, buffer.nbytes / fill, launch)


def clock(work: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """The least seconds of a few runs after one to warm up."""
    work()
    best = float("inf")
    for _ in range(repeats):
        best = min(best, once(work, device))
    return best


def best_of(work: Callable[[], Any], device: torch.device, allowed: float, most: int = 20) -> float:
    """The least seconds of as many runs as fit the time allowed; short work is run often, for noise only adds.

    A second run is made unless the first was hopeless: what a method records on its first call is not its pace.
    """
    best = spent = once(work, device)
    for run in range(1, most):
        if spent + best > allowed * (FIRST_CALL if run == 1 else 1):
            break
        seconds = once(work, device)
        best, spent = min(best, seconds), spent + seconds
    return best


def once(work: Callable[[], Any], device: torch.device) -> float:
    """The seconds of one run."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


class _Count(Watcher):
    """Counts operators, their arithmetic where torch has a formula for it, and the bytes of what they make."""

    def __init__(self, coarsest: torch.dtype) -> None:
        super().__init__()
        self.launches = 0
        self.operations = 0
        self.coarsest = coarsest
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.launches += 1
        formula = flop_registry.get(getattr(func, "_overloadpacket", None))
        if formula is not None:
            self.operations += formula(*args, **(kwargs or {}), out_val=result)
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and not getattr(func, "is_view", False):
                self.bytes += tensor.nbytes
                self._see(tensor.dtype)
        return result

    def _see(self, dtype: torch.dtype) -> None:
        if dtype.is_floating_point and torch.finfo(dtype).eps > torch.finfo(self.coarsest).eps:
            self.coarsest = dtype


def forward_cost(problem: Problem, batch_of_one: Sequence[Tensor]) -> Forward:
    """Run the model once and count."""
    values = problem.values(batch_of_one)
    with torch.no_grad(), _Count(problem.dtype) as count:
        problem.forward(values, batch_of_one)
    return Forward(float(count.operations), float(count.bytes), float(count.launches), count.coarsest)


@dataclass(frozen=True)
class Price:
    """Cost of one chunk of `b` samples."""

    operations: float
    bytes: float
    launches: float
    slow: float = 1.0

    def seconds(self, on: Machine) -> float:
        """Predicted seconds: arithmetic, then memory, then the calls."""
        return self.slow * self.operations / on.rate + self.bytes / on.bandwidth + self.launches * on.launch


def backward_seconds(problem: Problem, one: Forward, on: Machine) -> float:
    """What a backward pass of one sample is expected to take."""
    back = one.operations * (2 if any(leaf.side == "param" for leaf in problem.leaves) else 1)
    return back / on.rate + 2 * one.bytes / on.bandwidth + 2 * one.launches * on.launch


def price(method: str, work: str, problem: Problem, one: Forward, b: int, directions: int) -> Price:
    """The price of a chunk of `b` samples.

    Args:
        method: its name.
        work: `jacobian`, `vjp` or `jvp`.
        problem: what is differentiated.
        one: the forward pass of one sample.
        b: samples in the chunk.
        directions: K, for `vjp` and `jvp`.
    """
    item = problem.dtype.itemsize
    params = any(leaf.side == "param" for leaf in problem.leaves)
    columns = sum(leaf.size for leaf in problem.leaves)
    inputs = sum(leaf.size for leaf in problem.leaves if leaf.side != "param")
    rows = problem.rows if work == "jacobian" else directions
    out = b * rows * columns * item if work == "jacobian" else 0
    f, e, a = one.operations * b, one.bytes * b, one.launches
    back = f * (2 if params else 1)
    if method == "forward" or work == "jvp":
        tangents = columns if work != "jvp" else directions
        return Price(f + 2 * f * tangents, e * tangents * 2 + out * 2, a * VMAP_LAUNCHES * 2, VMAP_ARITHMETIC)
    if method == "reverse":
        return Price(f + rows * back, rows * e * 2 + out * 3, a * VMAP_LAUNCHES, VMAP_ARITHMETIC)
    if method == "backward_loop":
        passes = b if params and work == "jacobian" else 1
        return Price(f + rows * back, rows * e * 2 + out, a * (1 + 2 * rows) * passes)
    if method == "layerwise":
        return Price(f + rows * back, rows * e * 2 + out, a * 6)
    # chain: at least the pass through the narrowest tensor; the kernel's own price replaces this where it has one.
    return Price(f + min(rows, inputs or rows) * back, rows * e + out, a * 8)

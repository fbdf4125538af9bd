"""An independent path to a derivative: one sample, plain autograd, float64 where the model allows it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from jacray_workers.problem.holding import gradients, held
from jacray_workers.problem.problem import Leaf, Problem
from jacray_workers.problem.session import seed_generators
from jacray_workers.sharing import math_attention

# Parameters are copied to be cast; a model larger than this is checked in its own precision instead.
CAST_LIMIT = 4 << 30


def in_float64(problem: Problem) -> Problem | None:
    """The same problem with every parameter, buffer and leaf in float64, or None where that would take too much memory.

    Buffers are copies, so that a model that writes to them leaves the caller's alone.
    """
    tensors = all_tensors(problem)
    if sum(tensor.numel() for tensor in tensors.values()) * 8 > CAST_LIMIT:
        return None
    buffers = {name for name, _ in problem.module.named_buffers()}
    cast_tensors = {name: wide(tensor, copy=name in buffers) for name, tensor in tensors.items()}
    leaves = tuple(replace(leaf, dtype=torch.float64) for leaf in problem.leaves)
    return replace(problem, tensors=cast_tensors, leaves=leaves, dtype=torch.float64, cast=torch.float64)


def all_tensors(problem: Problem) -> dict[str, Tensor]:
    """Every parameter and buffer that the problem computes with, by its first name."""
    own = {**dict(problem.module.named_parameters()), **dict(problem.module.named_buffers())}
    return {**{name: tensor.detach() for name, tensor in own.items()}, **problem.tensors}


def shielded(problem: Problem) -> Problem:
    """The same problem with copies of the buffers, for a model that writes to them."""
    buffers = {name for name, _ in problem.module.named_buffers()}
    tensors = {name: tensor.clone() if name in buffers else tensor for name, tensor in problem.tensors.items()}
    return replace(problem, tensors=tensors)


def wide(tensor: Tensor, copy: bool = False) -> Tensor:
    """The tensor in float64 or complex128 where it is of a float or complex type, else as it is."""
    dtype = tensor.dtype
    if tensor.is_floating_point():
        dtype = torch.float64
    elif tensor.is_complex():
        dtype = torch.complex128
    return tensor.detach().to(dtype, copy=copy)


def generator(seed: int) -> torch.Generator:
    """A stream of its own, so that drawing directions never moves the model's random state."""
    return torch.Generator().manual_seed(seed)


def normal(like: Tensor, source: torch.Generator) -> Tensor:
    """Normal numbers of this shape, drawn on the CPU so that every device sees the same."""
    return torch.randn(like.shape, dtype=torch.float64, generator=source).to(like)


@dataclass(frozen=True)
class Point:
    """One sample of a problem, differentiated by plain autograd.

    Attributes:
        problem: in the precision to compute in.
        batch: the placed inputs that the sample is evaluated among: itself alone, unless random numbers were drawn for
            a whole batch, as those depend on the place in it.
        position: the sample's place in `batch`.
    """

    problem: Problem
    batch: tuple[Tensor, ...]
    position: int

    def values(self) -> list[Tensor]:
        """The leaves' values for the whole batch, as fresh copies where they are per sample."""
        # Hidden points are read by a pass of the model, which must draw what every other pass draws.
        if self.problem.random:
            seed_generators(self.problem.seed)
        with held(self.problem, ()):
            found = self.problem.values(self._inputs())
        return [v.clone() if own(leaf) else v for leaf, v in zip(self.problem.leaves, found, strict=True)]

    def rows(self, values: Sequence[Tensor]) -> Tensor:
        """The sample's outputs `(rows,)` with the leaves at these values."""
        with plain_kernels(), held(self.problem, values):
            return self._forward(values, self.batch)[self.position]

    def pull(self, cotangent: Tensor) -> list[Tensor]:
        """The cotangent `(rows,)` pulled back to each leaf: `(*leaf)`."""
        values = [value.detach().requires_grad_() for value in self.values()]

        def head(y: Tensor) -> Tensor:
            return (cotangent.to(y) * y[self.position]).sum()

        with plain_kernels():
            (grads,) = gradients(self.problem, self._forward, values, self.batch, [head])
        return [self.at(leaf, g) for leaf, g in zip(self.problem.leaves, grads, strict=True)]

    def _forward(self, values: Sequence[Tensor], batch: Sequence[Tensor]) -> Tensor:
        """The outputs of the whole batch, for a model that may write into what it is given."""
        handed = [v.clone() if own(leaf) else v for leaf, v in zip(self.problem.leaves, values, strict=True)]
        return self.problem.forward(handed, [leaf.clone() for leaf in batch])

    def moved(self, values: Sequence[Tensor], direction: Sequence[Tensor], step: float) -> Tensor:
        """The sample's outputs, in float64, after a step along a direction `(*leaf)` of every leaf."""
        shifted = [value.clone() for value in values]
        for leaf, value, v in zip(self.problem.leaves, shifted, direction, strict=True):
            self.at(leaf, value).add_(v.to(value), alpha=step)
        with torch.no_grad():
            return self.rows(shifted).double()

    def at(self, leaf: Leaf, value: Tensor) -> Tensor:
        """The sample's part of a leaf's value or gradient."""
        return value[self.position] if own(leaf) else value

    def jittered(self, size: float, seed: int) -> Point:
        """The same sample with every input and parameter moved by about `size` of itself, as rounding would."""
        source = generator(seed)

        def jitter(tensor: Tensor) -> Tensor:
            return tensor * (1 + size * normal(tensor, source)).to(tensor) if tensor.is_floating_point() else tensor

        tensors = {name: jitter(tensor) for name, tensor in all_tensors(self.problem).items()}
        return replace(
            self, problem=replace(self.problem, tensors=tensors), batch=tuple(jitter(leaf) for leaf in self.batch)
        )

    def _inputs(self) -> list[Tensor]:
        """Copies, for models that write into what they are given."""
        return [leaf.clone() for leaf in self.batch]


def own(leaf: Leaf) -> bool:
    """Whether each sample has a value of its own for the leaf."""
    return leaf.side != "param"


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Unfused attention and no cuDNN: paths that other methods do not take, and that have every derivative."""
    with math_attention(), torch.backends.cudnn.flags(enabled=False):
        yield


def points(
    problem: Problem, batch: Sequence[Tensor], position: int, double: Problem | None
) -> tuple[Point, Point, str]:
    """The sample in float64 and in its own precision, and why the first is only the second where it is so."""
    plain = Point(shielded(problem), tuple(batch), position)
    if problem.dtype == torch.float64 and all(leaf.dtype == torch.float64 for leaf in problem.leaves):
        return plain, plain, ""
    double = in_float64(problem) if double is None else double
    if double is None:
        return plain, plain, "the model is too large to be copied to float64"
    exact = Point(double, tuple(wide(leaf) for leaf in batch), position)
    why = _differs(exact, plain)
    return (plain, plain, why) if why else (exact, plain, "")


def _differs(exact: Point, plain: Point) -> str:
    """Why the model in float64 is not the same function, or the empty string."""
    try:
        with torch.no_grad():
            y = exact.rows(exact.values())
    except Exception as error:  # noqa: BLE001 - a model may raise anything at a dtype it was not written for
        return f"the model does not run in float64 ({type(error).__name__})"
    if not plain.problem.random:
        return ""
    with torch.no_grad():
        own_y = plain.rows(plain.values()).double()
    # Half of the samples of another mask would differ by their whole size; rounding never does.
    same = torch.allclose(y, own_y, rtol=0.1, atol=0.05 * float(own_y.abs().amax()) if own_y.numel() else 0.0)
    return "" if same else "the model draws other random numbers in float64"


def rounding(problem: Problem, *dtypes: torch.dtype) -> float:
    """The coarsest unit of rounding among what the problem computes with."""
    floats = [leaf.dtype for leaf in problem.leaves] + [out.dtype for out in problem.outs] + [problem.dtype, *dtypes]
    parameters = {name: p for name, p in problem.module.named_parameters() if p.is_floating_point()}
    floats += [problem.tensors.get(name, p).dtype for name, p in parameters.items()]
    unit = max(torch.finfo(dtype).eps for dtype in floats)
    # TF32 keeps ten bits of the mantissa.
    tf32 = problem.tf32 and problem.device.type == "cuda"
    return max(unit, 2.0**-10 if tf32 else 0.0)

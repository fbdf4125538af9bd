"""What a few passes over a few samples show about how a model treats the samples of a batch."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from jacray_workers.problem.holding import gradients, held
from jacray_workers.problem.problem import Leaf, Problem
from jacray_workers.problem.session import seed_generators
from jacray_workers.trust.projection import size_of
from jacray_workers.trust.reference import generator, normal, own, shielded


@dataclass(frozen=True)
class Evidence:
    """Movements relative to the size of what moved; 0 means not a bit of it did.

    Attributes:
        moved: the largest movement of a sample's outputs when another sample was replaced.
        replaced: that other sample.
        cross: the largest derivative of a sample's outputs wrt another sample, relative to that wrt itself.
        seen_from: the sample whose outputs those were.
        alone: the largest difference between a sample among others and alone, in outputs and derivatives.
        noise: how far two passes over the same batch differ.
        notes: what could not be looked at.
    """

    moved: float = 0.0
    replaced: int = 0
    cross: float = 0.0
    seen_from: int = 0
    alone: float = 0.0
    noise: float = 0.0
    notes: tuple[str, ...] = ()


class NotABatchError(Exception):
    """The model does not take, or does not keep, a batch of several samples."""


class Probe:
    """A few samples of a problem, with every float input among its leaves.

    Args:
        problem: what is differentiated.
        batch: the samples.
        spare: one more sample of the job, or None.
    """

    def __init__(self, problem: Problem, batch: Sequence[Tensor], spare: Sequence[Tensor] | None) -> None:
        self.problem = _with_inputs(shielded(problem), batch)
        self.batch, self.spare = list(batch), spare
        self.size = batch[0].shape[0]
        self.source = generator(problem.seed)
        self.u = normal(torch.empty(self.problem.rows), self.source).to(self.problem.device)

    def rows(self, batch: Sequence[Tensor], values: Sequence[Tensor] | None = None) -> Tensor:
        """The outputs `(B, rows)`.

        Raises:
            NotABatchError: an output does not have the batch as its first axis.
        """
        values = self.values(batch) if values is None else values
        with held(self.problem, values):
            return self.forward(values, batch)

    def forward(self, values: Sequence[Tensor], batch: Sequence[Tensor]) -> Tensor:
        """The same, with the parameters' values already in place."""
        size = batch[0].shape[0]
        for leaf, value in zip(self.problem.leaves, values, strict=True):
            if own(leaf) and value.shape[0] != size:
                raise NotABatchError(f"for a batch of {size} the point {leaf.key} has the shape {tuple(value.shape)}")
        handed = [v.clone() if own(leaf) else v for leaf, v in zip(self.problem.leaves, values, strict=True)]
        y = self.problem.call_model(handed, [leaf.clone() for leaf in batch])
        found = pytree.tree_leaves(y)
        for out in self.problem.outs:
            shape = tuple(found[out.index].shape)
            if size > 1 and shape[:1] != (size,):
                raise NotABatchError(f"for a batch of {size} an output has the shape {shape}")
        return self.problem.flatten(y, size)

    def values(self, batch: Sequence[Tensor]) -> list[Tensor]:
        """The leaves' values."""
        if self.problem.random:
            seed_generators(self.problem.seed)
        with held(self.problem, ()):
            return self.problem.values([leaf.clone() for leaf in batch])

    def gradients(self, batch: Sequence[Tensor], samples: Sequence[int]) -> list[list[Tensor]]:
        """For each of the samples, the gradient of its randomly weighted outputs wrt every leaf."""
        values = [value.detach().requires_grad_() for value in self.values(batch)]
        heads = [functools.partial(self.number, sample=i) for i in samples]
        return gradients(self.problem, self.forward, values, batch, heads)

    def number(self, y: Tensor, sample: int) -> Tensor:
        """One sample's randomly weighted outputs."""
        return (self.u.to(y) * y[sample]).sum()

    def poisoned(self, victim: int) -> tuple[list[Tensor], Tensor] | None:
        """The batch with one sample replaced, and its outputs; None where no replacement agrees with the model.

        Real data comes first; then a stronger and a weaker disturbance, as either may leave the model's domain.
        """
        with torch.no_grad():
            base = self.rows(self.batch)
            for batch in self._replacements(victim):
                y = self._attempt(batch)
                if y is not None and bool((torch.isfinite(y[victim]) | ~torch.isfinite(base[victim])).all()):
                    return batch, y
        return None

    def _attempt(self, batch: Sequence[Tensor]) -> Tensor | None:
        try:
            return self.rows(batch)
        except Exception:  # noqa: BLE001 - a model may raise anything at values it was not made for
            return None

    def _replacements(self, victim: int) -> Iterator[list[Tensor]]:
        neighbour = [leaf[(victim + 1) % self.size] for leaf in self.batch]
        spare = neighbour if self.spare is None else [leaf[0] for leaf in self.spare]
        if victim > 0 and self.spare is not None and not all(map(torch.equal, spare, self._sample(victim))):
            yield self._with(victim, spare)
        mine = self._sample(victim)
        for strength in (3.0, 1.1):
            for others in (spare, mine):
                pairs = zip(mine, others, strict=True)
                yield self._with(victim, [disturbed(x, other, strength, self.source) for x, other in pairs])

    def _sample(self, i: int) -> list[Tensor]:
        return [leaf[i] for leaf in self.batch]

    def _with(self, victim: int, sample: Sequence[Tensor]) -> list[Tensor]:
        batch = [leaf.clone() for leaf in self.batch]
        for leaf, value in zip(batch, sample, strict=True):
            leaf[victim] = value
        return batch


def disturbed(x: Tensor, other: Tensor, strength: float, source: torch.Generator) -> Tensor:
    """A sample's leaf, changed: floats keep their signs and zeros, as models may need; other types are exchanged."""
    if not x.is_floating_point():
        return other
    if not bool(x.any()):
        return x + 0.3 * normal(x, source)
    return x * strength * (1 + 0.05 * normal(x, source).clamp(-3, 3))


def gather(probe: Probe) -> Evidence:
    """Look at the model from every side.

    Raises:
        NotABatchError: the model does not take a batch, or does not keep it.
    """
    with torch.no_grad():
        try:
            base = probe.rows(probe.batch)
        except NotABatchError:
            raise
        except Exception as error:
            raise NotABatchError(f"a batch of {probe.size} raises {type(error).__name__}: {error}") from error
    moved, replaced, notes = _movement(probe, base)
    cross, seen_from, alone, more = _derivatives(probe)
    if not probe.problem.random:
        alone = max(alone, _alone(probe, base))
    noise = 0.0
    if moved:
        with torch.no_grad():
            noise = apart(probe, base, probe.rows(probe.batch), range(probe.size))
    return Evidence(moved, replaced, cross, seen_from, alone, noise, (*notes, *more))


def _movement(probe: Probe, base: Tensor) -> tuple[float, int, list[str]]:
    """The largest movement of others, and which sample's replacement caused it."""
    found, replaced, notes = 0.0, 0, []
    for victim in sorted({0, probe.size - 1}):
        poison = probe.poisoned(victim)
        if poison is None:
            notes = ["no replacement of a sample agrees with the model, so its values were probed less"]
            continue
        others = [i for i in range(probe.size) if i != victim]
        if (moved := apart(probe, base, poison[1], others)) > found:
            found, replaced = moved, victim
    return found, replaced, notes


def apart(probe: Probe, a: Tensor, b: Tensor, samples: Sequence[int]) -> float:
    """The largest difference of these samples' outputs, relative to the size of the sample's output tensor."""
    worst = 0.0
    for out in probe.problem.outs:
        for i in samples:
            x, y = (t[i, out.rows.start : out.rows.stop].double() for t in (a, b))
            worst = max(worst, relative(x, y))
    return worst


def relative(x: Tensor, y: Tensor, floor: float = 0.0) -> float:
    """The largest difference over the largest size; infinite where only one of the two is finite."""
    if not x.numel():
        return 0.0
    distance, size = largest(x - y), max(largest(x), largest(y), floor)
    if math.isfinite(distance):
        return distance / size if distance else 0.0
    same = (x == y) | (x.isnan() & y.isnan())
    if bool(same.all()):
        return 0.0
    apart = torch.where(same, 0.0, (x - y).abs()).nan_to_num(nan=torch.inf)
    sizes = torch.maximum(x.abs(), y.abs())
    size = max(float(sizes[torch.isfinite(sizes)].amax()) if bool(torch.isfinite(sizes).any()) else 0.0, floor)
    return float(apart.amax()) / size if size else float("inf")


def largest(x: Tensor) -> float:
    """The largest absolute value, NaN where there is one; nothing is made of the tensor's size."""
    return float(torch.linalg.vector_norm(x, torch.inf))


def _derivatives(probe: Probe) -> tuple[float, int, float, list[str]]:
    """The largest derivative wrt another sample, whose outputs those were, and how the last sample differs alone."""
    last = probe.size - 1
    try:
        found = probe.gradients(probe.batch, sorted({0, last}))
        single = probe.gradients([leaf[last:] for leaf in probe.batch], [0])[0]
    except Exception as error:  # noqa: BLE001 - backward may fail in any way that a model's own functions do
        return 0.0, 0, 0.0, [f"derivatives were not probed, as backward raises {type(error).__name__}: {error}"]
    cross, seen_from = 0.0, 0
    for i, grads in zip(sorted({0, last}), found, strict=True):
        for leaf, grad in zip(probe.problem.leaves, grads, strict=True):
            if own(leaf) and (share := _share_of_others(grad, i)) > cross:
                cross, seen_from = share, i
    alone = 0.0 if probe.problem.random else _gradients_alone(probe, found[-1], single)
    return cross, seen_from, alone, []


def _share_of_others(grad: Tensor, i: int) -> float:
    # A cotangent of zero times an infinite slope is NaN, and says nothing about coupling.
    size = torch.nan_to_num(grad.abs(), nan=0.0, posinf=0.0).reshape(grad.shape[0], -1)
    if not size.numel():
        return 0.0
    others = size.clone()
    others[i] = 0
    return float(others.amax() / size.amax()) if bool(others.any()) else 0.0


def _gradients_alone(probe: Probe, among: Sequence[Tensor], single: Sequence[Tensor]) -> float:
    """How far the last sample's gradients among others are from those alone."""
    worst = 0.0
    with torch.no_grad():
        y = float((probe.u * probe.rows([leaf[-1:] for leaf in probe.batch])[0].double()).abs().sum())
    for leaf, value, a, b in zip(probe.problem.leaves, probe.values(probe.batch), among, single, strict=True):
        mine, other = (a[-1], b[-1]) if own(leaf) else (a, b)
        # What is zero but for rounding has no size of its own: outputs over values give the natural one.
        worst = max(worst, relative(mine, other, 1e-6 * y / size_of(value)))
    return worst


def _alone(probe: Probe, base: Tensor) -> float:
    with torch.no_grad():
        single = probe.rows([leaf[-1:] for leaf in probe.batch])
    return apart(probe, base[-1:], single, [0])


def _with_inputs(problem: Problem, batch: Sequence[Tensor]) -> Problem:
    """The same problem with the float inputs that it leaves out among its leaves."""
    known = {leaf.index for leaf in problem.leaves if leaf.side == "input"}
    more = tuple(
        Leaf(f"input {i}", "input", tuple(x.shape[1:]), x.dtype, index=i)
        for i, x in enumerate(batch)
        if x.is_floating_point() and i not in known
    )
    return replace(problem, leaves=(*problem.leaves, *more))


def written_buffers(problem: Problem, batch: Sequence[Tensor]) -> list[str]:
    """The buffers that one pass of the model writes to or puts another tensor in place of."""
    if any(isinstance(part, torch.jit.ScriptModule) for part in problem.module.modules()):
        return []  # they take no hooks
    guarded = shielded(problem)
    before = {name: tensor._version for name, tensor in guarded.tensors.items()}
    swapped: set[str] = set()

    def look(module: nn.Module, _args: object, _result: object) -> None:
        swapped.update(n for n, t in module.named_buffers() if n in before and t is not guarded.tensors[n])

    handle = problem.module.register_forward_hook(look)
    try:
        with torch.no_grad():
            fresh = [leaf.clone() for leaf in batch]
            values = guarded.values(fresh)
            with held(guarded, values):
                guarded.call_model(values, fresh)
    finally:
        handle.remove()
    return sorted(swapped | {name for name, version in before.items() if guarded.tensors[name]._version != version})

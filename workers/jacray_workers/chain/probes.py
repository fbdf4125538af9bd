"""Check a tape against the model: same numbers and derivatives at other inputs, samples independent of each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from jacray_workers.chain.cuts import Layout, layouts
from jacray_workers.chain.tape import Tape
from jacray_workers.chain.trace import Untraceable
from jacray_workers.kernels.common import gradients
from jacray_workers.problem.problem import Problem
from jacray_workers.sharing import math_attention

# Two computations of one number in the same order of calls, relative to the largest one.
SAME = {torch.float64: 1e-10, torch.float32: 1e-4}
_COUPLED = "a sample's outputs depend on the other samples in the batch"


def differ(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are more than rounding apart, or not finite in different places."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return True
    finite = torch.isfinite(b)
    if not torch.equal(finite, torch.isfinite(a)):
        return True
    if not bool(finite.all()):
        a, b = a[finite], b[finite]
    return bool(b.numel()) and float((a - b).abs().max()) > SAME.get(b.dtype, 0.0) * float(b.abs().max())


def replay(tape: Tape, values: Sequence[Tensor], batch: Sequence[Tensor], keep: frozenset[int]) -> list[Tensor]:
    """The tape's values; attention by the kernel that has every derivative."""
    with math_attention():
        return tape.run(values, batch, keep=keep)


def perturbed(tensors: Iterable[Tensor], samples: Sequence[int], seed: int) -> list[Tensor]:
    """The tensors with other numbers at these samples: real ones moved, whole ones taken from another sample."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for tensor in tensors:
        moved = tensor.detach().clone()
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=random).to(tensor)
            size = tensor.std(correction=0).nan_to_num() + 1e-3
            moved[samples] += 0.3 * size * noise[samples]
        else:
            moved[samples] = tensor.roll(1, 0)[samples]
        found.append(moved)
    return found


def validate(problem: Problem, tape: Tape, values: Sequence[Tensor], batch: Sequence[Tensor]) -> None:
    """Compare the tape with the model at other inputs, in value and in one weighted gradient.

    Raises:
        Untraceable: they differ, or a sample alone gives other outputs than in the batch.
    """
    everyone = list(range(batch[0].shape[0]))
    try:
        other = perturbed(values, everyone, 1)
        # With another mask a model that looks at its numbers may make other calls.
        context = list(batch) if tape.reads else perturbed(batch, everyone, 2)
        left = _gradients(lambda v: problem.forward(v, context), other)
        right = _gradients(lambda v: replay(tape, v, context, frozenset())[tape.output], other)
        alone = problem.forward([v[:1] for v in other], [leaf[:1] for leaf in context])
    except (RuntimeError, ValueError, IndexError) as error:
        raise Untraceable(f"its recorded calls do not run at other inputs ({type(error).__name__})") from error
    if differ(right[0], left[0]):
        raise Untraceable("its recorded calls give other outputs than the model at other inputs")
    if any(differ(a, b) for a, b in zip(right[1:], left[1:], strict=True)):
        raise Untraceable("its recorded calls have other derivatives than the model")
    if differ(alone, left[0][:1]):
        raise Untraceable("a sample alone gives other outputs than in a batch")


def _gradients(function: object, values: Sequence[Tensor]) -> list[Tensor]:
    """The outputs, and the gradients of the leaves for a fixed cotangent."""
    leaves = [value.detach().requires_grad_() for value in values]
    y: Tensor = function(leaves)  # type: ignore[operator]
    random = torch.Generator().manual_seed(3)
    u = torch.randn(y.shape, generator=random, dtype=torch.float64).to(y)
    found = gradients(y, leaves, u)
    grads = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]
    return [y.detach(), *grads]


def locate(
    tape: Tape, env: Sequence[Tensor], values: Sequence[Tensor], batch: Sequence[Tensor], wanted: Sequence[int]
) -> dict[int, Layout]:
    """Where the samples stand in each of the wanted values, found by changing one sample and looking what follows.

    Values in which samples cannot be told apart are left out.

    Raises:
        Untraceable: a sample's change reaches the outputs of another.
    """
    samples = batch[0].shape[0]
    if samples == 1:
        return {v: Layout(tuple(env[v].shape), 1, 1, env[v].numel()) for v in wanted}
    possible = {v: layouts(tuple(env[v].shape), samples) for v in wanted}
    rows = Layout(tuple(env[tape.output].shape), 1, samples, env[tape.output].shape[1])
    possible[tape.output] = [rows]
    for sample in (0, samples - 1):
        for changed in (
            _moved(tape, env, values, batch, sample, wanted),
            _poisoned(tape, values, batch, sample, wanted),
        ):
            for value, mask in changed.items():
                possible[value] = [p for p in possible.get(value, []) if _only(mask, p, sample)]
        if not possible[tape.output]:
            raise Untraceable(_COUPLED)
    return {value: found[0] for value, found in possible.items() if found}


def _only(mask: Tensor, layout: Layout, sample: int) -> bool:
    """Whether all marks lie in one sample's part."""
    marks = mask.reshape(layout.outer, layout.samples, layout.inner).any(dim=2).any(dim=0)
    marks[sample] = False
    return not bool(marks.any())


def _moved(
    tape: Tape,
    env: Sequence[Tensor],
    values: Sequence[Tensor],
    batch: Sequence[Tensor],
    sample: int,
    wanted: Sequence[int],
) -> dict[int, Tensor]:
    """Per value, which numbers change with one sample's inputs."""
    kept = frozenset((*wanted, tape.output))
    with torch.no_grad():
        now = replay(tape, perturbed(values, [sample], 4), perturbed(batch, [sample], 5), kept)
    found = {}
    for value in kept:
        allowed = SAME.get(env[value].dtype, 0.0) * env[value].detach().abs().nan_to_num().amax()
        found[value] = (now[value] - env[value].detach()).abs() > allowed
    return found


def _poisoned(
    tape: Tape, values: Sequence[Tensor], batch: Sequence[Tensor], sample: int, wanted: Sequence[int]
) -> dict[int, Tensor]:
    """Per value, which numbers are NaN once one sample's are: this shows couplings too weak for `_moved`."""
    try:
        with torch.no_grad():
            now = replay(tape, _poison(values, sample), _poison(batch, sample), frozenset(wanted))
    except (RuntimeError, ValueError, IndexError):
        return {}  # NaN does not run through every model, as where it becomes an index
    return {value: torch.isnan(now[value]) for value in (*wanted, tape.output)}


def _poison(tensors: Iterable[Tensor], sample: int) -> list[Tensor]:
    found = [tensor.detach().clone() for tensor in tensors]
    for tensor in found:
        if tensor.is_floating_point():
            tensor[sample] = torch.nan
    return found

"""Find out, from a few samples, whether a model treats the samples of a batch apart.

jacray's J_i is the Jacobian of the model at a batch of one. A method that runs a whole batch at once is right only
where row i of the batch's output depends on sample i alone, and equals what sample i gives alone. Two questions are
asked: does a sample's output move when another sample is replaced, and does its derivative wrt another sample vanish.
The first misses what cancels in values, the second what is detached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jacray_workers.errors import CoupledSamplesError, Plain
from jacray_workers.problem.problem import Problem
from jacray_workers.trust.coupling import Blame, blame_derivatives, blame_values
from jacray_workers.trust.evidence import Evidence, NotABatchError, Probe, disturbed, gather, written_buffers
from jacray_workers.trust.reference import generator, in_float64, rounding, wide

SAMPLES = 3
# Where a movement counts as coupling. Batches of one shape go through the same kernels, so others' outputs usually keep
# every bit; kernels that add up in a changing order move them by rounding, which float64 keeps below the first number.
MOVED = {torch.float64: 1e-8, torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}
# Where a sample counts as another alone. Kernels differ between batch sizes, and rounding may cross a kink.
ALONE = {torch.float64: 1e-4, torch.float32: 0.02, torch.bfloat16: 0.2, torch.float16: 0.1}
# Two passes over one batch may differ by so much before the model counts as answering differently each time.
NOISE = 1e-3
UNSTEADY = "two passes over the same batch that differ by {:.1e} of the outputs' size"


@dataclass(frozen=True)
class Independence:
    """Whether samples are independent of each other.

    Attributes:
        independent: no sample's output, nor its derivative, depends on another sample.
        culprit: the name of the module that couples them, or the empty string where that is unclear.
        why: what was seen, or the empty string.
        way_out: what to do about it, or the empty string.
        same_alone: a sample among others gives what it gives alone, in value and derivative. For a model that draws
            random numbers this is not asked, and False: what it draws depends on the place in the batch.
        batchable: the model takes a batch of several samples at all, and keeps it as its outputs' first axis.
        steady: the same samples give the same outputs each time.
        notes: what else a reader should know: the model writes to its buffers, or answers differently each time.
    """

    independent: bool
    culprit: str = ""
    why: str = ""
    way_out: str = ""
    same_alone: bool = True
    batchable: bool = True
    steady: bool = True
    notes: tuple[str, ...] = ()


def probe(problem: Problem, batch: Sequence[Tensor]) -> Independence:
    """Probe a model with a few samples; called inside `problem.session()`.

    A model that cannot take a batch of several is reported as independent and not batchable: a method that goes one
    sample at a time, or that lets the model see one sample at a time, is then still right.

    Args:
        problem: what is differentiated.
        batch: placed input leaves; the first few samples are used, and one more as a replacement. Where there is only
            one sample, a disturbed copy stands beside it.
    """
    samples, spare = _few(batch)
    notes = _written(problem, [leaf[:1] for leaf in samples])
    looked = Probe(problem, samples, spare)
    try:
        evidence = gather(looked)
        if _undecided(evidence, problem):
            looked, evidence = _in_float64(problem, samples, spare, looked, evidence)
    except NotABatchError as error:
        return Independence(True, why=str(error), same_alone=False, batchable=False, notes=notes)
    return _judge(looked, evidence, notes)


def require(found: Independence) -> None:
    """Refuse a model that couples samples.

    Raises:
        CoupledSamplesError: it does; the module is named where it is known.
    """
    if not found.independent:
        raise CoupledSamplesError(
            "model",
            f"must treat the samples of a batch apart, but {found.why}",
            Plain(f"module {found.culprit}") if found.culprit else None,
            found.way_out,
        )


def _few(batch: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor] | None]:
    """The samples to look at, at least two, and one more to put in the place of others."""
    size = batch[0].shape[0]
    if size == 1:
        source = generator(0)
        twins = [disturbed(leaf, leaf.roll(1, -1) if leaf.dim() > 1 else leaf, 1.1, source) for leaf in batch]
        return [torch.cat([leaf, twin]) for leaf, twin in zip(batch, twins, strict=True)], None
    spare = [leaf[SAMPLES : SAMPLES + 1] for leaf in batch] if size > SAMPLES else None
    return [leaf[:SAMPLES] for leaf in batch], spare


def _undecided(evidence: Evidence, problem: Problem) -> bool:
    """Whether something differs that rounding might explain."""
    usual = 64 * rounding(problem) if problem.dtype in (torch.float32, torch.float64) else 4 * rounding(problem)
    return evidence.moved > 0 or evidence.cross > 0 or evidence.alone > usual


def _in_float64(
    problem: Problem, samples: Sequence[Tensor], spare: Sequence[Tensor] | None, looked: Probe, evidence: Evidence
) -> tuple[Probe, Evidence]:
    """The same evidence where rounding is out of the way, or what there was where the model does not run so."""
    double = in_float64(problem)
    if double is None:
        return looked, evidence
    closer = Probe(double, [wide(leaf) for leaf in samples], spare and [wide(leaf) for leaf in spare])
    try:
        return closer, gather(closer)
    except NotABatchError:
        return looked, evidence


def _judge(looked: Probe, evidence: Evidence, notes: tuple[str, ...]) -> Independence:
    dtype = looked.problem.dtype
    notes = (*notes, *evidence.notes)
    if evidence.noise > NOISE:
        why = UNSTEADY.format(evidence.noise)
        return Independence(True, why=why, same_alone=False, steady=False, notes=(*notes, why))
    if evidence.moved > max(MOVED[dtype], 16 * evidence.noise):
        seen = f"replacing one sample moves another's outputs by {min(evidence.moved, 1):.0%} of their size"
        return _coupled(blame_values(looked, evidence.replaced, MOVED[dtype]), seen, notes)
    if evidence.cross > MOVED[dtype]:
        seen = f"a sample's derivative wrt another sample is {evidence.cross:.0%} of that wrt itself"
        return _coupled(blame_derivatives(looked, evidence.seen_from), seen, notes)
    if looked.problem.random:
        return Independence(True, same_alone=False, notes=notes)
    if evidence.alone > ALONE[dtype]:
        why = f"a sample among others differs from the same sample alone by {evidence.alone:.1e} of its size"
        return Independence(True, why=why, same_alone=False, notes=notes)
    return Independence(True, notes=notes)


def _coupled(blame: Blame, seen: str, notes: tuple[str, ...]) -> Independence:
    return Independence(False, blame.name, f"{blame.why} ({seen})", blame.way_out, same_alone=False, notes=notes)


def _written(problem: Problem, batch: Sequence[Tensor]) -> tuple[str, ...]:
    """A note on buffers that the model writes to, which in training mode is to be expected."""
    if problem.training:
        return ()
    names = written_buffers(problem, batch)
    return (f"the model writes to its buffer {names[0]} when it is called",) if names else ()

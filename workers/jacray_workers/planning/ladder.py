"""Whether a model may be run on whole batches, and if not, why: the question before any method is tried.

jacray's Jacobian of a sample is the model's at a batch of one. Methods that run many samples in one call are admitted
only where that gives the same; where it does not, the samples go one at a time, or under `vmap`, which shows the model
one sample as well. A model that couples its samples has no per-sample answer and is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jacray_workers.errors import ModelError, Plain
from jacray_workers.planning.reading import what_is_read
from jacray_workers.problem.blame import accuse
from jacray_workers.problem.cache import READS_OWN, SAME_STEPS
from jacray_workers.problem.problem import Problem
from jacray_workers.problem.resolve import place
from jacray_workers.trust import independence
from jacray_workers.trust.alike import alike
from jacray_workers.trust.evidence import relative

READS = "the model reads values of its data (a branch, .item()), so a batch may take another path than a sample"
COMPARED = (
    "the model reads values of its masks or indices, so every chunk is compared, in outputs and a derivative, with what"
    " its samples give alone, and computed sample by sample where they differ"
)
# Input numbers up to which the largest is looked for.
SCANNED = 1 << 24


@dataclass(frozen=True)
class Standing:
    """How a model's samples may be run.

    Attributes:
        batched: whole batches give every sample what it gives alone.
        why: why not, or the empty string.
        notes: what a reader of the plan should know besides.
        compared: a few samples show that they do, and as that proves nothing of others every chunk is compared with
            its samples alone.
    """

    batched: bool
    why: str = ""
    notes: tuple[str, ...] = ()
    compared: bool = False


def stand(problem: Problem, batch: Sequence[Tensor]) -> Standing:
    """Probe the model; called inside `problem.session()`.

    Raises:
        CoupledSamplesError: one sample's output depends on another sample; the module is named where it is known.
        ModelError: two passes over the same samples differ.
    """
    found = independence.probe(problem, batch)
    if not found.steady:
        raise ModelError(
            "model",
            "must give the same outputs for the same inputs, but keeps a state outside of its modules or draws numbers"
            " from a source of its own",
            Plain(found.why),
            "keep the state, or the source of random numbers, as an attribute of a module, or take it out",
        )
    read, own = ("nothing", True) if problem.training else what_is_read(problem, batch)
    if own:
        problem.memo[READS_OWN] = True
    # What reads no numbers takes the same steps for all of them, and writes into no more than its first run did.
    habits = own or problem.training or problem.writes or problem.stateful
    problem.memo[SAME_STEPS] = read == "nothing" and not habits
    if read != "nothing":
        good = found.independent and found.same_alone and found.batchable and not problem.random
        if read == "marks" and good and alike(problem, batch):
            return Standing(True, "", (*found.notes, COMPARED), compared=True)
        return Standing(False, READS, found.notes)
    independence.require(found)
    if problem.random:
        return Standing(
            False, "the model draws random numbers, which differ between a batch and its samples", found.notes
        )
    return Standing(found.same_alone and found.batchable, found.why, found.notes)


def among_many(problem: Problem, leaves: Sequence[Tensor], chunk: int) -> str:
    """Why samples in full chunks are not what they are alone, or the empty string; called inside `problem.session()`.

    What a few samples do not show: a model that goes another way from some size of batch on, or for a sample far from
    the others. Looked at are the outputs in the first chunk, the last, and the one with the largest number.
    """
    if chunk == 1:
        return ""
    samples = leaves[0].shape[0]
    for at in sorted({0, samples - 1, _extreme(leaves)}):
        start = at // chunk * chunk
        batch = place(problem, [leaf[start : start + chunk] for leaf in leaves])
        size = batch[0].shape[0]
        y = _outputs(problem, batch, start)
        for i in sorted({0, at - start, size - 1}):
            gap = _gap(problem, y[i], _outputs(problem, [leaf[i : i + 1] for leaf in batch], start + i)[0])
            if gap > independence.ALONE[problem.dtype]:
                return f"sample {start + i} among {size} differs from the same alone by {gap:.0%} of its size"
    return ""


def _outputs(problem: Problem, batch: Sequence[Tensor], start: int) -> Tensor:
    """The outputs `(B, rows)` of some samples, of which the first is number `start` of the job."""
    # Copies, for a model that takes derivatives itself leaves its mark on what it is given.
    own = [leaf.detach().clone() for leaf in batch]
    try:
        with torch.no_grad():
            return problem.forward(problem.values(own), own)
    except Exception as error:
        found = accuse(problem, own, start, error)
        if found is None:
            raise
        raise found from error


def _extreme(leaves: Sequence[Any]) -> int:
    """The sample that holds the largest number; the first where that takes too long to find."""
    best, found = -1.0, 0
    for leaf in leaves:
        # Inputs that are read from a file by range are not read whole for this.
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and 0 < leaf.numel() <= SCANNED:
            sizes = leaf.detach().abs().reshape(leaf.shape[0], -1).amax(dim=1).nan_to_num(nan=0.0, posinf=0.0)
            largest, at = sizes.max(dim=0)
            if float(largest) > best:
                best, found = float(largest), int(at)
    return found


def _gap(problem: Problem, among: Tensor, alone: Tensor) -> float:
    rows = [slice(out.rows.start, out.rows.stop) for out in problem.outs]
    return max((relative(among[r].double(), alone[r].double()) for r in rows), default=0.0)

"""The plan: the whole contract between what decides and what computes, as frozen data.

Made before anything runs, the same for every executor, written into the receipt. Nothing here computes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ArrayPlan:
    """One array of the result.

    Attributes:
        name: which result it belongs to: `jacobian`, `weighted_gradient`, ...
        key: its name in the store: the result, then the output's and the leaf's names where there are several.
        out, leaf: indices into the problem's outputs and leaves; -1 where the array belongs to none or to all.
        shape: of the whole job.
        dtype: numpy's name of it (bfloat16 travels as float32).
        dims: a name per axis.
        axis: which axis runs over the samples; -1 where the shards' arrays are added up instead.
        factored: the block is kept as factors; `shape` is what it stands for.
        out_axes: how many axes behind the samples belong to the output, of a Jacobian or of outputs.
    """

    name: str
    key: str
    out: int
    leaf: int
    shape: tuple[int, ...]
    dtype: str
    dims: tuple[str, ...]
    axis: int
    factored: bool = False
    out_axes: int = 0

    @property
    def size(self) -> int:
        """How many numbers the dense array holds."""
        total = 1
        for n in self.shape:
            total *= n
        return total


@dataclass(frozen=True)
class Candidate:
    """One method as the planner priced it, for the whole job.

    Attributes:
        method: its name.
        refused: why it is not admissible, or the empty string.
        operations: floating-point operations.
        bytes_moved: bytes written and read.
        peak_bytes: peak memory at the chosen chunk, beyond what is held before the job.
        launches: kernel launches (calls of an operator).
        seconds: predicted, or measured where `measured`.
        measured: whether `seconds` was timed on a probe.
    """

    method: str
    refused: str = ""
    operations: float = 0.0
    bytes_moved: float = 0.0
    peak_bytes: float = 0.0
    launches: float = 0.0
    seconds: float = 0.0
    measured: bool = False


@dataclass(frozen=True)
class Shard:
    """A unit of work: a range of samples, or some output numbers of one sample. It holds no tensor.

    Attributes:
        index: its place among the job's shards.
        start, stop: the samples, half open.
        rows: which of a sample's output numbers, half open, or None for all. The shard with the first of them also
            gives every result of its samples that is not a Jacobian.
    """

    index: int
    start: int
    stop: int
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Plan:
    """How a job will be computed.

    Attributes:
        method: the method chosen.
        reason: why, in one sentence.
        candidates: every method as priced, with the reason where one was refused.
        samples: how many samples the job has.
        rows: output numbers per sample.
        chunk_size: samples in flight at a time.
        row_chunk: output rows (tangent columns for `forward`) in flight at a time.
        shard_size: samples per shard; a multiple of `chunk_size`, so that any number of workers sees the same chunks.
        arrays: what the result holds.
        bytes_out: bytes of the result as it is kept.
        peak_bytes: predicted peak beyond what is held before the job, on one worker.
        budget_bytes: the memory that the plan keeps within.
        device, dtype, threads: where and in what precision; torch threads per worker, 0 for the caller's own.
        form: `dense` or `factors`.
        seed: fixes every random draw.
        batched: the model may be called on several samples at once; otherwise it is called on one at a time, or under
            `vmap`, which shows it one.
        compared: every chunk is first compared with what its samples give alone, and computed one sample at a time
            where they differ.
        cuts: where `chain` brackets the model, as text.
        row_cuts: where one sample's output numbers are cut into shards, both ends included; empty where no sample is
            too large for a shard.
        notes: what a reader should know: rungs that failed, outputs without derivative, coupled samples.
    """

    method: str
    reason: str
    candidates: tuple[Candidate, ...]
    samples: int
    rows: int
    chunk_size: int
    row_chunk: int
    shard_size: int
    arrays: tuple[ArrayPlan, ...]
    bytes_out: int
    peak_bytes: int
    budget_bytes: int
    device: str
    dtype: str
    form: str
    seed: int
    threads: int = 0
    batched: bool = True
    compared: bool = False
    cuts: tuple[str, ...] = ()
    row_cuts: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def row_parts(self) -> int:
        """Into how many shards one range of samples is cut."""
        return max(len(self.row_cuts) - 1, 1)

    @property
    def shard_count(self) -> int:
        """How many shards cover the samples."""
        return -(-self.samples // self.shard_size) * self.row_parts

    def shards(self) -> Iterator[Shard]:
        """The shards in order; together they cover every sample exactly once. Each is made when it is asked for."""
        for index in range(self.shard_count):
            yield self.shard(index)

    def shard(self, index: int) -> Shard:
        """The shard at this index."""
        place, part = divmod(index, self.row_parts)
        start = place * self.shard_size
        rows = (self.row_cuts[part], self.row_cuts[part + 1]) if self.row_cuts else None
        return Shard(index, start, min(start + self.shard_size, self.samples), rows)

    def array(self, name: str) -> tuple[ArrayPlan, ...]:
        """The arrays that belong to one result."""
        return tuple(array for array in self.arrays if array.name == name)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, for the receipt."""
        return dataclasses.asdict(self)

    @property
    def digest(self) -> str:
        """A hash of what decides the numbers: two runs with one digest give the same bits under the same threads."""
        decides = {
            key: value
            for key, value in self.to_dict().items()
            if key not in ("candidates", "reason", "notes", "bytes_out", "peak_bytes", "budget_bytes")
        }
        return hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()

    def explain(self) -> str:
        """The plan in words: what was chosen and why, and a table of every method with its price or its refusal."""
        from jacray_workers.planning.explain import explain_plan

        return explain_plan(self)

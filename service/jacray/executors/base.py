"""The one interface between a job and whatever computes its shards."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from jacray_workers.errors import CancelledError, ModelError
from jacray_workers.plan import Plan, Shard
from jacray_workers.problem.problem import as_module
from jacray_workers.request import Request
from jacray_workers.shard import ShardResult
from torch import Tensor
from torch.utils import _pytree as pytree

from jacray.target import Target
from jacray.transport import Packed, alone, pack, parameters_only

Into = Callable[[Shard], dict[str, Tensor]]
"""Gives the part of the job's arrays that a shard may write to directly, where memory is shared."""


@dataclass(frozen=True)
class Begun:
    """The first shard goes to a worker that is ready. Comes once, before everything else."""


@dataclass(frozen=True)
class Done:
    """A shard and its blocks.

    Attributes:
        result: what was computed.
        worker: which worker computed it, as a short name.
    """

    result: ShardResult
    worker: str
    attempt: int = 1


@dataclass(frozen=True)
class Retried:
    """A shard that was lost with its worker, or failed, and has been queued again.

    Attributes:
        shard: which.
        attempt: how often it was tried so far.
        reason: why it was lost.
    """

    shard: Shard
    attempt: int
    reason: str


@dataclass(frozen=True)
class Failed:
    """A shard that is given up.

    Attributes:
        shard: which.
        error: why. Its cause is the worker's traceback where there is one.
        attempt: how often it was tried.
        worker: which worker tried it last.
    """

    shard: Shard
    error: Exception
    attempt: int
    worker: str


Step = Begun | Done | Retried | Failed


@dataclass(frozen=True)
class Payload:
    """Everything that computing a job's shards needs. What travels to a worker, once.

    Attributes:
        model: the module or callable.
        inputs: the whole batch.
        request: what to compute.
        plan: how; workers never plan.
        target: the store that workers write their blocks into; None sends them back.
        writes: the model writes into its parameters or buffers, as the coordinator found when it prepared the job:
            every worker then needs them in memory of its own.
    """

    model: Any
    inputs: Any
    request: Request
    plan: Plan
    target: Target | None = None
    writes: bool = False

    def pack(self, *, copy: bool) -> Packed:
        """This work as a pickle and arrays; see `transport.pack`.

        Raises:
            ModelError: the model cannot be pickled.
        """
        given = alone((self.inputs, self.request.weights, self.request.vectors))
        inputs, weights, vectors = given
        request = self.request.model_copy(update={"weights": weights, "vectors": vectors})
        module = as_module(self.model)
        read_only = [*parameters_only(module), *_tensors(given)]
        try:
            sent = replace(self, model=module, inputs=inputs, request=request)
            return pack(sent, read_only=read_only, copy=copy)
        except Exception as error:
            raise ModelError(
                "model", f"must be picklable to travel to a worker, but raised {type(error).__name__}: {error}",
                type(self.model).__name__,
                "keep open files and locks out of its attributes, or use jacray.compute, which pickles nothing",
            ) from error  # fmt: skip


@dataclass
class Task:
    """One job as an executor holds it.

    Attributes:
        id: the job's id.
        plan: how it is computed.
        held: the executor's own handle on the work, a snapshot.
        target: the store that its workers write into, or None.
        user: whose job it is; workers are shared fairly among users, then among a user's jobs.
        timeout: how many seconds a worker may take over one shard; None for any number.
        kept: indices of shards that were computed before.
        cancelled: set when the job is to end.
    """

    id: str
    plan: Plan
    held: Any
    target: Target | None = None
    user: str = ""
    timeout: float | None = None
    kept: Container[int] = ()
    cancelled: threading.Event = field(default_factory=threading.Event)

    def shards(self) -> Iterator[Shard]:
        """The shards that are left to compute, in order."""
        return (shard for shard in self.plan.shards() if shard.index not in self.kept)


class Executor(Protocol):
    """Computes shards somewhere. Safe to use from several threads; jobs share its workers.

    Attributes:
        name: its name in receipts.
        workers: how many shards it computes at a time.
        threads: how many torch threads each uses.
        device: `cpu` where workers have no GPU, `auto` where they take what they find.
    """

    name: str
    workers: int
    threads: int
    device: str

    def begin(self) -> None:
        """Start to make ready, without waiting. Needs not be called."""

    def keep(self, job: str, payload: Payload) -> Task:
        """Take a snapshot of the work. Afterwards the caller may change the model and the inputs.

        Raises:
            RequestError: there is nothing at the address.
            ModelError: the model cannot be sent.
        """

    def run(self, task: Task, into: Into) -> Iterator[Step]:
        """Compute the task's shards and give each as it is done or given up, in any order.

        Closing the iterator ends what is still running.

        Raises:
            CancelledError: the task was cancelled.
            ShardError: there is no worker, and none will come.
        """

    def scale(self, workers: int) -> None:
        """Go on with another number of workers; those that are let go finish what they have."""

    def cancel(self, task: Task) -> None:
        """Make `run` of this task end soon, without touching other tasks."""

    def drop(self, task: Task) -> None:
        """Forget the snapshot."""

    def close(self) -> None:
        """Give back everything that was taken. Later calls do nothing."""


def was_cancelled(task: Task) -> CancelledError:
    """The error that ends a cancelled job."""
    return CancelledError("job", "was cancelled", None, f"submit it again to compute it (it was job {task.id})")


def samples_of(shard: Shard) -> str:
    """A shard's samples in words."""
    return f"samples {shard.start} to {shard.stop - 1}" if shard.stop - shard.start > 1 else f"sample {shard.start}"


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]

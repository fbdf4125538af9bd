"""What runs inside a worker process. Knows nothing of Ray, so it can be tried without."""

from __future__ import annotations

import os
import platform
import traceback
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from jacray_workers.engine import Prepared, prepare
from jacray_workers.errors import CancelledError, ModelError, Plain, ShardError
from jacray_workers.plan import Shard
from jacray_workers.shard import ShardResult

from jacray.executors.base import Payload
from jacray.executors.shards import compute, writer_for
from jacray.transport import Packed, fingerprint, pack, unpack

if TYPE_CHECKING:
    from jacray.store import Writer


@dataclass(frozen=True)
class Reply:
    """A shard's result, or why there is none.

    Attributes:
        result: what was computed.
        error: what was raised instead.
        trace: the traceback as text.
    """

    result: ShardResult | None = None
    error: Exception | None = None
    trace: str = ""


class WorkerTraceback(Exception):  # noqa: N818  (it is shown as the cause of an error, and never raised)
    """The traceback of an error that was raised in a worker, as the cause of the error raised in the client."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@dataclass
class _Open:
    """One task in this worker: unpacked and prepared when its first shard comes."""

    packed: Packed
    prepared: Prepared | None = None
    writer: Writer | None = None
    mark: int | None = None


@dataclass
class Worker:
    """Computes shards of the tasks it was given.

    Attributes:
        threads: how many torch threads to compute with.
    """

    threads: int
    _tasks: dict[str, _Open] = field(default_factory=dict)
    _cancelled: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        torch.set_num_threads(self.threads)

    def ready(self) -> dict[str, Any]:
        """Who this worker is, once it can compute."""
        return {
            "pid": os.getpid(),
            "node": platform.node(),
            "versions": versions(),
            "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "",
        }

    def open(self, task: str, packed: Packed) -> None:
        """Take the model, inputs, request and plan of a task. Comes before its first shard."""
        self._tasks.setdefault(task, _Open(packed))

    def compute(self, task: str, shard: Shard, halvings: int = 0) -> Packed:
        """Compute one shard; never raises.

        Args:
            task: its job.
            shard: which samples.
            halvings: how often the plan's chunk is halved, because workers ran out of memory over this shard.

        Returns:
            A packed `Reply`. Blocks that the receiver copies into place are marked as usable where they lie.
        """
        # OpenMP keeps the count per thread, and Ray may call from another thread than the one that made this object.
        torch.set_num_threads(self.threads)
        try:
            reply = Reply(self._compute(task, shard, halvings))
            placed = _placed(reply.result, self._tasks[task])
            return pack(reply, read_only=placed, compact=True)
        except Exception as error:  # noqa: BLE001  (everything a model raises goes to the caller as it is)
            return _pack_error(error)

    def cancel(self, task: str) -> None:
        """End the task's shards at their next chunk. Called while `compute` runs in another thread."""
        self._cancelled.add(task)

    def drop(self, task: str) -> None:
        """Forget a task."""
        self._tasks.pop(task, None)
        self._cancelled.discard(task)

    def _compute(self, task: str, shard: Shard, halvings: int) -> ShardResult:
        if task in self._cancelled:
            raise CancelledError("job", "was cancelled", task)
        known = self._tasks[task]
        prepared = known.prepared or _prepare(known)
        if halvings:
            smaller = max(1, prepared.plan.chunk_size >> halvings)
            prepared = replace(prepared, plan=replace(prepared.plan, chunk_size=smaller))
        result = compute(prepared, known.writer, shard, lambda: task in self._cancelled)
        if known.mark is not None:
            _refuse_writes(known)
        return result


def _placed(result: ShardResult | None, known: _Open) -> list[Any]:
    """The blocks that the client copies into place."""
    if result is None or known.prepared is None:
        return []
    keys = {a.key for a in known.prepared.plan.arrays if a.axis >= 0 and not a.factored}
    return [block for key, block in result.blocks.items() if key in keys]


def versions() -> dict[str, str]:
    """The versions that must agree between a client and its workers."""
    import jacray

    return {"jacray": jacray.__version__, "torch": torch.__version__, "python": platform.python_version()}


def _prepare(known: _Open) -> Prepared:
    """Prepare the task on parameters where they lie, which is in memory that other workers read.

    A model that writes into them, as the coordinator has found, gets them in memory of its own: what one worker puts
    there and back, another may have read in between.

    Raises:
        ModelError: the model writes into its parameters on workers only.
    """
    payload = _opened(known.packed)
    known.writer = writer_for(payload.target, payload.plan)
    model = _own_memory(payload.model) if payload.writes else payload.model
    mark = None if payload.writes else fingerprint(known.packed)
    prepared = prepare(model, payload.inputs, payload.request, plan=payload.plan)
    if prepared.problem.written and not payload.writes:
        raise ModelError(
            "model", "must write into its parameters wherever it runs, or nowhere, but did so on a worker only",
            Plain(", ".join(prepared.problem.written[:3])), "let no parameter depend on where the model is evaluated",
        )  # fmt: skip
    known.prepared, known.mark = prepared, mark
    return prepared


def _opened(packed: Packed) -> Payload:
    try:
        payload: Payload = unpack(packed)
    except Exception as error:
        raise ModelError(
            "model", f"must be importable on the workers, but raised {type(error).__name__}: {error}", None,
            "install the package that defines it there, or define it in the script itself",
        ) from error  # fmt: skip
    return payload


def _own_memory(model: Any) -> Any:
    """The model with parameters and buffers in memory of this process."""
    if isinstance(model, torch.nn.Module):
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
    return model


def _refuse_writes(known: _Open) -> None:
    """After the first shard: parameters and inputs lie in memory that other workers read, and must be as they were.

    Raises:
        ModelError: the model changed one of them in place.
    """
    mark, known.mark = known.mark, None
    if fingerprint(known.packed) != mark:
        raise ModelError(
            "model", "must not change its parameters or inputs in place while it is evaluated", None,
            "write y = x * 2 in place of x.mul_(2), and inplace=False in activations that see the inputs",
        )  # fmt: skip


def _pack_error(error: Exception) -> Packed:
    trace = "".join(traceback.format_exception(error))
    error.__cause__ = error.__context__ = None
    error.__traceback__ = None
    try:
        packed = pack(Reply(error=error, trace=trace))
        unpack(packed)
    except Exception:  # noqa: BLE001  (an exception class may do anything in its pickling)
        return pack(Reply(error=ShardError(f"{type(error).__name__}: {error}"), trace=trace))
    return packed

"""Where shards are computed: in this process or on Ray workers, behind one interface."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jacray_workers.errors import RequestError
from jacray_workers.validation import nearest

if TYPE_CHECKING:
    from jacray.executors.base import Executor

ADDRESSES = ("inline", "local", "auto", "ray://HOST:PORT")


def make_executor(address: str, workers: int, cpus: float, gpus: float) -> Executor:
    """The executor for an address. The one place where an address is given its meaning.

    Args:
        address: `inline` computes in this process; `local` starts a Ray for this process, or joins the one it
            already has; `auto` and `ray://HOST:PORT` connect to a running cluster.
        workers: how many shards are computed at a time.
        cpus: CPUs of each worker; its torch threads are max(1, int(cpus)).
        gpus: GPUs of each worker.

    Raises:
        RequestError: an argument breaks a rule.
    """
    _check(workers, cpus, gpus)
    if address == "inline":
        from jacray.executors.inline import InlineExecutor

        return InlineExecutor(workers, max(1, int(cpus)))
    if address in ("local", "auto") or address.startswith("ray://"):
        from jacray.executors.ray import RayExecutor

        return RayExecutor(address, workers, cpus, gpus)
    raise RequestError("address", f"must be one of {', '.join(ADDRESSES)}", address, nearest(address, ADDRESSES[:3]))


def _check(workers: Any, cpus: float, gpus: float) -> None:
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise RequestError("workers", "must be a whole number, at least 1", workers)
    if not cpus > 0:
        raise RequestError("cpus_per_worker", "must be above 0; fractions are allowed", cpus)
    if not gpus >= 0:
        raise RequestError("gpus_per_worker", "must be 0 or more; fractions are allowed", gpus)

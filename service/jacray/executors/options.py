"""Which workers a client asks for, as one checked value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jacray_workers.errors import RequestError
from jacray_workers.validation import nearest

ADDRESSES = ("inline", "local", "auto", "ray://HOST:PORT")


@dataclass(frozen=True)
class WorkerOptions:
    """Where workers are and what each is given.

    Attributes:
        address: `inline` computes in this process; `local` starts a Ray for this process, or joins the one it already
            has; `auto` and `ray://HOST:PORT` connect to a running cluster.
        workers: how many shards are computed at a time.
        cpus: CPUs of each worker; its torch threads are max(1, int(cpus)).
        gpus: GPUs of each worker; fractions share one.
        resources: what else of a Ray cluster each takes, by name.
        runtime_env: what Ray sends to a running cluster's nodes or installs there, in Ray's own words.

    Raises:
        RequestError: a value breaks a rule.
    """

    address: str = "local"
    workers: int = 2
    cpus: float = 1.0
    gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)
    runtime_env: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.address not in ADDRESSES[:3] and not self.address.startswith("ray://"):
            close = nearest(self.address, ADDRESSES[:3])
            raise RequestError("address", f"must be one of {', '.join(ADDRESSES)}", self.address, close)
        check_workers(self.workers)
        if not self.cpus > 0:
            raise RequestError("cpus_per_worker", "must be above 0; fractions are allowed", self.cpus)
        if not self.gpus >= 0:
            raise RequestError("gpus_per_worker", "must be 0 or more; fractions are allowed", self.gpus)
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise RequestError("gpus_per_worker", "must be a whole number above 1: Ray splits one GPU only", self.gpus)
        for name, amount in self.resources.items():
            check_resource(name, amount)
        if self.runtime_env and self.address in ("inline", "local"):
            raise RequestError(
                "runtime_env", "is for workers of a running cluster; those of this machine have what this process has",
                self.address, "leave it out, or use address auto or ray://HOST:PORT",
            )  # fmt: skip

    @property
    def threads(self) -> int:
        """Torch threads of each worker."""
        return max(1, int(self.cpus))

    def check_there(self, workers: int, have: Mapping[str, float]) -> None:
        """Whether a machine has what so many workers take of GPUs and further resources.

        Raises:
            RequestError: it has not.
        """
        if self.gpus * workers > have.get("GPU", 0.0):
            raise RequestError(
                "gpus_per_worker", f"{workers} workers with {self.gpus:g} each need more GPUs than there are",
                have.get("GPU", 0.0), "ask for fewer, or 0",
            )  # fmt: skip
        for name, amount in self.resources.items():
            if amount * workers > have.get(name, 0.0):
                raise RequestError(
                    f"resources.{name}", f"{workers} workers with {amount:g} each need more than there is",
                    have.get(name, 0.0), "a Ray of one's own has none; start a cluster with it and use address='auto'",
                )  # fmt: skip


def check_workers(workers: Any) -> None:
    """A number of workers.

    Raises:
        RequestError: it is none.
    """
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise RequestError("workers", "must be a whole number, at least 1", workers)


def check_resource(name: str, amount: Any) -> None:
    """One of the further resources.

    Raises:
        RequestError: it has a setting of its own, or no sensible amount.
    """
    own = {"CPU": "cpus_per_worker", "GPU": "gpus_per_worker"}
    if name in own:
        raise RequestError(f"resources.{name}", "has a setting of its own", amount, f"use {own[name]}")
    if isinstance(amount, bool) or not isinstance(amount, int | float) or not amount > 0:
        raise RequestError(f"resources.{name}", "must be a number above 0", amount)
    if amount > 1 and amount != int(amount):
        raise RequestError(f"resources.{name}", "must be a whole number where it is above 1", amount)

"""What a service is told when it starts: where it listens, who may come in, and how much anyone may ask of it."""

from __future__ import annotations

import functools
import ipaddress
from pathlib import Path
from typing import Annotated, Literal

import psutil
from jacray_workers.errors import Plain, RequestError, SpecError
from jacray_workers.spec_parts import Spec
from jacray_workers.validation import explain
from pydantic import Field, ValidationError

Count = Annotated[int, Field(ge=1, le=1 << 20)]
Bytes = Annotated[int, Field(ge=1, le=1 << 50)]
Seconds = Annotated[float, Field(gt=0, le=1e7, allow_inf_nan=False)]


class Limits(Spec):
    """How much anyone may ask. Every one of them is a setting."""

    body_bytes: Bytes = Field(default=2 << 30, description="the most bytes of a request's body")
    json_bytes: Bytes = Field(default=4 << 20, description="the most bytes of a body in JSON")
    json_numbers: Count = Field(default=100_000, description="the most numbers of an answer in JSON")
    stored_bytes: Bytes = Field(default=20 << 30, description="the most bytes of uploads that one user may keep")
    result_bytes: Bytes = Field(default=1 << 30, description="the most bytes of one answer of /v1/compute")
    job_bytes: Bytes = Field(default=100 << 30, description="the most bytes of a job's result")
    memory_bytes: Bytes = Field(default=2 << 30, description="the memory budget of one piece of work")
    process_bytes: Bytes | None = Field(default=None, description="what a compute process may hold; a share by default")
    warm_bytes: Bytes = Field(default=1 << 30, description="models that each compute process keeps warm")
    compute_seconds: Seconds = Field(default=60.0, description="the most seconds of one batch of small work")
    job_seconds: Seconds = Field(default=24 * 3600.0, description="the most seconds that a job may run")
    waiting_per_user: Count = Field(default=256, description="small requests of one user that may wait")
    waiting: Count = Field(default=2048, description="small requests that may wait in all")
    jobs_per_user: Count = Field(default=100, description="jobs of one user that may be queued or running")
    running_jobs: Count = Field(default=4, description="jobs that run at a time")
    kept_jobs: Count = Field(default=1000, description="finished jobs that are kept for each user, the latest first")
    connections: Count = Field(default=1024, description="connections that may be open at a time")
    connections_per_user: Count = Field(
        default=256, description="how many of them may be one user's, or of one address that has shown no token yet"
    )
    header_seconds: Seconds = Field(default=10.0, description="a connection must send a request's head within these")
    idle_seconds: Seconds = Field(default=30.0, description="a body or an answer may stand still for so long")
    body_rate: Bytes = Field(default=10_000, description="bytes a second that a slow body must keep up with")
    stop_seconds: Seconds = Field(default=20.0, description="what is being computed may take so long when stopping")
    window_seconds: Annotated[float, Field(ge=0, le=1)] = Field(default=0.003, description="how long a batch may fill")
    batch_samples: Count = Field(default=512, description="samples of one batch of small work")
    batch_requests: Count = Field(default=128, description="requests of one batch of small work")


class Settings(Spec):
    """A service's settings."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8765
    state: Path = Field(default=Path("runs/service"), description="a folder for uploads, jobs and results")
    address: str = Field(default="local", description="where jobs run: inline, local, auto or ray://HOST:PORT")
    workers: Count = Field(default=2, description="workers for jobs, and as many processes for small work")
    cpus_per_worker: Count = 1
    gpus_per_worker: Annotated[float, Field(ge=0, le=64)] = 0
    tokens: Path | None = Field(default=None, description="a file of lines NAME TOKEN; JACRAY_TOKENS works too")
    tls_cert: Path | None = None
    tls_key: Path | None = None
    proxy: bool = Field(default=False, description="a proxy in front of the service does TLS")
    import_prefixes: tuple[str, ...] = Field(default=(), description="packages that models may be imported from")
    data: Path | None = Field(default=None, description="a folder whose files specs may name")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    limits: Limits = Limits()

    @functools.cached_property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def process_bytes(self) -> int:
        """What a compute process may hold."""
        share = int(psutil.virtual_memory().total * 0.8 / self.workers)
        return self.limits.process_bytes or share


def make_settings(**given: object) -> Settings:
    """Checked settings.

    Raises:
        SpecError: naming the setting, the rule, the value and the nearest known name.
    """
    try:
        return Settings.model_validate(given)
    except ValidationError as error:
        raise SpecError(*explain(error, Settings)) from None


def check_exposure(settings: Settings, users: int) -> None:
    """Refuse an address that others can reach without tokens, and without somebody who does TLS.

    Raises:
        RequestError: naming what is missing.
    """
    if (settings.tls_cert is None) != (settings.tls_key is None):
        raise RequestError("tls", "needs both a certificate and its key", None, "give --tls-cert and --tls-key")
    if settings.loopback:
        return
    host = Plain(settings.host)
    if not users:
        way_out = "give --tokens FILE with lines NAME TOKEN, or listen on 127.0.0.1"
        raise RequestError("host", "must be a loopback address unless there are tokens", host, way_out)
    if settings.tls_cert is None and not settings.proxy:
        way_out = "give --tls-cert and --tls-key, or --proxy where a proxy in front does TLS"
        raise RequestError("host", "must be a loopback address unless connections are encrypted", host, way_out)

"""The process that runs the service's jobs: one ordinary client, a thread per job, and news on a socket.

    python -m jacray.http.runner SOCKET LIFELINE

It takes frames that start and cancel jobs, and sends frames that say what becomes of them. What a job leaves lies in
its folder; this process may be ended and started again at any time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import mmap
import os
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jacray_workers.errors import BudgetError, JacrayError, JobError, Plain, StorageError
from jacray_workers.planning.explain import size
from jacray_workers.request import Request, make_request

from jacray.client import Client
from jacray.events import Event
from jacray.http import channel
from jacray.http.folders import JobFolder
from jacray.http.problems import problem
from jacray.http.warm import bounded, build_model
from jacray.http.work import read_asked
from jacray.job import Job

logger = logging.getLogger(__name__)

Tell = Callable[[Mapping[str, Any]], None]


class Runner:
    """Runs jobs on a client and tells what happens."""

    def __init__(self, told: Mapping[str, Any], tell: Tell) -> None:
        self.told, self.tell = told, tell
        self.client = Client(
            told["address"],
            workers=told["workers"],
            cpus_per_worker=told["cpus_per_worker"],
            gpus_per_worker=told["gpus_per_worker"],
        )
        self.client.__enter__()
        self._lock = threading.Lock()
        # Trials of methods are timed: those of another job at the same time would spoil them.
        self._planning = threading.Lock()
        self._jobs: dict[str, Job | None] = {}
        self._ended: set[str] = set()

    def start(self, head: Mapping[str, Any]) -> None:
        """Run a job in a thread of its own."""
        with self._lock:
            self._jobs[head["job"]] = None
        threading.Thread(target=self._run, args=(head,), name=f"job-{head['job']}", daemon=True).start()

    def cancel(self, identity: str) -> None:
        """End a job soon, or before it begins."""
        with self._lock:
            job = self._jobs.get(identity)
            self._ended.add(identity)
        if job is not None:
            job.cancel()

    def _run(self, head: Mapping[str, Any]) -> None:
        identity, planned = head["job"], False
        try:
            job = self._submit(head)
            planned = True
            job.listen(lambda event: self._event(identity, event))
            result = job.result()
            JobFolder(Path(head["folder"])).finish(result)
            self.tell({"job": identity, "news": "done"})
        except JobError as error:
            news = "cancelled" if identity in self._ended else "failed"
            self.tell({"job": identity, "news": news, "problem": problem(error), "planned": planned})
        except Exception as error:
            if not isinstance(error, JacrayError):
                logger.info("job %s failed", identity, exc_info=error)
            self.tell({"job": identity, "news": "failed", "problem": problem(error), "planned": planned})
        finally:
            with self._lock:
                self._jobs.pop(identity, None)
                self._ended.discard(identity)

    def _submit(self, head: Mapping[str, Any]) -> Job:
        """Build what was sent, and submit it."""
        asked = read_asked(head["item"], _mapped(head["item"].get("file")))
        model = build_model(asked.model, Path(self.told["base"]), tuple(self.told["import_prefixes"]))
        request = bounded(asked.request, self.told["memory_bytes"])
        folder = JobFolder(Path(head["folder"]))

        def submit() -> Job:
            with self._planning:
                return self.client.submit(
                    model,
                    asked.inputs,
                    request=_explicit(request),
                    to=folder.path.absolute(),
                    user=head["user"],
                    on_error=head["item"].get("on_error", "fail"),
                )

        try:
            job = submit()  # goes on from the shards that an attempt before this one has finished
        except (StorageError, JobError) as error:
            if not folder.results.exists():
                raise
            logger.warning("job %s starts afresh: %s", head["job"], error)
            folder.clear()
            job = submit()
        with self._lock:
            self._jobs[head["job"]] = job
            ended = head["job"] in self._ended
        if ended:
            job.cancel()
        self._check_size(job)
        plan = job.plan
        self.tell(
            {
                "job": head["job"], "news": "planned", "samples": plan.samples, "shards": plan.shard_count,
                "bytes_out": plan.bytes_out, "method": plan.method, "explained": plan.explain(),
            }
        )  # fmt: skip
        return job

    def _check_size(self, job: Job) -> None:
        most = self.told["job_bytes"]
        if job.plan.bytes_out > most:
            job.cancel()
            rule = f"must give a result of at most {size(most)}"
            raise BudgetError("returns", rule, Plain(size(job.plan.bytes_out)), "ask for less, or for fewer samples")

    def _event(self, identity: str, event: Event) -> None:
        facts = {name: value for name, value in asdict(event).items() if name not in ("job", "at")}
        self.tell({"job": identity, "news": "event", "kind": type(event).__name__, **facts})


def _explicit(request: Request) -> Request:
    """The request with jobs' own default, so that the receipt says so."""
    return request if request.verify is not None else make_request(request, verify=True)


def _mapped(path: str | None) -> Any:
    if path is None:
        return None
    with Path(path).open("rb") as stream:
        return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY))


def main(arguments: Sequence[str]) -> int:
    """Start: the first frame holds the settings."""
    sock_fd, life_fd = map(int, arguments)
    channel.hold_on(life_fd)
    logging.basicConfig(level=os.environ.get("JACRAY_LOG", "WARNING"), format="%(levelname)s %(name)s %(message)s")
    # A Ray of its own would keep a record of every task for its dashboard, which nobody opens: memory that only grows.
    os.environ.setdefault("RAY_task_events_report_interval_ms", "0")
    os.nice(5)  # and the Ray that it starts: the process that listens must answer while every worker is busy
    sock = socket.socket(fileno=sock_fd)
    lock = threading.Lock()

    def tell(head: Mapping[str, Any]) -> None:
        with lock, contextlib.suppress(OSError):
            channel.send(sock, json.loads(json.dumps(head, default=str)))

    found = channel.receive(sock)
    if found is None:
        return 0
    try:
        runner = Runner(found[0], tell)
    except JacrayError as error:
        tell({"failed": problem(error)})
        return 1
    tell({"ready": os.getpid()})
    while (found := channel.receive(sock)) is not None:
        head = found[0]
        if head["do"] == "start":
            runner.start(head)
        elif head["do"] == "cancel":
            runner.cancel(head["job"])
    runner.client.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

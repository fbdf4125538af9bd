"""A job of a service, as its owner sees it: the same calls as on a job of one's own machine."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from jacray_workers.errors import FaultError
from jacray_workers.plan import Plan

from jacray import events
from jacray.events import Event, Listener
from jacray.http import wire
from jacray.http.connection import Connections
from jacray.http.messages import RemoteResult, array_of, result_of, tensors
from jacray.http.problems import error_of
from jacray.job import Job, JobStatus, JobTimeoutError

if TYPE_CHECKING:
    from jacray.result import Result

_WAIT = 20
_LAST = ("JobDone", "JobFailed", "JobCancelled")


class RemoteJob(Job):
    """Made by `Client.submit` over HTTP, or by `Client.job(ID)`.

    Attributes:
        id: its id on the service.
        explained: how it is computed, in words.
    """

    def __init__(self, connections: Connections, shown: Mapping[str, Any]) -> None:
        self.id = str(shown["id"])
        self._connections = connections
        self._shown = dict(shown)
        self._found: RemoteResult | None = None

    @property
    def plan(self) -> Plan:  # type: ignore[override]
        """The plan that was followed; waits for the end."""
        found: Plan = self.result().plan
        return found

    @property
    def explained(self) -> str:
        """How it is computed, in words; waits for the plan."""
        return str(self._connections.json("GET", f"/v1/jobs/{self.id}/plan")["explained"])

    def facts(self) -> dict[str, Any]:
        """All that the service says of the job: who, when, what digest."""
        return dict(self._look())

    def status(self) -> JobStatus:
        """How far the job is now."""
        return _status(self._look())

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the result.

        Raises:
            JobTimeoutError: the job is not done yet; it goes on.
            JobError: the job was cancelled.
            Exception: what made the job fail.
        """
        if self._found is not None:
            return self._found
        if not self.wait(timeout):
            raise JobTimeoutError(
                "timeout", f"job {self.id} must finish within it", f"{timeout} s", "wait longer, or cancel the job"
            )
        if self._shown["problem"] is not None:
            raise error_of(self._shown["problem"])
        data = self._connections.download(f"/v1/jobs/{self.id}/result")
        self._found = result_of(wire.read_header(data), data)
        return self._found

    def array(self, key: str, start: int = 0, stop: int | None = None) -> Any:
        """One array of the result, or the part of it that belongs to some samples; nothing else travels.

        Args:
            key: which, as in the plan's `arrays`: `jacobian`, `jacobian.fc.weight`, ...
            start: the first sample.
            stop: the sample after the last; None goes to the end.

        Raises:
            UserError: there is no such array, or no such samples.
        """
        query = {"array": key, "start": start, **({} if stop is None else {"stop": stop})}
        data = self._connections.download(f"/v1/jobs/{self.id}/result", query)
        header = wire.read_header(data)
        return array_of(key, header.about, tensors(header, data))

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the job has ended, however it did; returns whether it has."""
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            left = _WAIT if until is None else until - time.monotonic()
            if _status(self._look(min(max(left, 0.0), _WAIT))).finished:
                return True
            if until is not None and time.monotonic() >= until:
                return False

    def cancel(self) -> bool:
        """End the job soon. Returns False where it had already ended."""
        if self.status().finished:
            return False
        self._shown = self._connections.json("POST", f"/v1/jobs/{self.id}/cancel")
        return True

    def delete(self) -> None:
        """Let the service forget the job and its result."""
        self._connections.json("DELETE", f"/v1/jobs/{self.id}")

    def events(self) -> Iterator[Event]:
        """The job's events until it has ended. A dropped connection goes on where it was."""
        after = 0
        while True:
            headers = {"Last-Event-ID": str(after), "Accept": "text/event-stream"}
            try:
                with self._connections.open("GET", f"/v1/jobs/{self.id}/events", headers=headers) as response:
                    for number, data in _lines(response):
                        after = max(after, number)
                        event = _event(self.id, data)
                        if event is not None:
                            yield event
                        if data["kind"] in _LAST:
                            return
            except FaultError:  # it dropped in the middle, and the next attempt goes on from there
                if not self.wait(0.5):
                    continue
            if self.status().finished:
                return

    def listen(self, listener: Listener) -> None:
        """Call `listener` with each event, in a thread."""

        def follow() -> None:
            for event in self.events():
                listener(event)

        threading.Thread(target=follow, name=f"jacray-listen-{self.id}", daemon=True).start()

    def __repr__(self) -> str:
        now = self.status()
        return f"Job({self.id}: {now.state}, {now.samples_done} of {now.samples} samples)"

    def _look(self, wait: float = 0.0) -> dict[str, Any]:
        # A wait is rounded up by the service's whole seconds at most, and never down to a busy loop.
        query = {"wait": max(int(wait), 1)} if wait > 0 else None
        found: dict[str, Any] = self._connections.json("GET", f"/v1/jobs/{self.id}", query=query)
        self._shown = found
        return found


def _status(shown: Mapping[str, Any]) -> JobStatus:
    failed = shown["state"] == "failed" and shown["problem"] is not None
    error = f"{shown['problem']['kind']}: {shown['problem']['detail']}" if failed else ""
    return JobStatus(
        shown["state"], shown["samples_done"], shown["samples"], shown["shards_done"], shown["shards"],
        shown["retries"], shown["elapsed"], error,
    )  # fmt: skip


def _lines(response: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """Server-sent events: a number and JSON data each."""
    number = 0
    for line in response:
        text = line.decode().rstrip("\n")
        if text.startswith("id: "):
            number = int(text[4:])
        elif text.startswith("data: "):
            yield number, json.loads(text[6:])


def _event(job: str, data: Mapping[str, Any]) -> Event | None:
    kind = getattr(events, str(data["kind"]), None)
    if not (isinstance(kind, type) and issubclass(kind, Event)):
        return None
    known = {field.name for field in dataclasses.fields(kind)}
    given = {name: value for name, value in data.items() if name in known}
    return kind(job=job, at=time.monotonic(), **given)

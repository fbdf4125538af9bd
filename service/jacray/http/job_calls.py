"""What the operations on jobs do."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from jacray_workers.errors import Plain

from jacray.http import wire
from jacray.http.calls import JSON, Answer, Call, failed, receive, said
from jacray.http.problems import HttpError
from jacray.http.records import FINAL, Record

if TYPE_CHECKING:
    from jacray.http.results import Stored
    from jacray.http.service import Service

PLAN_SECONDS = 20.0
MOST_WAIT = 60.0
PULSE = 15.0
STATES = ("queued", "running", *FINAL)


async def submit(service: Service, call: Call) -> Answer:
    """Queue a job, and wait a little for its plan, so that a mistake is told at once."""
    key = call.headers.get("idempotency-key") or uuid.uuid4().hex
    if not 1 <= len(key) <= 200 or not key.isprintable():
        raise HttpError(400, "Idempotency-Key", "must be 1 to 200 printable characters", Plain(key[:50]))
    body = await receive(call, service.limits, service.incoming, store=True)
    try:
        item, spec = await service.job_item(call, body)
        record, new = await service.jobs.submit(call.user, key, body, item, spec)
    finally:
        body.forget()
    if new and not service.jobs.waiting:
        await service.jobs.wait(record, PLAN_SECONDS, lambda r: r.planned or r.final)
    if new and record.state == "failed" and not record.planned and record.problem is not None:
        await service.jobs.forget_refused(record)
        return failed(record.problem)
    return said(record.shown(), 201 if new else 200, {"Location": f"/v1/jobs/{record.id}"})


async def listing(service: Service, call: Call) -> Answer:
    """The user's jobs, the latest first."""
    state = call.query.get("state")
    if state is not None and state not in STATES:
        raise HttpError(422, "state", f"must be one of {', '.join(STATES)}", state)
    return said({"jobs": service.jobs.list(call.user, state, _whole(call, "limit", 100, 1, 10_000))})


async def status(service: Service, call: Call) -> Answer:
    """One job; with `wait`, its state after so many seconds or once it has ended."""
    record = service.jobs.mine(call.user, call.path["id"])
    seconds = _whole(call, "wait", 0, 0, int(MOST_WAIT))
    if seconds:
        await service.jobs.wait(record, seconds, lambda r: r.final)
    return said(record.shown())


async def cancel(service: Service, call: Call) -> Answer:
    """End a job soon; one that has ended stays as it is."""
    record = service.jobs.mine(call.user, call.path["id"])
    await service.jobs.cancel(record)
    return said(record.shown())


async def remove(service: Service, call: Call) -> Answer:
    """Forget a job and what it left."""
    await service.jobs.remove(service.jobs.mine(call.user, call.path["id"]))
    return Answer(204)


async def plan(service: Service, call: Call) -> Answer:
    """How a job is computed, in words."""
    record = service.jobs.mine(call.user, call.path["id"])
    await service.jobs.wait(record, PLAN_SECONDS, lambda r: r.planned or r.final)
    if not record.planned:
        raise HttpError(409, "id", "names a job that has no plan yet", Plain(record.state), "ask again later")
    names = ("samples", "shards", "bytes_out", "method", "explained")
    return said({name: record.told.get(name) for name in names})


async def spec(service: Service, call: Call) -> Answer:
    """The file that a job was submitted from."""
    record = service.jobs.mine(call.user, call.path["id"])
    try:
        text = await asyncio.to_thread(service.jobs.files(record).spec.read_bytes)
    except FileNotFoundError:
        raise HttpError(404, "id", "names a job that was not submitted from a file", Plain(record.id)) from None
    return Answer(200, text)


async def receipt(service: Service, call: Call) -> Answer:
    """How a job's numbers came about."""
    record = _done(service, call)
    text = await asyncio.to_thread(service.jobs.files(record).receipt.read_bytes)
    return Answer(200, text)


async def result(service: Service, call: Call) -> Answer:
    """A job's result: whole, some of it, one array, or the part of some samples."""
    from jacray.http.results import Choice, find_span, open_result

    record = _done(service, call)
    stop = _whole(call, "stop", -1, 0, 2**62)
    choice = Choice(
        tuple(filter(None, call.query.get("result", "").split(","))), call.query.get("array"),
        _whole(call, "start", 0, 0, 2**62), None if stop < 0 else stop,
    )  # fmt: skip
    stored = await asyncio.to_thread(open_result, service.jobs.files(record), choice)
    if call.headers.get("accept", "").startswith(JSON):
        raise HttpError(406, "Accept", f"must allow {wire.MEDIA}", Plain(JSON), "results of jobs are never JSON")
    headers = {"ETag": stored.tag, "Accept-Ranges": "bytes"}
    if "sha-256" in call.headers.get("want-repr-digest", ""):
        headers["Repr-Digest"] = await asyncio.to_thread(stored.digest)
    span = find_span(call.headers, stored)
    if span is None:
        return Answer(200, _streamed(stored, 0, stored.size), wire.MEDIA, headers, stored.size)
    headers["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{stored.size}"
    return Answer(206, _streamed(stored, span.start, span.stop), wire.MEDIA, headers, len(span))


async def _streamed(stored: Stored, start: int, stop: int) -> AsyncIterator[bytes | memoryview]:
    """The pieces, each read in a thread while the one before is on its way."""
    pieces: Iterator[bytes | memoryview] = stored.pieces(start, stop)
    while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
        yield piece


async def events(service: Service, call: Call) -> Answer:
    """A job's events as they happen, as server-sent events; a reader that comes again goes on where it was."""
    record = service.jobs.mine(call.user, call.path["id"])
    last = call.headers.get("last-event-id", call.query.get("after", "0"))
    if not last.isascii() or not last.isdigit() or len(last) > 18:
        raise HttpError(400, "Last-Event-ID", "must be a whole number", Plain(last[:50]))
    return Answer(200, _sse(service, record, int(last)), "text/event-stream", {"Cache-Control": "no-store"})


async def _sse(service: Service, record: Record, after: int) -> AsyncIterator[bytes]:
    """Events, and a pulse where nothing happens, so that both ends know of each other."""
    yield _event(0, {"kind": "Status", **record.shown()}) if after == 0 else b": again\n\n"
    stream = service.jobs.events(record, after)
    pending: asyncio.Future[Any] | None = None
    try:
        for _ in itertools.count():
            pending = pending or asyncio.ensure_future(anext(stream, None))
            done, _waiting = await asyncio.wait({pending}, timeout=PULSE)
            if not done:
                yield b": pulse\n\n"
                continue
            found, pending = pending.result(), None
            if found is None:
                return
            yield _event(*found)
    finally:
        if pending is not None:
            pending.cancel()


def _event(number: int, event: Mapping[str, Any]) -> bytes:
    return f"id: {number}\nevent: {event['kind']}\ndata: {wire.dump(event)}\n\n".encode()


def _done(service: Service, call: Call) -> Record:
    record = service.jobs.mine(call.user, call.path["id"])
    if record.state != "done":
        way_out = "its problem says why" if record.final else "wait for it: GET /v1/jobs/ID?wait=60"
        raise HttpError(409, "id", "names a job that has no result", Plain(record.state), way_out)
    return record


def _whole(call: Call, name: str, default: int, low: int, high: int) -> int:
    text = call.query.get(name)
    if text is None:
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 19 or not low <= int(text) <= high:
        raise HttpError(422, name, f"must be a whole number from {low} to {high}", Plain(text[:50]))
    return int(text)

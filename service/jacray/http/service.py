"""The service itself: what each operation does, with no word of the framework that carries it."""

from __future__ import annotations

import asyncio
import functools
import logging
import shutil
import time
from collections.abc import Mapping
from typing import Any

from jacray_workers.errors import InputError, UserError

from jacray.failures import ON_ERROR
from jacray.http import spool, wire
from jacray.http.batching import Ask, Rules, Small, Waiting
from jacray.http.calls import Answer, Body, Call, failed, file_pieces, receive, said
from jacray.http.database import Database
from jacray.http.jobs import Jobs
from jacray.http.metrics import Metrics
from jacray.http.policy import Policy
from jacray.http.pool import Process
from jacray.http.recipes import Kept, Recipe
from jacray.http.settings import Settings
from jacray.http.shapes import kind_of
from jacray.http.uploads import Uploads
from jacray.http.work import read_fields

logger = logging.getLogger(__name__)

KEYS = ("model", "inputs", "request", "options")
_SMALL_OPTIONS: Mapping[str, tuple[Any, ...]] = {"batch": (True, False)}
_JOB_OPTIONS: Mapping[str, tuple[Any, ...]] = {"on_error": ON_ERROR}


class Service:
    """Everything behind the routes. Lives on one event loop, computes nothing and never blocks it.

    Args:
        settings: how it is set up.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings, self.limits = settings, settings.limits
        self.metrics = Metrics()
        self.stopping = False
        self.healthy = said({"status": "ok"})
        state = settings.state.resolve()
        for name in ("incoming", "empty"):
            (state / name).mkdir(parents=True, exist_ok=True)
        self.incoming, self.empty = state / "incoming", state / "empty"
        self._alone = spool.lock(state)
        for left in self.incoming.iterdir():  # of uploads that a killed server never finished
            left.unlink(missing_ok=True)
        self.spool = spool.make(state)
        self.database = Database(state / "service.sqlite")
        self.uploads = Uploads(state / "uploads", self.database, self.limits.stored_bytes)
        rules = Rules(
            self.limits.window_seconds, self.limits.batch_samples, self.limits.batch_requests,
            self.limits.compute_seconds, self.limits.waiting_per_user, self.limits.waiting,
        )  # fmt: skip
        self._recipes: Kept[Recipe] = Kept()
        self.small = Small(self._process, settings.workers, rules, self.metrics)
        self.jobs = Jobs(state / "jobs", self.database, self._runner, self.limits, self.metrics)

    async def start(self) -> None:
        """Make ready; the processes start in the background."""
        await self.uploads.begin()
        self.small.start()
        await self.jobs.start()

    def begin_stop(self) -> None:
        """Take no more work. Streams of events end, so that they hold nobody up."""
        self.stopping = True
        self.jobs.begin_stop()

    async def stop(self) -> None:
        """Let what is being computed finish for a while, then end everything."""
        self.begin_stop()
        until = time.monotonic() + self.limits.stop_seconds
        while (self.small.busy or self.small.waiting) and time.monotonic() < until:  # noqa: ASYNC110 - rare
            await asyncio.sleep(0.05)
        await self.small.stop()
        await self.jobs.stop(max(until - time.monotonic(), 0.0))
        self.database.close()
        shutil.rmtree(self.spool, ignore_errors=True)
        self._alone.close()

    @property
    def ready(self) -> bool:
        """Whether work is taken."""
        return not self.stopping and self.small.ready > 0 and self.jobs.ready

    # Operations -------------------------------------------------------------------------------------------------

    async def health(self, _call: Call) -> Answer:
        """The process runs and its event loop goes round."""
        return self.healthy

    async def readiness(self, _call: Call) -> Answer:
        """Whether work is taken now."""
        found = {"status": "ready" if self.ready else "not ready", "processes": self.small.ready}
        return said(found, 200 if self.ready else 503, {} if self.ready else {"Retry-After": "1"})

    async def metrics_text(self, _call: Call) -> Answer:
        """What there is to count, for Prometheus."""
        self.metrics.look(self.small.waiting, self.small.ready, self.small.busy, self.jobs.waiting)
        return Answer(200, self.metrics.text(), self.metrics.media)

    async def compute(self, call: Call) -> Answer:
        """Small work in one round trip."""
        began = time.monotonic()
        body = await receive(call, self.limits, self.spool)
        try:
            return await self._compute(call, body)
        finally:
            body.forget()
            self.metrics.served("compute", time.monotonic() - began, body.size)

    async def _compute(self, call: Call, body: Body) -> Answer:
        ask = await self._ask(call, body)
        return self.answer(*await self.small.compute(ask), call.accept)

    def answer(self, answer: Mapping[str, Any], data: bytes | memoryview, accept: str) -> Answer:
        """What a process answered, as it is sent."""
        if "problem" in answer:
            return failed(answer["problem"], answer.get("headers"))
        size, media = answer["size"], "application/json" if accept == "json" else wire.MEDIA
        if "file" in answer:
            return Answer(200, file_pieces(answer["file"], size), media, size=size)
        return Answer(200, data, media)

    def begin(self, user: str, accept: str, body: bytes, answer: Waiting) -> bool:
        """Let small work that has come whole as a few bytes of tensors be computed.

        Returns:
            Whether it will be; whoever hears no goes the long way, which tells what is wrong.
        """
        try:
            header = wire.read_header(body)
            recipe = self._recipe(user, accept, header.about, header)
            if header.total != len(body):
                return False
            ask = Ask(user, recipe.kind, recipe.model, recipe.samples, recipe.item, (body,), answer)
            self.small.begin(ask)
        except UserError:
            return False
        return True

    async def _about(self, body: Body, options: Mapping[str, tuple[Any, ...]]) -> tuple[wire.About, wire.Header | None]:
        header = await body.header() if body.media == wire.MEDIA else None
        return check_about(header.about if header is not None else await body.json(), options), header

    async def _ask(self, call: Call, body: Body) -> Ask:
        about, header = await self._about(body, _SMALL_OPTIONS)
        recipe = self._recipe(call.user, call.accept, about, header)
        if header is not None and body.file is not None:
            told = {**{name: part for name, part in recipe.item.items() if name != "size"}, "file": str(body.file)}
            return Ask(call.user, None, recipe.model, recipe.samples, told, ())
        parts = body.parts if header is not None else []
        return Ask(call.user, recipe.kind, recipe.model, recipe.samples, recipe.item, parts)

    def _recipe(self, user: str, accept: str, about: wire.About, header: wire.Header | None) -> Recipe:
        """What this request has in common with others of its user; found out anew where anybody's uploads changed."""
        if header is None or header.text is None or self.settings.data is not None:
            return self._read(user, accept, about, header)
        key = (user, accept, header.text, self.uploads.changes)
        return self._recipes.find(key, lambda: self._read(user, accept, about, header))

    def _read(self, user: str, accept: str, about: wire.About, header: wire.Header | None) -> Recipe:
        about = check_about(about, _SMALL_OPTIONS)
        item = self._item(user, about)
        item["accept"], key, size = accept, item["model_key"], header.total if header is not None else 0
        if size:
            item["size"] = size
        together = "inputs_file" not in item and about.get("options", {}).get("batch", True)
        kind, samples = kind_of(about, header)
        fits = samples <= self.limits.batch_samples // 2
        return Recipe(item, kind if together and fits else None, samples, key, size)

    def _item(self, user: str, about: wire.About) -> dict[str, Any]:
        """What a process is told of a piece of work: only files that its user may name are in it."""
        policy = Policy(functools.partial(self.uploads.find, user), self.settings.data, self.settings.import_prefixes)
        model = policy.model(about.get("model"))
        inputs, stored = policy.inputs(about.get("inputs"))
        told = {"inputs": inputs, "request": about.request}
        item: dict[str, Any] = {"about": told, "model": model, "model_key": about.model_key}
        return item if stored is None else {**item, "inputs_file": stored}

    async def job_item(self, call: Call, body: Body) -> tuple[dict[str, Any], Mapping[str, Any] | None]:
        """What the process that runs jobs is told of a job, and the file that it came from, where it was one."""
        about, header = await self._about(body, _JOB_OPTIONS)
        read_fields(about.request)  # a misspelt name is told at once, however many jobs wait
        item = self._item(call.user, about)
        item["on_error"] = about.get("options", {}).get("on_error", "fail")
        if header is not None:
            item["file"] = ""  # filled in once the body has come to its place
        return item, about.get("spec")

    async def upload(self, call: Call, kind: str) -> Answer:
        """Keep a model or tensors under the digest of their bytes."""
        body = await receive(call, self.limits, self.incoming, store=True)
        try:
            found, new = await self.uploads.add(call.user, kind, body)
        finally:
            body.forget()
        where = f"/v1/{kind}/{found['digest']}"
        return said(found, 201 if new else 200, {"Location": where})

    async def uploaded(self, call: Call, kind: str) -> Answer:
        """What the user keeps."""
        return said({kind: await self.uploads.list(call.user, kind)})

    async def one_upload(self, call: Call, kind: str) -> Answer:
        """One upload."""
        return said(await self.uploads.one(call.user, kind, call.path["digest"]))

    async def remove_upload(self, call: Call, kind: str) -> Answer:
        """Forget one upload."""
        await self.uploads.remove(call.user, kind, call.path["digest"])
        return Answer(204)

    # Parts ------------------------------------------------------------------------------------------------------

    def _process(self) -> Process:
        limits = self.limits
        told = {
            "result_bytes": limits.result_bytes, "file_bytes": 1 << 20, "json_numbers": limits.json_numbers,
            "folder": str(self.spool), "warm_bytes": limits.warm_bytes, "memory_bytes": limits.memory_bytes,
            "process_bytes": 0 if self.settings.gpus_per_worker else self.settings.process_bytes,
            "base": str(self.empty), "import_prefixes": self.settings.import_prefixes,
        }  # fmt: skip
        return Process("jacray.http.compute", told, self.settings.cpus_per_worker)

    def _runner(self) -> Process:
        settings, limits = self.settings, self.limits
        told = {
            "address": settings.address, "workers": settings.workers, "cpus_per_worker": settings.cpus_per_worker,
            "gpus_per_worker": settings.gpus_per_worker, "memory_bytes": limits.memory_bytes,
            "job_bytes": limits.job_bytes, "base": str(self.empty), "import_prefixes": settings.import_prefixes,
        }  # fmt: skip
        return Process("jacray.http.runner", told, settings.cpus_per_worker)


def check_about(about: Any, options: Mapping[str, tuple[Any, ...]]) -> wire.About:
    """The message besides its tensors, with its own keys checked.

    Args:
        about: the message.
        options: the options that it may have, and the values of each.

    Raises:
        InputError: an unknown key, or a part of another kind.
    """
    if not isinstance(about, dict):
        raise InputError("body", "must be a JSON object", about)
    known = (*KEYS, "spec") if options is _JOB_OPTIONS else KEYS
    unknown = next((key for key in about if key not in known), None)
    if unknown is not None:
        raise InputError(unknown, "is not a known name", None, f"known names: {', '.join(known)}")
    for name in ("request", "options", "spec"):
        if not isinstance(about.get(name, {}), dict):
            raise InputError(name, "must be a mapping", about[name])
    for name, value in about.get("options", {}).items():
        if not any(value is one or (isinstance(value, str) and value == one) for one in options.get(name, ())):
            allowed = "; ".join(f"{n}: {' or '.join(map(wire.dump, values))}" for n, values in options.items())
            raise InputError("options", f"may hold {allowed}", {name: value})
    return about if isinstance(about, wire.About) else wire.About(about)

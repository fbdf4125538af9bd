"""The short way of what is asked most: small work, health and the state of a job, answered without the framework.

A request goes this way when it has come whole, by a head that is known, and nothing is unusual about it. Everything
else, and all that is wrong, goes the long way: the answers are the same.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from jacray_workers.errors import UserError

from jacray.http import wire
from jacray.http.batching import Found
from jacray.http.calls import Answer, Call
from jacray.http.recipes import Kept
from jacray.http.service import Service

Fields = Sequence[tuple[bytes, bytes]]
Who = Callable[[Mapping[str, str], str], str]
"""Whose a request is, by its fields and method, or nobody's; raises a UserError where another site's page sent it."""
MOST = 1 << 16
"""Bytes of a body that is read on the event loop."""
_JOB = re.compile(rb"/v1/jobs/[0-9a-f]{12}")
_UNUSUAL = (b"expect", b"transfer-encoding", b"upgrade", b"want-repr-digest")


class Asker(Protocol):
    """Who sent a request: a connection."""

    def belongs(self, user: str) -> bool:
        """The request is this user's; returns whether one more connection may be."""

    def tell(self, answer: Answer) -> None:
        """Here is the answer."""


@dataclass(frozen=True, slots=True)
class Head:
    """What the fields of a request come to.

    Attributes:
        user: whose it is, empty where that is not said; None where it goes the long way.
        media: the media type of its body.
        accept: the form that the answer should have.
    """

    user: str | None
    media: str = ""
    accept: str = ""


class Lane:
    """The short way.

    Args:
        service: what answers.
        who: tells whose a request is.
    """

    def __init__(self, service: Service, who: Who) -> None:
        self.service, self._who = service, who
        # By digests: a token is forgotten once it has been looked at.
        self._heads: Kept[Head] = Kept()

    def take(self, method: bytes, url: bytes, fields: Fields, body: bytes, asker: Asker) -> bool:
        """Take a request that has come whole.

        Args:
            method: of its head.
            url: of its head, the query with it.
            fields: of its head, names in lower case.
            body: all of it.
            asker: is told the answer, at once or later; once.

        Returns:
            Whether it goes this way.
        """
        if method == b"POST":
            if url != b"/v1/compute" or len(body) > MOST:
                return False
            head = self._head(method, fields)
            return self._welcome(head, asker) and head.media == wire.MEDIA and self._compute(head, body, asker)
        if method != b"GET" or body:
            return False
        if url == b"/healthz":
            return self._head(method, fields).user is not None and self._health(asker)
        return _JOB.fullmatch(url) is not None and self._job(self._head(method, fields), url, asker)

    def _compute(self, head: Head, body: bytes, asker: Asker) -> bool:
        asked = _Asked(self.service, head, len(body), asker)
        return self.service.begin(head.user or "", head.accept, body, asked)

    def _health(self, asker: Asker) -> bool:
        self._tell("health", self.service.healthy, asker)
        return True

    def _job(self, head: Head, url: bytes, asker: Asker) -> bool:
        if not self._welcome(head, asker):
            return False
        record = self.service.jobs.records.get(url[9:].decode())
        if record is None or record.user != head.user:
            return False
        self._tell("get_job", Answer(200, wire.dump(record.shown()).encode()), asker)
        return True

    def _welcome(self, head: Head, asker: Asker) -> bool:
        return bool(head.user) and asker.belongs(head.user or "")

    def _tell(self, operation: str, answer: Answer, asker: Asker) -> None:
        asker.tell(answer)
        self.service.metrics.answered(operation, answer.status, len(answer.body))  # type: ignore[arg-type]

    def _head(self, method: bytes, fields: Fields) -> Head:
        text = b"\n".join([method, *(part for field in fields for part in field)])
        return self._heads.find(hashlib.sha256(text).digest(), lambda: self._read(method, fields))

    def _read(self, method: bytes, fields: Fields) -> Head:
        if any(name in _UNUSUAL for name, _ in fields):
            return Head(None)
        known = {name.decode("latin-1"): value.decode("latin-1") for name, value in fields}
        try:
            user = self._who(known, method.decode())
        except UserError:
            return Head(None)
        call = Call("", {}, {}, known)
        return Head(user, call.media, call.accept)


class _Asked:
    """Small work under way: what takes its answer."""

    __slots__ = ("_asker", "_began", "_done", "_head", "_service", "_size")

    def __init__(self, service: Service, head: Head, size: int, asker: Asker) -> None:
        self._service, self._head, self._size, self._asker = service, head, size, asker
        self._began, self._done = time.monotonic(), False

    def done(self) -> bool:
        """Whether the answer has come."""
        return self._done

    def set_result(self, found: Found, /) -> None:
        """Take the answer."""
        self._done = True
        answer = self._service.answer(*found, self._head.accept)
        self._asker.tell(answer)
        metrics = self._service.metrics
        size = len(answer.body) if isinstance(answer.body, bytes | memoryview) else answer.size or 0
        metrics.served("compute", time.monotonic() - self._began, self._size)
        metrics.answered("compute", answer.status, size)

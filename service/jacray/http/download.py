"""A download that goes on where it broke off."""

from __future__ import annotations

import base64
import hashlib
import http.client
from dataclasses import dataclass, field
from email.message import Message

from jacray_workers.errors import FaultError

from jacray.http import wire


@dataclass
class Download:
    """A message, as far as it has come.

    Attributes:
        data: memory for all of it.
        at: how many bytes of it are there.
        tag: what tells it from others.
        resumed: whether it came in several parts.
    """

    data: memoryview = field(default_factory=lambda: memoryview(bytearray()))
    at: int = 0
    tag: str = ""
    resumed: bool = False

    @property
    def headers(self) -> dict[str, str]:
        """What asks for the rest; the whole message's digest is asked for along with it."""
        asked = {"Accept": wire.MEDIA}
        if self.at and self.tag:
            asked |= {"Range": f"bytes={self.at}-", "If-Range": self.tag, "Want-Repr-Digest": "sha-256=1"}
        return asked

    def take(self, response: http.client.HTTPResponse) -> memoryview:
        """Read an answer to its end.

        Raises:
            http.client.HTTPException: it broke off; what came of it is kept.
            FaultError: the parts do not make the whole.
        """
        if response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {self.at}-"):
            self.resumed = True
        else:
            self._begin(response)
        while self.at < len(self.data):
            count = response.readinto(self.data[self.at :])
            if not count:
                raise http.client.IncompleteRead(b"", len(self.data) - self.at)
            self.at += count
        if self.resumed:
            self._check(response.headers)
        return self.data

    def _begin(self, response: http.client.HTTPResponse) -> None:
        import numpy as np

        if response.length is None:
            data = response.read()
            self.data, self.at = memoryview(bytearray(data)), len(data)
            return
        self.data = np.empty(response.length, np.uint8).data.cast("B")
        self.at, self.tag, self.resumed = 0, response.headers.get("ETag", ""), False

    def _check(self, headers: Message) -> None:
        told = str(headers.get("Repr-Digest", ""))
        found = base64.b64encode(hashlib.sha256(self.data).digest()).decode()
        if f"sha-256=:{found}:" not in told:
            raise FaultError("a download that broke off and went on is not what the service has; ask for it again")

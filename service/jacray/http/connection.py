"""A client's connections to a service: kept open, shared by threads, and made again when they drop."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, quote, urlencode, urlsplit

from jacray_workers.errors import FaultError, JobError, Plain, RequestError

from jacray.http import wire
from jacray.http.download import Download
from jacray.http.problems import error_of

Parts = Sequence[bytes | memoryview]
Verify = bool | str | os.PathLike[str] | None
_DROPPED = (ConnectionError, http.client.HTTPException, TimeoutError, ssl.SSLError, OSError)
_AGAIN = (502, 503, 504)
TOKEN = "JACRAY_TOKEN"  # noqa: S105 - the name of a variable
AUTHORITY = "JACRAY_CA"


class Connections:
    """Connections to one service.

    Every request here may be sent twice without doing anything twice: reading, computing and uploading by content
    change nothing, and a job is submitted under a key of its own. So whatever drops is simply sent again.

    Args:
        url: `http://HOST:PORT` or `https://HOST:PORT`.
        token: sent with every request; JACRAY_TOKEN by default.
        timeout: how many seconds a connection may stand still.
        retries: how often a request that was dropped is sent again.
        verify: whom to trust over https: True the system's authorities, a path those in that file or folder, False
            anybody. By default what JACRAY_CA names, else the system's.

    Raises:
        RequestError: the URL is none, or no authorities can be read there.
    """

    def __init__(
        self, url: str, token: str | None = None, timeout: float = 300.0, retries: int = 5, verify: Verify = None
    ) -> None:
        parts = _split(url)
        self.url, self.timeout, self.retries = url.rstrip("/"), timeout, retries
        self._host, self._port, self._tls = parts.hostname or "", parts.port, parts.scheme == "https"
        self._path = parts.path.rstrip("/")
        self._trust = _trust(verify) if self._tls else None
        found = token or os.environ.get(TOKEN)
        self._headers = {"Authorization": f"Bearer {found}"} if found else {}
        self._lock, self._idle, self._closed = threading.Lock(), list[http.client.HTTPConnection](), False

    def json(self, method: str, path: str, *, query: Mapping[str, Any] | None = None, body: Any = None) -> Any:
        """Send and receive JSON data.

        Raises:
            JacrayError: what the service says is wrong.
        """
        parts = [] if body is None else [wire.dump(body).encode()]
        with self.open(method, path, query=query, media="application/json", parts=parts) as response:
            text = response.read()
        return json.loads(text) if text else None

    def tensors(
        self, path: str, parts: Parts, *, method: str = "POST", query: Mapping[str, Any] | None = None
    ) -> memoryview:
        """Send a message and receive one, whole, in memory of its own.

        Raises:
            JacrayError: what the service says is wrong.
        """
        found: memoryview = self._repeat(lambda: self._tensors(method, path, parts, query))
        return found

    def _tensors(self, method: str, path: str, parts: Parts, query: Mapping[str, Any] | None) -> memoryview:
        with self._once(method, path, query, wire.MEDIA, parts, {"Accept": wire.MEDIA}) as response:
            return Download().take(response)

    def download(self, path: str, query: Mapping[str, Any] | None = None) -> memoryview:
        """Receive a message, whole, in memory of its own; one that breaks off goes on where it was.

        Raises:
            JacrayError: what the service says is wrong, or it broke off again and again with nothing new.
        """
        found = Download()

        def once() -> memoryview:
            with self._once("GET", path, query, wire.MEDIA, (), found.headers) as response:
                return found.take(response)

        whole: memoryview = self._repeat(once, lambda: found.at)
        return whole

    @contextlib.contextmanager
    def open(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        media: str = wire.MEDIA,
        parts: Parts = (),
        headers: Mapping[str, str] | None = None,
    ) -> Iterator[http.client.HTTPResponse]:
        """An answer to read from; one that drops before it begins is asked for again.

        Raises:
            JacrayError: what the service says is wrong.
        """
        sent = {"Accept": "application/json, text/event-stream", **(headers or {})}
        stack = contextlib.ExitStack()
        with stack:
            yield self._repeat(lambda: stack.enter_context(self._once(method, path, query, media, parts, sent)))

    def close(self) -> None:
        """End all connections that nobody uses."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _repeat(self, once: Any, come: Callable[[], int] = lambda: 0) -> Any:
        """Do it again while it drops, a little later every time; what has `come` further has all its patience again."""
        attempt, before = 0, come()
        while True:
            try:
                return once()
            except _Again as again:
                if come() > before:
                    attempt, before = 0, come()
                if attempt == self.retries:
                    raise again.error from None
                pause = again.after or min(0.1 * 2**attempt, 3.0) * (0.5 + random.random() / 2)  # noqa: S311 - no secret
                time.sleep(pause)
                attempt += 1

    @contextlib.contextmanager
    def _once(
        self,
        method: str,
        path: str,
        query: Mapping[str, Any] | None,
        media: str,
        parts: Parts,
        headers: Mapping[str, str],
    ) -> Iterator[http.client.HTTPResponse]:
        """One attempt. A connection that failed is closed; one whose answer was read whole is kept."""
        where = f"{self._path}{quote(path, safe='/:.')}" + (f"?{urlencode(query)}" if query else "")
        connection, kept = None, False
        try:
            connection = self._take()
            response = self._send(connection, method, where, media, parts, headers)
            if response.status >= 400:
                raise self._error(response)
            yield response
            kept = response.isclosed() or not response.read(1)
        except _DROPPED as error:
            if isinstance(error, FaultError | JobError):
                raise
            if isinstance(error, ssl.SSLError) and (hopeless := _distrusted(error, self.url)) is not None:
                raise hopeless from error
            text = str(error) or type(error).__name__
            lost = FaultError(f"no answer from {self.url}: {text}; is `jacray serve` running there?")
            raise _Again(lost) from error
        finally:
            if connection is not None:
                self._give_back(connection, keep=kept)

    def _send(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        where: str,
        media: str,
        parts: Parts,
        headers: Mapping[str, str],
    ) -> http.client.HTTPResponse:
        connection.putrequest(method, where, skip_accept_encoding=True)
        for name, value in {**self._headers, **headers}.items():
            connection.putheader(name, value)
        size = sum(len(part) for part in parts)
        if parts or method in ("POST", "PUT"):
            connection.putheader("Content-Type", media)
            connection.putheader("Content-Length", str(size))
        small = size < 1 << 16
        try:
            connection.endheaders(b"".join(parts) if small and size else None)
            for part in () if small else parts:
                connection.send(part)
        except (BrokenPipeError, ConnectionResetError):
            # A service that refuses a body says why before it hangs up.
            with contextlib.suppress(*_DROPPED):
                return connection.getresponse()
            raise
        return connection.getresponse()

    def _error(self, response: http.client.HTTPResponse) -> Exception:
        text = response.read(1 << 20)
        try:
            error = error_of(json.loads(text))
        except (ValueError, AttributeError):
            plain = Plain(text[:200].decode("utf-8", "replace"))
            error = FaultError(f"{self.url} answered {response.status}: {plain}")
        if response.status in _AGAIN:
            after = response.headers.get("Retry-After", "")
            return _Again(error, float(after) if after.isdigit() else 0.0)
        return error

    def _take(self) -> http.client.HTTPConnection:
        with self._lock:
            if self._closed:
                raise JobError("client", "is closed", None, "make a new jacray.Client")
            while self._idle:
                connection = self._idle.pop()
                if not _gone(connection):
                    return connection
                connection.close()
        if self._trust is None:
            return http.client.HTTPConnection(self._host, self._port, timeout=self.timeout)
        return http.client.HTTPSConnection(self._host, self._port, timeout=self.timeout, context=self._trust)

    def _give_back(self, connection: http.client.HTTPConnection, *, keep: bool) -> None:
        with self._lock:
            if keep and not self._closed and connection.sock is not None:
                self._idle.append(connection)
                return
        connection.close()


class _Again(Exception):  # noqa: N818 - it is a message to the loop, not an error
    def __init__(self, error: Exception, after: float = 0.0) -> None:
        super().__init__(str(error))
        self.error, self.after = error, after


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0):
            return parts
    except ValueError:  # a port that is no number or too large, or brackets that do not close
        pass
    raise RequestError("address", "must be http://HOST:PORT or https://HOST:PORT", url)


def _trust(verify: Verify) -> ssl.SSLContext:
    """Whose certificates are believed."""
    given = (os.environ.get(AUTHORITY) or True) if verify is None else verify
    if isinstance(given, bool):
        context = ssl.create_default_context()
        if not given:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context
    path = Path(given).expanduser()
    try:
        if path.is_dir():
            return ssl.create_default_context(capath=str(path))
        return ssl.create_default_context(cafile=str(path))
    except OSError as error:
        rule = f"must be True, False, or a file or folder of certificates in PEM: {error.strerror or error}"
        raise RequestError("verify", rule, Plain(str(path))) from None


def _distrusted(error: ssl.SSLError, url: str) -> RequestError | None:
    """What to say where trying again is no use."""
    if isinstance(error, ssl.SSLCertVerificationError):
        rule = f"must show a certificate that is trusted here, but: {error.verify_message}"
        way_out = f"give verify=PATH of its authority's certificate, or name it in {AUTHORITY}"
        return RequestError("address", rule, url, way_out)
    if error.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST"):
        return RequestError("address", "must be http://, since what answers there speaks no TLS", url)
    return None


def _gone(connection: http.client.HTTPConnection) -> bool:
    """Whether the service has closed an idle connection: then there is an end of file to read."""
    import select

    if connection.sock is None:
        return True
    readable, _, _ = select.select([connection.sock], [], [], 0)
    return bool(readable)

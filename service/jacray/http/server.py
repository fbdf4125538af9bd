"""Routes and the server that carries them. The only file that imports the web framework; it only translates."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import uvicorn
from jacray_workers.errors import JacrayError, Plain, UserError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

import jacray
from jacray.http import problems, wire
from jacray.http.calls import Answer, Call, failed
from jacray.http.connections import protocol
from jacray.http.lane import Lane
from jacray.http.operations import OPERATIONS, Operation, document
from jacray.http.problems import HttpError, problem
from jacray.http.service import Service
from jacray.http.settings import Settings
from jacray.http.shares import Shares
from jacray.http.tokens import Tokens

logger = logging.getLogger(__name__)

Send = Callable[[Any], Awaitable[None]]
PAGE = Path(__file__).parent / "page"
_LOCAL = ("localhost", "127.0.0.1", "::1")
_FRAMELESS = {"X-Frame-Options": "DENY", "X-Content-Type-Options": "nosniff"}
"""Nobody's page may lay ours under its own and have its buttons pressed. A policy within the page cannot say so."""


def application(service: Service, tokens: Tokens) -> Any:
    """The ASGI application."""
    by_path: dict[str, dict[str, Operation]] = {}
    for operation in OPERATIONS:
        by_path.setdefault(operation.path, {})[operation.method] = operation
    endpoints = {path: _Endpoint(service, tokens, operations) for path, operations in by_path.items()}
    routes: list[Any] = [
        Route(path, endpoint, methods=list(endpoint.operations)) for path, endpoint in endpoints.items()
    ]
    text = wire.dump(document(jacray.__version__))
    routes.append(Route("/openapi.json", lambda _: Response(text, media_type="application/json")))
    if (PAGE / "index.html").is_file():
        routes.append(Route("/", lambda _: FileResponse(PAGE / "index.html", headers=_FRAMELESS)))
        routes.append(Mount("/page", StaticFiles(directory=PAGE)))
    app = Starlette(routes=routes, lifespan=lambda _: _running(service), exception_handlers={HTTPException: _refused})
    app.router.redirect_slashes = False

    async def direct(scope: Any, receive: Any, send: Send) -> None:
        """Straight to what has a path without parameters; the framework's router costs more than some answers do."""
        found = endpoints.get(scope["path"]) if scope["type"] == "http" else None
        if found is not None and scope["method"] in found.operations:
            await found(scope, receive, send)
        else:
            await app(scope, receive, send)

    return direct


@contextlib.asynccontextmanager
async def _running(service: Service) -> AsyncIterator[None]:
    await service.start()
    try:
        yield
    finally:
        await service.stop()


def _refused(_request: Request, error: Exception) -> Response:
    """What the router refuses, in the one shape of errors."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = error.headers if isinstance(error, HTTPException) else None
    rule = "does not take this method" if status == 405 else "names nothing here"
    found = problem(HttpError(status, "path", rule, None, "/openapi.json lists what there is"))
    return Response(wire.dump(found), status, dict(headers or {}), problems.MEDIA)


def short_lane(service: Service, tokens: Tokens) -> Lane | None:
    """The short way; None where every answer is told to the log."""

    def who(headers: Mapping[str, str], method: str) -> str:
        _check_site(headers, method, service.settings)
        return tokens.who(headers.get("authorization")) or ""

    return None if logger.isEnabledFor(logging.DEBUG) else Lane(service, who)


class _Endpoint:
    """The operations of one path as an ASGI application."""

    def __init__(self, service: Service, tokens: Tokens, operations: Mapping[str, Operation]) -> None:
        self.service, self.tokens, self.operations = service, tokens, operations

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        operation = self.operations.get(scope["method"]) or self.operations["GET"]
        began = time.monotonic()
        sender = _Sender(scope, send, self.service.limits.idle_seconds)
        try:
            answer = await operation.do(self.service, self._call(operation, scope, receive))
        except Exception as error:  # noqa: BLE001 - every error has one shape
            answer = _failed(error, operation.name)
        try:
            size = await sender.send(answer)
        except ConnectionError:  # cut off; the web server hears of it a moment later, and would take it for a fault
            await asyncio.sleep(0.05)
            return
        self.service.metrics.answered(operation.name, answer.status, size)
        self._log(operation, scope, answer.status, size, time.monotonic() - began)

    def _log(self, operation: Operation, scope: Any, status: int, size: int, seconds: float) -> None:
        # What comes a thousand times a second is told to those who ask for it.
        level = logging.INFO if operation.method != "GET" and operation.name != "compute" else logging.DEBUG
        if not logger.isEnabledFor(level):
            return
        told = {"operation": operation.name, "status": status, "bytes": size, "seconds": round(seconds, 6)}
        job = scope.get("path_params", {}).get("id")
        user = scope.get("jacray.user", "")
        logger.log(level, "answered", extra={**told, "user": user, **({"job": job} if job else {})})

    def _call(self, operation: Operation, scope: Any, receive: Any) -> Call:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        _check_site(headers, scope["method"], self.service.settings)
        user = "" if operation.open else self._user(headers)
        if user and not scope["jacray.belongs"](user):
            rule = f"may be {self.service.limits.connections_per_user} at a time for each user"
            hang_up = {"Retry-After": "1", "Connection": "close"}
            raise HttpError(429, "connections", rule, None, "close some, or send more over each", hang_up)
        scope["jacray.user"] = user
        query = dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))
        return Call(user, scope.get("path_params", {}), query, headers, _body(receive))

    def _user(self, headers: Mapping[str, str]) -> str:
        user = self.tokens.who(headers.get("authorization"))
        if user is None:
            way_out = "send the header Authorization: Bearer TOKEN"
            raise HttpError(401, "Authorization", "must hold a token of this service", None, way_out,
                            {"WWW-Authenticate": "Bearer"})  # fmt: skip
        return user


def _check_site(headers: Mapping[str, str], method: str, settings: Settings) -> None:
    """Refuse what a page of another site makes a browser send: a foreign host name or a foreign origin."""
    host = _hostname(headers.get("host", ""))
    if settings.loopback and not settings.proxy and host not in (*_LOCAL, settings.host):
        raise HttpError(403, "Host", "must be a name of this machine's loopback", Plain(host))
    origin = headers.get("origin")
    if origin and method not in ("GET", "HEAD") and _hostname(origin.partition("//")[2]) != host:
        raise HttpError(403, "Origin", "must be the service's own page", Plain(origin))


@functools.lru_cache(maxsize=256)
def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:  # brackets that do not close, or with something else than an address between them
        return ""


async def _body(receive: Any) -> AsyncIterator[bytes]:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise HttpError(400, "body", "must come whole; the connection ended first")
        yield message["body"]
        if not message.get("more_body"):
            return


def _failed(error: Exception, operation: str) -> Answer:
    headers = error.headers if isinstance(error, HttpError) else {}
    if isinstance(error, UserError):
        return failed(problem(error), headers)
    logger.error("%s failed", operation, exc_info=error)
    if isinstance(error, JacrayError):
        return failed(problem(error))
    fault = {"type": "about:blank", "title": "Internal Server Error", "status": 500, "kind": "FaultError",
             "detail": "a fault of the service; its log says more"}  # fmt: skip
    return failed(fault)


class _Sender:
    """Sends an answer, and cuts off who does not take it."""

    def __init__(self, scope: Any, send: Send, idle: float) -> None:
        self._scope, self._send, self._idle = scope, send, idle

    async def send(self, answer: Answer) -> int:
        """Send all of it; returns how many bytes."""
        whole = isinstance(answer.body, bytes | memoryview)
        headers = [
            (name.lower().encode(), value.encode("latin-1", "replace")) for name, value in answer.headers.items()
        ]
        size = len(answer.body) if isinstance(answer.body, bytes | memoryview) else answer.size
        if answer.status != 204:
            headers.append((b"content-type", answer.media.encode()))
        if size is not None and answer.status != 204:
            headers.append((b"content-length", str(size).encode()))
        start = {"type": "http.response.start", "status": answer.status, "headers": headers}
        if whole:
            await self._patiently(start, {"type": "http.response.body", "body": answer.body})
            return size or 0
        await self._patiently(start)
        if self._scope["method"] == "HEAD":  # nothing of it is sent, and a stream of events might never end
            await self._patiently({"type": "http.response.body", "body": b""})
            return 0
        return await self._pieces(answer.body)

    async def _pieces(self, pieces: Any) -> int:
        sent = 0
        async for piece in pieces:
            await self._patiently({"type": "http.response.body", "body": piece, "more_body": True})
            sent += len(piece)
        # By itself, because sending waits until what came before has left.
        await self._patiently({"type": "http.response.body", "body": b""})
        return sent

    async def _patiently(self, *messages: Any) -> None:
        try:
            async with asyncio.timeout(self._idle):
                for message in messages:
                    await self._send(message)
        except TimeoutError:
            logger.info("a client took nothing for %g s and was cut off", self._idle)
            self._scope["jacray.abort"]()
            raise ConnectionError("the client does not take its answer") from None


async def send_answer(answer: Answer, scope: Any, send: Send, idle: float) -> None:
    """Send an answer that came of a request which went the short way, and is too large for it."""
    with contextlib.suppress(ConnectionError):
        await _Sender(scope, send, idle).send(answer)


class _Server(uvicorn.Server):
    """Bounds what its parent leaves open: handshakes that never end, and streams that hold up a stop."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def startup(self, sockets: Any = None) -> None:
        """Listen; who begins a handshake has as long for it as for a request's head."""
        loop: Any = asyncio.get_running_loop()
        if self.config.is_ssl:
            seconds = self._service.limits.header_seconds
            loop.create_server = functools.partial(loop.create_server, ssl_handshake_timeout=seconds)
        await super().startup(sockets)

    async def shutdown(self, sockets: Any = None) -> None:
        """Stop in order."""
        self._service.begin_stop()
        await super().shutdown(sockets)


def make_server(settings: Settings, tokens: Tokens) -> uvicorn.Server:
    """The server, not started yet; `run(sockets=[...])` serves on sockets that are bound already."""
    service = Service(settings)
    tls: dict[str, Any] = {}
    if settings.tls_cert is not None and settings.tls_key is not None:
        tls = {"ssl_certfile": str(settings.tls_cert), "ssl_keyfile": str(settings.tls_key)}
    shares = Shares(settings.limits.connections_per_user if len(tokens) else None)
    connections = protocol(settings.limits, shares, short_lane(service, tokens), send_answer)
    config = uvicorn.Config(
        application(service, tokens), host=settings.host, port=settings.port, http=connections,
        ws="none", lifespan="on", log_config=None, access_log=False, server_header=False,
        proxy_headers=False, timeout_keep_alive=int(settings.limits.idle_seconds),
        timeout_graceful_shutdown=int(settings.limits.stop_seconds) + 1, **tls,
    )  # fmt: skip
    return _Server(config, service)

"""Start a service and run it until it is told to stop."""

from __future__ import annotations

import os
import resource
import signal
import socket
import ssl
from collections.abc import Callable

from jacray_workers.errors import Plain, RequestError

from jacray.http.logs import start_logging
from jacray.http.settings import Settings, check_exposure
from jacray.http.tokens import read_tokens


def serve(settings: Settings, say: Callable[[str], None]) -> None:
    """Listen and serve until SIGTERM or Ctrl-C.

    Args:
        settings: how.
        say: told the address once it is listening.

    Raises:
        RequestError: others could come in without a token or without encryption, or the port is taken.
    """
    tokens = read_tokens(settings.tokens)
    check_exposure(settings, len(tokens))
    check_certificate(settings)
    _allow_files(settings)
    sock = _listen(settings)
    from jacray.http.server import make_server

    start_logging(settings.log_level)
    server = make_server(settings, tokens)
    host, port = sock.getsockname()[:2]
    scheme = "https" if settings.tls_cert else "http"
    shown = f"[{host}]" if ":" in host else host
    say(f"jacray serves at {scheme}://{shown}:{port} (Ctrl-C stops)")
    # The web server stops in order, then raises the signal once more: that it was told to stop is no failure.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    server.run(sockets=[sock])


def _listen(settings: Settings) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((settings.host, settings.port))
    except OSError as error:
        address = Plain(f"{settings.host}:{settings.port}")
        raise RequestError("port", f"must be free to listen on: {error.strerror}", address, "choose another") from None
    return sock


def check_certificate(settings: Settings) -> None:
    """See whether the certificate and its key can be used, before the web server finds out with a traceback.

    Raises:
        RequestError: they cannot.
    """
    if settings.tls_cert is None or settings.tls_key is None:
        return
    for name, path in (("tls_cert", settings.tls_cert), ("tls_key", settings.tls_key)):
        if not os.access(path, os.R_OK):
            raise RequestError(name, "must be a file that can be read", Plain(str(path)))
    try:
        # A key with a password would be asked for on the terminal, which a service has none of.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.tls_cert, settings.tls_key, lambda: "")
    except (OSError, ValueError) as error:
        rule = f"must be a certificate and its key in PEM, without a password: {error}"
        raise RequestError("tls_cert", rule, Plain(str(settings.tls_cert))) from None


def _allow_files(settings: Settings) -> None:
    """Let as many files be open as there may be connections, where the system allows it."""
    wanted = settings.limits.connections + 1024
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))

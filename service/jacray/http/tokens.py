"""Who may come in: named tokens from a file or the environment, compared in constant time and never written down."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

from jacray_workers.errors import Plain, RequestError

VARIABLE = "JACRAY_TOKENS"
LOCAL = "local"
"""Who everybody is where no tokens are asked for."""
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}$")
_SHORTEST = 16


class Tokens:
    """Names by the digests of their tokens; the tokens themselves are forgotten."""

    def __init__(self, named: Mapping[str, str]) -> None:
        self._digests = {_digest(token): name for name, token in named.items()}

    def __len__(self) -> int:
        return len(self._digests)

    def __repr__(self) -> str:
        return f"Tokens of {', '.join(sorted(self._digests.values())) or 'nobody'}"

    def who(self, authorization: str | None) -> str | None:
        """The name that a request's `Authorization` header proves, or None.

        Every token is compared, whatever the outcome of the others.
        """
        if not self._digests:
            return LOCAL
        scheme, _, token = (authorization or "").partition(" ")
        mine, found = _digest(token.strip()), None
        for digest, name in self._digests.items():
            if hmac.compare_digest(digest, mine):
                found = name
        return found if scheme.lower() == "bearer" else None


def read_tokens(path: Path | None) -> Tokens:
    """The tokens of a file of lines `NAME TOKEN`, and of JACRAY_TOKENS, `NAME:TOKEN` with commas between.

    Raises:
        RequestError: a line breaks a rule, or others may read the file.
    """
    named: dict[str, str] = {}
    for part in filter(None, (text.strip() for text in os.environ.get(VARIABLE, "").split(","))):
        _add(named, *part.partition(":")[::2], VARIABLE)
    if path is not None:
        for number, line in enumerate(_lines(path), 1):
            if line.strip() and not line.lstrip().startswith("#"):
                name, _, token = line.strip().partition(" ")
                _add(named, name, token.strip(), f"line {number} of {path.name}")
    return Tokens(named)


def _lines(path: Path) -> list[str]:
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError("tokens", f"must be a readable text file: {error}", Plain(str(path))) from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise RequestError("tokens", "must be readable by its owner alone", Plain(str(path)), f"chmod 600 {path}")
    return text.splitlines()


def _add(named: dict[str, str], name: str, token: str, where: str) -> None:
    """Take a token. No message ever shows one."""
    if not _NAME.match(name):
        raise RequestError("tokens", f"{where} must start with a name of letters, digits and _.@-")
    if name in named:
        raise RequestError("tokens", f"{where} gives a name that has a token already", name)
    if len(token) < _SHORTEST or not token.isprintable() or " " in token:
        rule = f"{where} must give a token of at least {_SHORTEST} printable characters without spaces"
        raise RequestError("tokens", rule, None, "python -c 'import secrets; print(secrets.token_urlsafe())' makes one")
    named[name] = token


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()

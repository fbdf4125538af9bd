"""Uploads by content: models and tensors that were sent once and are named by the sha256 of their bytes.

The bytes lie once on disk, whoever sent them; who may name them is kept per user, so that a digest somebody guessed or
overheard opens nothing.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from jacray_workers.errors import InputError, Plain

from jacray.http import wire
from jacray.http.calls import Body
from jacray.http.database import Database, now
from jacray.http.policy import DIGEST
from jacray.http.problems import HttpError

KINDS = ("models", "inputs")


class Uploads:
    """The uploads of all users.

    Args:
        folder: where the bytes lie.
        database: who may name what.
        most: the most bytes that one user may keep.

    Attributes:
        changes: how often what anybody may name has changed.
    """

    def __init__(self, folder: Path, database: Database, most: int) -> None:
        self.folder, self.database, self.most = folder, database, most
        folder.mkdir(parents=True, exist_ok=True)
        # What every request that names an upload asks, without a trip to the database.
        self._known: dict[tuple[str, str], str] = {}
        self.changes = 0

    async def begin(self) -> None:
        """Read who may name what."""
        for row in await self.database.rows("select user, digest, kind from uploads"):
            self._known[row["user"], row["digest"]] = row["kind"]

    async def add(self, user: str, kind: str, body: Body) -> tuple[dict[str, Any], bool]:
        """Keep a body that has come into a file.

        Returns:
            What is known of the upload, and whether it is new.

        Raises:
            WireError: it is not safetensors.
            HttpError: the user keeps too much already.
        """
        if body.media != wire.MEDIA or body.file is None:
            raise HttpError(415, "Content-Type", f"must be {wire.MEDIA}", Plain(body.media))
        header = await body.header()
        if kind == "inputs" and not header.entries:
            raise InputError("body", "must hold at least one tensor", Plain("none"))
        digest = f"sha256:{body.digest}"
        kept = await self.database.call(lambda c: self._enter(c, user, kind, digest, body))
        self._known[user, digest] = kind
        self.changes += 1
        return {"digest": digest, "kind": kind, "bytes": body.size, "tensors": len(header.entries)}, kept

    def _enter(self, c: sqlite3.Connection, user: str, kind: str, digest: str, body: Body) -> bool:
        """Keep it. The file moves within the transaction, so that nobody's removal comes in between."""
        size = body.size
        known = c.execute(
            "select 1 from uploads where user = ? and digest = ? and kind = ?", (user, digest, kind)
        ).fetchone()  # fmt: skip
        if known and self.path(digest).exists():
            return False
        (held,) = c.execute("select coalesce(sum(bytes), 0) from uploads where user = ?", (user,)).fetchone()
        if held + size > self.most:
            way_out = "delete uploads that are no longer needed"
            raise HttpError(
                413, "body", f"leaves no more than {self.most:,} bytes to a user", Plain(f"{held + size:,}"), way_out
            )
        c.execute("insert or replace into uploads values (?, ?, ?, ?, ?)", (user, digest, kind, size, now()))
        if body.file is not None and not self.path(digest).exists():
            body.file.replace(self.path(digest))
        return True

    def path(self, digest: str) -> Path:
        """Where an upload's bytes lie."""
        return self.folder / f"{digest.removeprefix('sha256:')}.safetensors"

    def find(self, user: str, digest: str, argument: str) -> Path:
        """The file of an upload that a user may name.

        Raises:
            InputError: the user has uploaded none of this digest.
        """
        if (user, digest) not in self._known:
            raise InputError(argument, "names no upload of yours", Plain(digest), "upload it first, then name it")
        return self.path(digest)

    async def list(self, user: str, kind: str) -> list[dict[str, Any]]:
        """What a user keeps, the latest first."""
        rows = await self.database.rows(
            "select digest, kind, bytes, at from uploads where user = ? and kind = ? order by at desc", user, kind
        )  # fmt: skip
        return [dict(row) for row in rows]

    async def one(self, user: str, kind: str, digest: str) -> dict[str, Any]:
        """What is known of an upload.

        Raises:
            HttpError: there is none of this user.
        """
        row = await self.database.row(
            "select digest, kind, bytes, at from uploads where user = ? and kind = ? and digest = ?", user, kind, digest
        )  # fmt: skip
        if row is None or not DIGEST.match(digest):
            raise HttpError(404, "digest", f"names none of your {kind}", Plain(digest))
        return dict(row)

    async def remove(self, user: str, kind: str, digest: str) -> None:
        """Forget an upload of a user; the bytes go with the last who kept them.

        Raises:
            HttpError: there is none of this user.
        """
        await self.one(user, kind, digest)

        def forget(c: sqlite3.Connection) -> int:
            c.execute("delete from uploads where user = ? and kind = ? and digest = ?", (user, kind, digest))
            found = c.execute("select count(*) from uploads where user = ? and digest = ?", (user, digest))
            return int(found.fetchone()[0])

        def sweep(c: sqlite3.Connection) -> None:  # once that is on disk, and unless somebody kept it meanwhile
            if c.execute("select 1 from uploads where digest = ?", (digest,)).fetchone() is None:
                self.path(digest).unlink(missing_ok=True)

        if not await self.database.call(forget):
            self._known.pop((user, digest), None)
            self.changes += 1
        await self.database.call(sweep)

"""What the service must still know after it was killed: who uploaded what, and who submitted which job. SQLite."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
_TABLES = """
create table if not exists uploads (
    user text not null, digest text not null, kind text not null, bytes integer not null, at real not null,
    primary key (user, kind, digest)
);
create table if not exists jobs (
    id text primary key, user text not null, key text not null, body text not null, state text not null,
    submitted real not null, finished real, told text not null default '{}', problem text not null default '',
    unique (user, key)
);
"""


class Database:
    """One connection, used by one thread; everybody else waits for it without blocking."""

    def __init__(self, path: Path) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="jacray-database")
        self._connection = self._thread.submit(_open, path).result()

    async def call(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work` in a transaction of its own."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._transact, work)

    def _transact(self, work: Callable[[sqlite3.Connection], T]) -> T:
        with self._connection:
            return work(self._connection)

    async def rows(self, text: str, *values: Any) -> list[sqlite3.Row]:
        """What a query finds."""
        return await self.call(lambda c: c.execute(text, values).fetchall())

    async def row(self, text: str, *values: Any) -> sqlite3.Row | None:
        """The first that a query finds."""
        found = await self.rows(text, *values)
        return found[0] if found else None

    async def run(self, text: str, *values: Any) -> int:
        """Change something; returns how many rows."""
        return await self.call(lambda c: c.execute(text, values).rowcount)

    def close(self) -> None:
        """Finish what is queued."""
        self._thread.submit(self._connection.close).result()
        self._thread.shutdown()


def _open(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    connection.execute("pragma journal_mode = wal")
    connection.execute("pragma synchronous = normal")
    connection.executescript(_TABLES)
    return connection


def now() -> float:
    """Seconds since 1970."""
    return time.time()

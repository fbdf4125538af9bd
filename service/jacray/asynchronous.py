"""The same client for programs that await: every call is the plain client's own, made in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from jacray_workers.request import Request

from jacray.client import Client
from jacray.fields import AllFields
from jacray.job import Job
from jacray.result import Result

T = TypeVar("T")


class AsyncClient:
    """`Client` whose calls are awaited. `await client.submit(...)` gives a job, and `await job` its result.

    Args:
        address: as for `Client`.
        **given: the further arguments of `Client`.
    """

    def __init__(self, address: str = "local", **given: Any) -> None:
        self._client = Client(address, **given)

    async def __aenter__(self) -> Self:
        await in_thread(self._client.__enter__)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await in_thread(lambda: self._client.__exit__(kind, error, trace))

    async def submit(self, model: Any, x: Any, *, request: Request | None = None, **fields: Unpack[AllFields]) -> Job:
        """Submit a job; see `Client.submit`."""
        return await in_thread(lambda: self._client.submit(model, x, request=request, **fields))

    async def compute(
        self, model: Any, x: Any, *, request: Request | None = None, batch: bool = True, **fields: Unpack[AllFields]
    ) -> Result:
        """Compute and wait; see `Client.compute`."""
        return await in_thread(lambda: self._client.compute(model, x, request=request, batch=batch, **fields))

    async def close(self) -> None:
        """Close the client; see `Client.close`."""
        await in_thread(self._client.close)

    def __repr__(self) -> str:
        return f"Async{self._client!r}"


async def in_thread(work: Callable[[], T]) -> T:
    """Run `work` in a thread of its own: calls that wait for jobs must not use up a shared pool of threads."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            found = work()
        except BaseException as error:  # noqa: BLE001 - raised again in whoever awaits
            _tell(loop, answer, None, error)
        else:
            _tell(loop, answer, found, None)

    threading.Thread(target=run, name="jacray-await", daemon=True).start()
    return await answer


def _tell(
    loop: asyncio.AbstractEventLoop, answer: asyncio.Future[Any], found: Any, error: BaseException | None
) -> None:
    def settle() -> None:
        if answer.done():
            return
        if error is None:
            answer.set_result(found)
        else:
            answer.set_exception(error)

    if not loop.is_closed():
        loop.call_soon_threadsafe(settle)

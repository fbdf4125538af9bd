"""What a Ray connection needs to know of this machine: who answers at an address, what workers inherit, versions."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from jacray_workers.errors import RequestError

from jacray.executors.worker import versions


def knock(address: str) -> None:
    """See whether somebody answers at an address. Ray itself ends the whole process when nobody does.

    Raises:
        RequestError: nobody answers.
    """
    url = urlsplit(address if "://" in address else f"ray://{address}")
    try:
        socket.create_connection((url.hostname or "", url.port or 10001), timeout=10).close()
    except (OSError, ValueError) as error:
        raise RequestError(
            "address", f"nobody answers there ({error})", address, "start Ray there with `ray start --head`"
        ) from None


def worker_environment(*, search_path: bool = True) -> dict[str, str]:
    """What a worker process needs in its environment: our search path, and large pages for torch's memory.

    Args:
        search_path: False leaves it out, where it would come before code that Ray was told to send.
    """
    fixed = (sys.prefix, sys.base_prefix)
    # Absolute, because workers stand in another folder; an empty entry is the folder we stand in.
    paths = [str(Path(path).absolute()) for path in sys.path]
    joined = os.pathsep.join(dict.fromkeys(path for path in paths if not path.startswith(fixed)))
    # Writing a Jacobian into fresh memory is several times faster on large pages. torch reads this when it loads.
    huge = os.environ.get("THP_MEM_ALLOC_ENABLE", "1")
    return {"THP_MEM_ALLOC_ENABLE": huge} | ({"PYTHONPATH": joined} if joined and search_path else {})


def server_environment() -> dict[str, str]:
    """How a Ray of our own is to run: it tells nobody, and its workers have the caller's priority.

    Ray gives workers the lowest priority but for a few (niceness 15), which starves them beside anything else that the
    machine does; the same job in this process would not be.
    """
    niceness = os.environ.get("RAY_worker_niceness", str(os.nice(0)))  # noqa: SIM112  (the name is Ray's)
    return {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": niceness}


@contextlib.contextmanager
def environment(changes: dict[str, str]) -> Iterator[None]:
    """Environment variables that processes started inside inherit."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def same_versions(theirs: dict[str, str]) -> None:
    """Compare a worker's versions with ours.

    Raises:
        RequestError: they differ.
    """
    ours = versions()
    for name in ("jacray", "torch"):
        # The local part names the build (cpu, cu130), which may differ.
        wanted, found = ours[name].split("+")[0], theirs[name].split("+")[0]
        if wanted != found:
            raise RequestError(
                "address", f"client and workers must have the same version of {name}",
                f"{wanted} here and {found} there", f"install {name}=={wanted} on the workers",
            )  # fmt: skip

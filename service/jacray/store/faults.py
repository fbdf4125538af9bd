"""What a file system or an object store refuses, told in our words."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from jacray_workers.errors import Plain, StorageError
from jacray_workers.planning.explain import size

from jacray.target import Target

_AGAIN = "then run it again: what is finished stays"
_WAYS = {
    errno.ENOSPC: f"make room, {_AGAIN}",
    errno.EDQUOT: f"make room in the quota, {_AGAIN}",
    errno.EFBIG: f"raise the limit on the size of files, {_AGAIN}",
    errno.EROFS: f"make it writable, {_AGAIN}",
    errno.EACCES: f"give the workers the right to write there, {_AGAIN}",
    errno.EPERM: f"give the workers the right to write there, {_AGAIN}",
}


@contextlib.contextmanager
def writing(target: Target, needed: int = 0) -> Iterator[None]:
    """Turn what the system refuses inside into an error that names the place, the bytes needed and those free.

    Raises:
        StorageError: something could not be written.
    """
    try:
        yield
    except OSError as error:
        raise refused(error, target, needed) from error


def refused(error: OSError, target: Target, needed: int) -> StorageError:
    """The error for a write that failed."""
    number = error.errno or 0
    why = error.strerror or str(error) or type(error).__name__
    what = f"{size(needed)} more" if needed else "what is written there"
    free = free_bytes(target)
    return StorageError(
        "output",
        f"{target.results} must take {what}, but: {why}",
        None if free is None else Plain(f"{size(free)} free there"),
        _WAYS.get(number, f"see to it that the workers reach it and may write there, {_AGAIN}"),
        number,
    )


def free_bytes(target: Target) -> int | None:
    """How many bytes a local target can take; None where nobody says."""
    if target.path is None:
        return None
    above = next((p for p in (target.path, *target.path.parents) if p.exists()), Path(os.sep))
    with contextlib.suppress(OSError):
        return shutil.disk_usage(above).free
    return None

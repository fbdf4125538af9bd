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
# Credentials, buckets and networks have errors of their own there.
_STORES = ("botocore", "aiobotocore", "aiohttp", "google", "gcsfs", "s3fs", "azure", "adlfs", "huggingface_hub")


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
    except Exception as error:
        if target.path is None and _of_a_store(error):
            told = refused(OSError(" ".join(str(error).split())), target, needed)
            way_out = "install it here and on the workers: jacray[s3] and jacray[gs] bring what their URLs need"
            raise (_instead(told, way_out) if isinstance(error, ImportError) else told) from error
        raise


def _instead(error: StorageError, way_out: str) -> StorageError:
    return StorageError(error.argument, error.rule, error.value, way_out)


def _of_a_store(error: Exception) -> bool:
    """Whether an error is what a package behind a URL says, of those that do not say it as an `OSError`."""
    return isinstance(error, ImportError) or type(error).__module__.partition(".")[0] in _STORES


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

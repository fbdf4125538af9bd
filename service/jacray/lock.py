"""The lock that says which process writes into a folder."""

from __future__ import annotations

import os
import time
from pathlib import Path

from jacray_workers.errors import JobError, Plain, StorageError


def hold(path: Path) -> int:
    """Take the lock that says who writes. It is on the folder, so it leaves no file behind and dies with its holder."""
    import fcntl

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = os.open(path.parent, os.O_RDONLY)
    except OSError as error:
        raise StorageError("journal", f"could not be made: {error.strerror}", Plain(str(path))) from error
    for last in (False,) * 5 + (True,):
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if last:
                os.close(held)
                rule, way_out = f"is in use by {holder(path.parent)}", "wait for it, end it, or choose another folder"
                raise JobError("journal", rule, Plain(str(path.parent)), way_out) from None
            time.sleep(0.05)  # a reader that looks whether anybody writes holds it for a moment
        except OSError:  # a file system without locks: nobody can tell, so nobody is refused
            break
        else:
            break
    return held


def holder(folder: Path) -> str:
    """Who holds a folder's lock, in words; of this machine's processes by number, where Linux tells."""
    try:
        found = folder.stat()
        place = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
        lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    except OSError:
        return "another process"
    holders = [line[4] for line in lines if len(line) > 5 and line[1] == "FLOCK" and line[5] == place]
    return "this process" if str(os.getpid()) in holders else f"process {holders[0]}" if holders else "another process"

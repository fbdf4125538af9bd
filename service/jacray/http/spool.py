"""Whose a state folder is, and the folder for what lives a moment: bodies and answers too large for a pipe."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from pathlib import Path
from typing import IO

from jacray_workers.errors import Plain, RequestError

_QUICK = Path("/dev/shm")  # noqa: S108 - a folder with a random name and mode 0700 is made in it
_PREFIX = "jacray-"
_ROOM = 4 << 30


def lock(state: Path) -> IO[str]:
    """Take a state folder; it is given back when the file is closed, or this process ends in whatever way.

    Raises:
        RequestError: another service has it.
    """
    held = (state / "lock").open("a", encoding="utf-8")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held.close()
        rule = "must be a folder that no other service uses now"
        raise RequestError("state", rule, Plain(str(state)), "give --state another folder, or stop the other") from None
    return held


def make(state: Path) -> Path:
    """An empty folder with a name that nobody can guess; what a service that was killed left is taken away.

    It lies in memory where there is some to spare, else on the state's own disk. The file `spool` says where.
    """
    name = state / "spool"
    if name.exists():
        left = Path(name.read_text(encoding="utf-8"))
        if left.name.startswith(_PREFIX) and left.parent in (_QUICK, state):
            shutil.rmtree(left, ignore_errors=True)
    found = tempfile.mkdtemp(prefix=_PREFIX, dir=_quick_folder(state))
    name.write_text(found, encoding="utf-8")
    return Path(found)


def _quick_folder(state: Path) -> Path:
    try:
        if shutil.disk_usage(_QUICK).free > _ROOM:
            return _QUICK
    except OSError:
        pass
    return state

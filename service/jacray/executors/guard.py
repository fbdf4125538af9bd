"""What ends the agents of a Ray of our own when this process is killed and can end nothing itself.

Linux ends Ray's servers with the process that started them. Their two agents find out by themselves, and then try for a
minute to tell a server that is gone. A shell that waits for the end of a pipe knows at once.
"""

from __future__ import annotations

import contextlib
import subprocess

import psutil


class Guard:
    """Ends processes by SIGKILL as soon as this one is gone, however it went; until it is told to let go.

    Attributes:
        pids: the processes.
    """

    def __init__(self, pids: list[int]) -> None:
        self.pids = pids
        words = " ".join(map(str, pids))
        # A session of its own: Ctrl-C is for the foreground's processes.
        self._shell = subprocess.Popen(  # noqa: S603  (numbers of ours, and no word of anybody's)
            ["/bin/sh", "-c", f"read -r word || kill -9 {words} 2>/dev/null"],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def let_go(self) -> None:
        """Leave the processes alone: they have been told to end."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):  # it is gone already
            self._shell.communicate(b"done\n", timeout=5)


def agents() -> list[int]:
    """The processes that the servers started by this process have started themselves."""
    found = []
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                found += [each.pid for each in child.children() if _is_agent(each)] if "raylet" in child.name() else []
    return found


def _is_agent(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "agent" in " ".join(process.cmdline()).lower()
    return False

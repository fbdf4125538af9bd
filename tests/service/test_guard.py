"""The agents of a Ray of our own go when the process that has it is killed, and stay when they are let go."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

SCRIPT = """
import sys
from jacray.executors.guard import Guard
guard = Guard([int(sys.argv[1])])
print("there", flush=True)
sys.stdin.readline()
guard.let_go()
"""


@pytest.mark.parametrize("killed", [True, False])
def test_who_is_guarded_goes_with_a_process_that_is_killed(killed: bool) -> None:
    with subprocess.Popen(["sleep", "100"]) as guarded:
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(guarded.pid)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        if killed:
            process.kill()
            assert guarded.wait(20) == -signal.SIGKILL
        process.communicate("\n", timeout=20)
        if not killed:
            assert guarded.poll() is None
            guarded.kill()

"""How a command ends: whose mistake it was decides the exit code and what is printed."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import click

MISTAKE, FAULT, INTERRUPTED = 1, 2, 130


class Interrupted(BaseException):
    """Ctrl-C, with what is left of the work in words.

    No `KeyboardInterrupt`: click makes an `Abort` of those, and the words would be lost.
    """


def guarded(command: Callable[[], Any], *, debug: bool) -> int:
    """Run a command; a failure becomes one message on stderr and an exit code.

    Args:
        command: does the work.
        debug: print the traceback too.
    """
    try:
        result = command()
    except click.exceptions.Exit as leaving:
        return leaving.exit_code
    except Interrupted as stopped:
        return _say(str(stopped), INTERRUPTED)
    except (click.exceptions.Abort, KeyboardInterrupt):
        return _say("interrupted; nothing was left half-written", INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has left; Python must not try to flush to it on the way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except click.ClickException as error:
        return _say(_usage(error), MISTAKE)
    except Exception as error:  # noqa: BLE001 - the last stop: everything must end in a message and a code
        return _failed(error, debug)
    return result if isinstance(result, int) else 0


def _usage(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    hint = f" (see `{context.command_path} --help`)" if context is not None else ""
    return f"{error.format_message().rstrip('.')}{hint}"


def _failed(error: Exception, debug: bool) -> int:
    from jacray_workers.errors import JacrayError, UserError

    if debug:
        traceback.print_exception(error)
    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
    if isinstance(error, UserError):
        return _say(f"{error}{notes}", MISTAKE)
    known = isinstance(error, JacrayError)
    told = f"{error}{notes}" if known else f"{type(error).__name__}: {error}{notes}"
    where = "" if debug else f" (traceback in {_keep(error)})"
    return _say(f"{told}; this is a fault of jacray or of the machine{where}", FAULT)


def _keep(error: Exception) -> str:
    with tempfile.NamedTemporaryFile("w", prefix="jacray-fault-", suffix=".txt", delete=False) as stream:
        stream.writelines(traceback.format_exception(error))
    return stream.name


def _say(text: str, code: int) -> int:
    print(f"jacray: {' '.join(text.split())}", file=sys.stderr)  # noqa: T201 - this is where users read it
    return code

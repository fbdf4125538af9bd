"""Every error that jacray raises on purpose, as one tree.

    JacrayError
    ├── UserError                  something the caller can mend: exit code 1, no traceback
    │   ├── RequestError           a field of the request breaks a rule
    │   ├── InputError             the inputs break a rule
    │   ├── ModelError             the model cannot be built, called or differentiated
    │   │   └── CoupledSamplesError    one sample's output depends on another sample
    │   ├── MethodError            the method asked for cannot do this work
    │   ├── BudgetError            the work cannot fit the memory it was given
    │   ├── NonFiniteError         NaN or infinity, where the request forbids them
    │   ├── SpecError              a spec file or an override breaks a rule
    │   ├── StorageError           results cannot be written or read: a full disk, a lost share, a damaged block
    │   └── JobError               a job timed out, or is unknown
    │       ├── BusyError              too much work is queued already
    │       └── CancelledError         the job was cancelled
    └── FaultError                 something only we can mend: exit code 2
        ├── VerificationError      a result disagrees with an independent computation
        └── ShardError             a worker failed for a reason that is not the user's

A user's error carries its four parts as attributes, so that a command line, an HTTP answer and a notebook can
each show them in their own way.
"""

from __future__ import annotations

from typing import Any


class JacrayError(Exception):
    """The base of every error raised on purpose."""


class UserError(JacrayError, ValueError):
    """A mistake that the caller can mend.

    Args:
        argument: the argument or key at fault, as the caller spells it.
        rule: the rule that it breaks.
        value: what was given, already short enough to print; None where there is nothing to show.
        way_out: what to do instead.
    """

    def __init__(self, argument: str, rule: str, value: Any = None, way_out: str = "") -> None:
        self.argument = argument
        self.rule = rule
        self.value = value
        self.way_out = way_out
        got = "" if value is None else f"; got {shorten(value)}"
        tail = f". {way_out}" if way_out else ""
        super().__init__(f"{shorten(Plain(argument), 400)}: {rule}{got}{tail}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild from the four parts: the default rebuilds from the message alone and fails across processes."""
        # As a text that is shown without quotes, so that the message stays the same.
        value = None if self.value is None else Plain(shorten(self.value))
        return type(self), (self.argument, self.rule, value, self.way_out)


class RequestError(UserError):
    """A field of the request breaks a rule."""


class InputError(UserError):
    """The inputs break a rule."""


class ModelError(UserError):
    """The model cannot be built, called or differentiated."""


class CoupledSamplesError(ModelError):
    """One sample's output depends on another sample, so per-sample derivatives are not defined."""


class MethodError(UserError):
    """The method asked for cannot do this work."""


class BudgetError(UserError):
    """The work cannot fit the memory that it was given."""


class NonFiniteError(UserError):
    """NaN or infinity where the request forbids them."""


class SpecError(UserError):
    """A spec file or a command-line override breaks a rule."""


class StorageError(UserError):
    """Results cannot be written to or read from where they are kept: a full disk, a lost share, a damaged block.

    Args:
        argument, rule, value, way_out: as for every user's error.
        errno: what the operating system called it, or 0.
    """

    def __init__(self, argument: str, rule: str, value: Any = None, way_out: str = "", errno: int = 0) -> None:
        super().__init__(argument, rule, value, way_out)
        self.errno = errno

    def __reduce__(self) -> tuple[Any, ...]:
        """As for every user's error, with the number."""
        kind, parts = super().__reduce__()
        return kind, (*parts, self.errno)


class JobError(UserError):
    """A job was cancelled, timed out, or is unknown."""


class BusyError(JobError):
    """Too much work is queued already."""


class CancelledError(JobError):
    """The job was cancelled."""


class FaultError(JacrayError):
    """A fault that the caller cannot mend."""


class VerificationError(FaultError):
    """A result disagrees with an independent computation of the same thing."""


class ShardError(FaultError):
    """A worker failed for a reason that is not the user's."""


def shorten(value: Any, limit: int = 120) -> str:
    """The value as one line of at most `limit` characters, for an error message."""
    text = value if isinstance(value, Plain) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


class Plain(str):
    """A value already put into words, to be shown without quotes."""

    __slots__ = ()

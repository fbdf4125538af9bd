"""Errors on the wire: problem details (RFC 9457) with the key, the rule, the value and the way out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jacray_workers import errors
from jacray_workers.errors import FaultError, JacrayError, Plain, UserError, shorten

MEDIA = "application/problem+json"
_TYPE = "urn:jacray:problem:"


class HttpError(UserError):
    """A mistake in how the service is used rather than in what is asked of it.

    Attributes:
        status: the status code.
        headers: what else the answer says, such as `Retry-After`.
    """

    def __init__(
        self,
        status: int,
        argument: str,
        rule: str,
        value: Any = None,
        way_out: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(argument, rule, value, way_out)
        self.status = status
        self.headers = dict(headers or {})

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild from all parts."""
        value = None if self.value is None else Plain(shorten(self.value))
        return type(self), (self.status, self.argument, self.rule, value, self.way_out, self.headers)


def problem(error: BaseException) -> dict[str, Any]:
    """An error as the JSON object that travels.

    An exception that is none of ours was raised by the model while it ran: what a service is sent is the sender's.
    """
    if isinstance(error, UserError):
        return _problem(_status(error), type(error).__name__, str(error), {
            "key": error.argument, "rule": error.rule,
            "value": None if error.value is None else shorten(error.value), "way_out": error.way_out,
        })  # fmt: skip
    if isinstance(error, JacrayError):
        return _problem(500, type(error).__name__, shorten(error_text(error), 2000), {})
    if isinstance(error, MemoryError):
        return _problem(422, "BudgetError", "the work does not fit the memory of the service", {})
    rule = f"raised {type(error).__name__} while it ran: {shorten(Plain(error_text(error)), 500)}"
    return problem(errors.ModelError("model", rule))


def error_text(error: BaseException) -> str:
    """An error's own words, with the notes that were added to it."""
    return " ".join([str(error), *getattr(error, "__notes__", ())]).strip()


def error_of(found: Mapping[str, Any]) -> JacrayError:
    """The error that a problem stands for, as the caller would have met it in his own process."""
    kind, detail = str(found.get("kind", "")), str(found.get("detail") or found.get("title") or "no reason given")
    if "rule" not in found:
        known = getattr(errors, kind, None)
        own = isinstance(known, type) and issubclass(known, FaultError)
        return known(detail) if own and known is not None else FaultError(detail)
    value = None if found.get("value") is None else Plain(str(found["value"]))
    parts = (str(found.get("key", "")), str(found["rule"]), value, str(found.get("way_out") or ""))
    known = getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, UserError):
        return known(*parts)
    return HttpError(int(found.get("status", 400)), *parts)


def _status(error: UserError) -> int:
    return error.status if isinstance(error, HttpError) else getattr(error, "http_status", 422)


def _problem(status: int, kind: str, detail: str, more: Mapping[str, Any]) -> dict[str, Any]:
    found = {"type": f"{_TYPE}{kind}", "title": kind, "status": status, "detail": detail, "kind": kind}
    return {**found, **more}

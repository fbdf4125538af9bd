"""Jacobians in the caller's own process: no Ray, no threads, no copies of the model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Unpack

from jacray_workers.engine import prepare
from jacray_workers.errors import RequestError
from jacray_workers.models import as_model
from jacray_workers.plan import Plan
from jacray_workers.request import Request, Return, make_request
from jacray_workers.straight import lane

from jacray.coordinator import compute_here, recalled
from jacray.fields import AllFields, Fields
from jacray.result import Result


def jacobian(model: Any, x: Any, **fields: Unpack[Fields]) -> Any:
    """The Jacobian of a model at every sample of a batch.

    Args:
        model: an `nn.Module`, a callable of tensors or a model spec. It is left exactly as it was.
        x: a tensor or a pytree of tensors, the batch first.
        **fields: the fields of `Request`, such as `wrt`, `method`, `chunk_size`, `dtype`.

    Returns:
        `(B, *out, *in)` with respect to inputs; `{name: (B, *out, *param)}` with respect to parameters; the
        structure of the model's outputs and inputs where these are pytrees.

    Raises:
        UserError: the model, the inputs or a field breaks a rule; the text names it and says what to do.
    """
    found = lane.recall(model, x, fields)
    return _only("jacobian", model, x, dict(fields)).jacobian if found is None else found.value


def weighted_gradient(model: Any, x: Any, *, weights: Any = None, **fields: Unpack[Fields]) -> Any:
    """k^T J at every sample, without ever building J: what `y.backward(gradient=k)` gives.

    Args:
        model: an `nn.Module`, a callable of tensors or a model spec. It is left exactly as it was.
        x: a tensor or a pytree of tensors, the batch first.
        weights: k, of the shape `(*out)` for every sample the same, `(B, *out)` for one per sample, or
            `(K, B, *out)` for K of them. None means 1 for a scalar output.
        **fields: the other fields of `Request`.

    Returns:
        `(B, *in)` with respect to inputs. With respect to parameters `{name: (*param)}`, summed over the batch, or
        `{name: (B, *param)}` with `reduction="none"`. A leading K where there are K weights.

    Raises:
        UserError: the model, the inputs or a field breaks a rule; the text names it and says what to do.
    """
    return _only("weighted_gradient", model, x, {**fields, "weights": weights}).weighted_gradient


def compute(model: Any, x: Any, *, request: Request | None = None, **fields: Unpack[AllFields]) -> Result:
    """Several results at once, with the plan that was followed and a receipt.

    Args:
        model: an `nn.Module`, a callable of tensors or a model spec. It is left exactly as it was.
        x: a tensor or a pytree of tensors, the batch first.
        request: a request made before; `fields` change some of it.
        **fields: the fields of `Request`; `returns` lists the results.

    Raises:
        UserError: the model, the inputs or a field breaks a rule; the text names it and says what to do.
    """
    began = time.perf_counter()
    found = lane.recall(model, x, fields) if request is None else None
    if found is not None:
        return recalled(found, time.perf_counter() - began)
    return _computed(model, x, make_request(request, **fields), fields if request is None else None)


def plan(model: Any, x: Any, *, request: Request | None = None, workers: int = 1, **fields: Unpack[AllFields]) -> Plan:
    """How a job would be computed, and what it would cost. Nothing but a few samples is computed.

    Args:
        model: an `nn.Module`, a callable of tensors or a model spec.
        x: a tensor or a pytree of tensors, the batch first.
        request: a request made before; `fields` change some of it.
        workers: how many workers would share the job.
        **fields: the fields of `Request`.

    Raises:
        UserError: the job would be refused.
    """
    return prepare(as_model(model), x, make_request(request, **fields), workers=workers).plan


def _computed(model: Any, x: Any, asked: Request, fields: Mapping[str, Any] | None) -> Result:
    """The long way; where all that was asked for stands in `fields`, the next call may go a shorter one."""
    began = time.perf_counter()
    prepared = prepare(as_model(model), x, asked)
    result = compute_here(prepared, time.perf_counter() - began)
    if fields is not None:
        lane.remember(model, x, fields, dict(result), result.plan, asked)
    return result


def _only(name: Return, model: Any, x: Any, fields: dict[str, Any]) -> Result:
    """A result that holds nothing else."""
    if "returns" in fields:
        raise RequestError(
            "returns", f"is not an argument of {name}()", fields["returns"],
            "use jacray.compute(model, x, returns=[...]) for several results",
        )  # fmt: skip
    return _computed(model, x, make_request(returns=(name,), **fields), fields if name == "jacobian" else None)

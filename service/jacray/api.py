"""Jacobians in the caller's own process: no Ray, no threads, no copies of the model."""

from __future__ import annotations

import time
from typing import Any, Unpack

from jacray_workers.engine import prepare
from jacray_workers.errors import RequestError
from jacray_workers.models import as_model
from jacray_workers.plan import Plan
from jacray_workers.request import Request, Return, make_request
from jacray_workers.straight import lane

from jacray.coordinator import compute_here
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
    if found is not None:
        return found
    result = _only("jacobian", model, x, dict(fields))
    lane.remember(model, x, fields, result.plan)
    return result.jacobian


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
    asked = make_request(request, **fields)
    began = time.perf_counter()
    prepared = prepare(as_model(model), x, asked)
    return compute_here(prepared, time.perf_counter() - began)


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


def _only(name: Return, model: Any, x: Any, fields: dict[str, Any]) -> Result:
    """A result that holds nothing else."""
    if "returns" in fields:
        raise RequestError(
            "returns", f"is not an argument of {name}()", fields["returns"],
            "use jacray.compute(model, x, returns=[...]) for several results",
        )  # fmt: skip
    return compute(model, x, **{"returns": (name,), **fields})

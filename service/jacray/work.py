"""From a checked run to what a job takes: a module, tensors, and a request with its weights read."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import psutil
from jacray_workers import models, sources
from jacray_workers.engine import FEW
from jacray_workers.errors import SpecError
from jacray_workers.request import Request
from jacray_workers.sources import ranged
from jacray_workers.sources.loaded import Loaded
from jacray_workers.sources.ranged import Rows
from torch import nn

from jacray.spec import Run


@dataclass(frozen=True)
class Work:
    """What a run computes with.

    Attributes:
        model: the built module.
        loaded: the inputs, or rows that whoever computes them reads, and the fields that came with them.
        request: as the spec has it, `weights` and `vectors` as tensors.
        digests: of the model and of the inputs, as hexadecimal text.
    """

    model: nn.Module
    loaded: Loaded
    request: Request
    digests: dict[str, str]


def make(run: Run, *, whole: bool = False) -> Work:
    """Build the model, open the inputs, and read those that are few.

    Args:
        run: what was asked for.
        whole: read the inputs in any case, for someone who is to be sent them.

    Raises:
        UserError: naming the file, the key, the rule and the value.
    """
    with run.naming():
        rows = sources.rows(run.spec.inputs, run.base)
        few = whole or rows.nbytes <= _carried(rows, run.spec.cluster.address)
        loaded = rows.whole() if few else Loaded(rows, rows.all_fields(), rows.start)
        model = models.build(run.spec.model, run.base)
        request = _with_directions(run, model, loaded)
        found = loaded.digest if few and rows.nbytes <= ranged.HASHED_BYTES else rows.digest
        return Work(model, loaded, request, {"model": models.digest(run.spec.model, run.base), "inputs": found})


def some_inputs(loaded: Loaded, samples: int) -> Any:
    """The inputs of the first samples; those that are in memory as they are."""
    rows = loaded.inputs
    return rows.read(0, min(samples, rows.samples)).inputs if isinstance(rows, Rows) else rows


def _carried(rows: Rows, address: str) -> int:
    """Up to how many bytes inputs are read here and sent along, instead of being read where they are computed.

    A file of this machine may be out of a cluster's reach, so there it is sent as long as it fits well.
    """
    far = address not in ("inline", "local") and any(place.scheme == "file" for place, _ in rows.reader.places)
    return max(ranged.HASHED_BYTES, psutil.virtual_memory().available // 4 if far else 0)


def _with_directions(run: Run, model: nn.Module, loaded: Loaded) -> Request:
    request = run.spec.request
    read: dict[str, Any] = {}
    for name in ("weights", "vectors"):
        classes = functools.partial(_outputs, model, loaded, request, name)
        read[name] = sources.directions(getattr(request, name), loaded, run.base, classes, name)
    return request.model_copy(update=read)


def _outputs(model: nn.Module, loaded: Loaded, request: Request, argument: str) -> int:
    """How many outputs a sample has, for a one-hot that leaves it open."""
    from jacray_workers.problem.resolve import resolve

    problem, _ = resolve(model, some_inputs(loaded, FEW), request.model_copy(update={"weights": None, "vectors": None}))
    outs = problem.outs
    if argument != "weights" or len(outs) != 1 or len(outs[0].shape) != 1 or outs[0].pick is not None:
        rule = "is required where the model's output is not one row of classes"
        raise SpecError(f"{argument}.classes", rule, [list(out.shape) for out in outs])
    return outs[0].shape[0]

"""From a checked run to what a job takes: a module, tensors, and a request with its weights read."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from jacray_workers import models, sources
from jacray_workers.errors import SpecError
from jacray_workers.request import Request
from jacray_workers.sources.loader import Loaded
from torch import nn

from jacray.spec import Run


@dataclass(frozen=True)
class Work:
    """What a run computes with.

    Attributes:
        model: the built module.
        loaded: the inputs, and the fields that came with them.
        request: as the spec has it, `weights` and `vectors` as tensors.
        digests: of the model and of the inputs, as hexadecimal text.
    """

    model: nn.Module
    loaded: Loaded
    request: Request
    digests: dict[str, str]


def make(run: Run) -> Work:
    """Build the model and read the inputs.

    Raises:
        UserError: naming the file, the key, the rule and the value.
    """
    with run.naming():
        loaded = sources.load(run.spec.inputs, run.base)
        model = models.build(run.spec.model, run.base)
        request = _with_directions(run, model, loaded)
        return Work(model, loaded, request, {"model": models.digest(run.spec.model, run.base), "inputs": loaded.digest})


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

    problem, _ = resolve(model, loaded.inputs, request.model_copy(update={"weights": None, "vectors": None}))
    outs = problem.outs
    if argument != "weights" or len(outs) != 1 or len(outs[0].shape) != 1 or outs[0].pick is not None:
        rule = "is required where the model's output is not one row of classes"
        raise SpecError(f"{argument}.classes", rule, [list(out.shape) for out in outs])
    return outs[0].shape[0]

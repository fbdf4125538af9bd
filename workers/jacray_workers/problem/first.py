"""The first run of a model: what it returns, and its habits that every later pass has to reckon with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from jacray_workers.errors import CoupledSamplesError, JacrayError, ModelError, Plain
from jacray_workers.problem.placing import place
from jacray_workers.problem.problem import Problem
from jacray_workers.problem.session import Draws
from jacray_workers.problem.state import Snapshot, Writes, scripted
from jacray_workers.sharing import own_draws


def first_run(problem: Problem, leaves: Sequence[Tensor]) -> tuple[Any, Problem, list[Tensor]]:
    """What the model returns for one sample, the problem with what the run showed of the model, and a fresh sample.

    From here on a model that writes into what it is given is given copies: the caller's tensors stay whole.
    """
    batch = [leaf.clone() for leaf in place(problem, [leaf[:1] for leaf in leaves])]
    y, watched = _watched(problem, batch)
    random = problem.training or watched.random
    found = replace(watched, random=random, writes=_written(batch))
    return y, found, place(problem, [leaf[:1] for leaf in leaves])


def writes_hidden(problem: Problem, batch: Sequence[Tensor]) -> bool:
    """Whether the model writes into a hidden value that is put in place, as an in-place activation after it does."""
    if problem.writes or not any(leaf.side == "module" for leaf in problem.leaves):
        return False
    values = [value.clone() for value in problem.values(batch)]
    with torch.no_grad():
        problem.call_model(values, batch)
    return _written(values)


def _written(tensors: Sequence[Tensor]) -> bool:
    """Whether any of these fresh tensors was written to."""
    return any(tensor._version > 0 for tensor in tensors)


def _watched(problem: Problem, batch: Sequence[Tensor]) -> tuple[Any, Problem]:
    """What the model returns on its first run, and the problem with what the run showed of the model's habits."""
    own = {**dict(problem.module.named_parameters()), **dict(problem.module.named_buffers()), **problem.tensors}
    versions = {name: tensor._version for name, tensor in own.items() if not tensor.is_inference()}
    before, writes = Snapshot(problem.module, deep=True), Writes(own)
    try:
        with own_draws(), writes:
            draws = Draws()
            y, differentiates = _run(replace(problem, stateful=False), batch)
            random = draws.happened()
        stateful = before.changed()
    finally:
        before.restore()
        # Some operators write without saying so; those that do so into parameters say so.
        seen = [name for name, version in versions.items() if own[name]._version != version]
        writes.undo()
    written = tuple(sorted({*writes.saved, *seen} - scripted(problem.module)))
    return y, replace(
        problem,
        differentiates=differentiates,
        stateful=stateful,
        random=random,
        written=written,
        branches=writes.branches,
    )


def _run(problem: Problem, batch: Sequence[Tensor]) -> tuple[Any, bool]:
    """What the model returns, and whether it needs gradients on, as one that takes derivatives itself does."""
    with torch.no_grad():
        try:
            return run_model(problem, batch), False
        except ModelError as error:
            if not isinstance(error.__cause__, RuntimeError):
                raise
    return run_model(problem, batch), True


def run_model(problem: Problem, batch: Sequence[Tensor]) -> Any:
    """Call the model; what it raises becomes a `ModelError` that keeps the cause.

    Raises:
        ModelError: the model raised.
    """
    try:
        return problem.call_model(problem.values(batch), batch)
    except JacrayError:
        raise
    except Exception as error:
        raise _does_not_run(problem, batch, error) from error


def _does_not_run(problem: Problem, batch: Sequence[Tensor], error: Exception) -> ModelError:
    text = str(error)
    if "Expected more than 1 value per channel" in text:
        return _batch_statistics(problem.module, problem.training)
    shapes = ", ".join(f"{tuple(leaf.shape)} {str(leaf.dtype)[6:]}" for leaf in batch)
    casts = "dtype" in text or "expected scalar type" in text or "Double" in text
    hint = "set dtype='float32' (or 'float64') to cast the model and the inputs alike" if casts else ""
    rule = f"must accept the inputs, but raised {type(error).__name__}: {error}"
    return ModelError("model", rule, f"a batch of {shapes}", hint)


def _batch_statistics(module: nn.Module, training: bool) -> CoupledSamplesError:
    """Batch norm over the batch's own statistics refuses a single sample; the first such layer is named."""
    norms = [
        name
        for name, part in module.named_modules()
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and (training or part.running_mean is None)
    ]
    rule = "must treat the samples of a batch apart, but batch norm {} takes its statistics from all"
    way_out = "put a norm over each sample in its place"
    if training:
        rule, way_out = (
            rule.format("in training mode"),
            f"leave training=False, for its running statistics, or {way_out}",
        )
    else:
        rule = rule.format("without running statistics")
    return CoupledSamplesError("model", rule, Plain(f"module {norms[0]}") if norms else None, way_out)

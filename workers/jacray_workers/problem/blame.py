"""Whose mistake an exception is: what a model raises is the caller's, and is told with the module and the samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType

import torch
from torch import Tensor, nn

import jacray_workers
from jacray_workers.errors import JacrayError, ModelError, Plain
from jacray_workers.planning.memory import out_of_memory
from jacray_workers.problem.problem import CallableModule, Problem

_OURS = str(Path(jacray_workers.__file__).parent)


def accuse(problem: Problem, batch: Sequence[Tensor], start: int, error: Exception) -> ModelError | None:
    """The model's mistake behind an exception in a shard, or None where it is not the model's.

    The model alone is run again on each sample and on all of them: what it raises then is its own. Called inside
    `problem.session()`.

    Args:
        problem: whose model ran.
        batch: the samples that it was given.
        start: the first one's number in the job.
        error: what came up.
    """
    if isinstance(error, JacrayError) or out_of_memory(error):
        return None
    size = batch[0].shape[0]
    for low, high in (*((i, i + 1) for i in range(size)), (0, size)):
        few = [leaf[low:high] for leaf in batch]
        found = _raised(problem, few)
        if found is not None:
            return model_error(problem, few, start + low, found)
    return model_error(problem, batch, start, error) if _in_model(problem, error) else None


def model_error(problem: Problem, batch: Sequence[Tensor], start: int, error: BaseException) -> ModelError:
    """What a model's exception is told as."""
    count = batch[0].shape[0]
    samples = f"sample {start}" if count == 1 else f"samples {start} to {start + count - 1}"
    name = culprit(problem.module, error)
    where = f" in module {name}" if name else ""
    shapes = ", ".join(f"{tuple(leaf.shape)} {str(leaf.dtype)[6:]}" for leaf in batch)
    text = " ".join(str(error).split())[:300]
    found = ModelError(
        "model",
        f"must run on every sample, but raised {type(error).__name__}{where}: {text}",
        Plain(f"{samples}, a batch of {shapes}"),
        "mend the model or leave these samples out",
    )
    found.__cause__ = error
    return found


def culprit(module: nn.Module, error: BaseException) -> str:
    """The name of the innermost module that was running, or the empty string."""
    names = {id(part): name for name, part in module.named_modules()}
    running = [frame.f_locals.get("self") for frame in _frames(error.__traceback__)]
    return next((names[id(part)] for part in reversed(running) if id(part) in names), "")


def _raised(problem: Problem, batch: Sequence[Tensor]) -> Exception | None:
    """What the model raises on these samples, or None."""
    own = [leaf.detach().clone() for leaf in batch]
    try:
        with torch.no_grad():
            problem.forward(problem.values(own), own)
    except Exception as error:  # noqa: BLE001 - a model may raise anything
        return None if isinstance(error, JacrayError) or out_of_memory(error) else error
    return None


def _in_model(problem: Problem, error: BaseException) -> bool:
    """Whether code of the model raised it: its forward, its function, or the backward of a function of its own."""
    frames = list(_frames(error.__traceback__))
    innermost = frames[-1].f_code.co_filename if frames else ""
    passed = any(_of_model(problem.module, frame) for frame in frames)
    return passed and not innermost.startswith(_OURS)


def _of_model(module: nn.Module, frame: FrameType) -> bool:
    if isinstance(frame.f_locals.get("ctx"), torch.autograd.function.FunctionCtx):
        return True
    if isinstance(module, CallableModule):
        return frame.f_code is getattr(module.function, "__code__", None)
    running = frame.f_locals.get("self")
    return isinstance(running, nn.Module) and any(running is part for part in module.modules())


def _frames(trace: TracebackType | None) -> Iterator[FrameType]:
    """The frames that an exception passed, the outermost first."""
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next

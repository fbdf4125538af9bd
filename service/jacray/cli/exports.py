"""`jacray export`: a model spec, or a program of one's own, as a graph file."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jacray_workers.errors import ModelError, Plain, SpecError, shorten

from jacray.exporting import export

EXAMPLE = 64  # samples by which a graph is compared with its module, where there are too many to read them all


def export_file(file: str, overrides: Sequence[str], to: str, *, trust: bool) -> str:
    """Write the graph file, and say what it holds.

    Args:
        file: a run's YAML, of which the model and the inputs are used, or a `.pt2`.
        overrides: as for `run`.
        to: the graph file.
        trust: a `.pt2` may be read, which runs whatever code it holds.

    Raises:
        UserError: as `export`; or the file is a `.pt2` and not trusted.
    """
    if Path(file).suffix.lower() == ".pt2":
        model, example = _program(file, trust=trust, overridden=bool(overrides))
    else:
        model, example = _spec(file, overrides)
    path = export(model, example, to)
    return f"wrote {path} ({path.stat().st_size:,} bytes); use it as model: {{kind: graph, path: {path}}}"


def _spec(file: str, overrides: Sequence[str]) -> tuple[Any, Any]:
    from jacray.spec import read_run
    from jacray.work import make, some_inputs

    work = make(read_run(file, overrides))
    return work.model, some_inputs(work.loaded, EXAMPLE)


def _program(file: str, *, trust: bool, overridden: bool) -> tuple[Any, Any]:
    """A program of torch.export with its example inputs. Reading one runs code from it, as reading a pickle does."""
    if not trust:
        way_out = (
            "add --trust-pt2 for a file that you made yourself; jacray.export(module, example, path) needs no .pt2"
        )
        raise SpecError("FILE", "is a .pt2, and reading one can run code from it", Plain(file), way_out)
    if overridden:
        raise SpecError("KEY=VALUE", "changes a key of a YAML file, and a .pt2 has none", Plain(file))
    import torch

    try:
        program = torch.export.load(file)
        module = program.module()
        args, kwargs = program.example_inputs
    except Exception as error:
        rule = f"must be a program that torch.export.save wrote: {shorten(Plain(str(error)))}"
        raise ModelError("FILE", rule, Plain(file)) from error
    example = dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments) if kwargs else args
    return module, example

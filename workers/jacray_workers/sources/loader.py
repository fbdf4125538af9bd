"""From an input spec to a source that is read by range: opened, cut, preprocessed and checked."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from jacray_workers.errors import InputError, Plain
from jacray_workers.sources.arrays import Leaf, Part, Reader, check_range
from jacray_workers.sources.loaded import Loaded
from jacray_workers.sources.places import ANYWHERE, Reach
from jacray_workers.sources.preprocess import bind, preprocess
from jacray_workers.sources.ranged import Rows
from jacray_workers.sources.together import Together

__all__ = ["Loaded", "load", "rows"]

_READERS = {  # each in the one file that knows its library
    "random": "made:random",
    "inline": "made:inline",
    "digits": "bundled:digits",
    "sklearn": "bundled:sklearn",
    "npy": "numpy_files:npy",
    "npz": "numpy_files:npz",
    "safetensors": "safetensors_files:safetensors",
    "zarr": "zarr_files:zarr",
    "csv": "table:csv_table",
    "parquet": "arrow:parquet",
    "datasets": "arrow:datasets",
    "images": "images:images",
}


def rows(spec: Any, base: Path, argument: str = "inputs", reach: Reach = ANYWHERE) -> Rows:
    """Open the source that a spec describes. Nothing is read but headers, an index, and the first sample.

    Args:
        spec: any input spec, or a mapping of them by the names that the inputs get.
        base: the folder that relative paths start from.
        argument: what the spec is called in errors.
        reach: which files the spec may name.

    Raises:
        InputError: the source is not there, is not what its kind says, is empty, or its parts have different numbers
            of samples.
    """
    if isinstance(spec, Mapping):
        parts = {name: rows(part, base, f"{argument}.{name}", reach) for name, part in spec.items()}
        together = Together(parts, argument)
        return _opened(spec, together, together.samples, 0, ())
    reader = _reader(spec.kind)(spec, base, argument, reach)
    check_range(spec.range, reader.samples, argument)
    start, stop = spec.range or (0, reader.samples)
    return _opened(spec, reader, stop - start, start, bind(spec.preprocess, base, f"{argument}.preprocess", reach))


def load(spec: Any, base: Path, argument: str = "inputs", reach: Reach = ANYWHERE) -> Loaded:
    """Read the whole batch that a spec describes; see `rows`.

    Raises:
        InputError: as `rows`, or the batch does not fit into memory.
    """
    return rows(spec, base, argument, reach).whole()


@functools.cache
def _reader(kind: str) -> Callable[[Any, Path, str, Reach], Reader]:
    module, _, name = _READERS[kind].partition(":")
    found: Callable[[Any, Path, str, Reach], Reader] = getattr(import_module(f"jacray_workers.sources.{module}"), name)
    return found


def _opened(spec: Any, reader: Reader, samples: int, start: int, steps: tuple[Any, ...]) -> Rows:
    """The source with what its first sample tells of all."""
    raw, fields = reader.read(start, start + 1)
    parts = preprocess(raw, steps, start)
    inputs = {name: _leaf(name, part, 1, reader.argument) for name, part in parts.items()}
    known = {name: _leaf(name, field, 1, f"{reader.argument}.fields") for name, field in fields.items()}
    return Rows(spec, reader, steps, samples, start, inputs, known)


def _leaf(name: str, part: Part, rows_: int, argument: str) -> Leaf:
    if not isinstance(part, Tensor):
        way_out = "add the step {kind: tokenize, path: tokenizer.json, length: 64} to preprocess"
        raise InputError(
            argument, "must be numbers by the end of its preprocessing", Plain(f"texts in {name or 'it'}"), way_out
        )
    if part.dim() == 0 or part.shape[0] != rows_:
        raise InputError(argument, "must keep a row for each sample", Plain(f"shape {tuple(part.shape)}"))
    return Leaf(tuple(part.shape[1:]), part.dtype)

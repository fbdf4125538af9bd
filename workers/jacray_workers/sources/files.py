"""Inputs from files: arrays are mapped or read by range, and nothing is ever unpickled."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from jacray_workers.errors import InputError, Plain, UserError
from jacray_workers.sources.arrays import Source, from_numpy, rows_of, unreadable
from jacray_workers.sources.made import check_memory
from jacray_workers.sources.specs import Npy, Npz, Safetensors, Zarr
from jacray_workers.sources.zarr_files import zarr_arrays
from jacray_workers.spec_parts import find
from jacray_workers.validation import nearest


def npy(spec: Npy, base: Path, argument: str) -> Tensor:
    """The array of a .npy file; the file stays on disk until its pages are touched."""
    path = find(spec.path, base, f"{argument}.path", InputError, (".npy",))
    try:
        # Copy on write: torch cannot mark a tensor as read-only, and the file must never change.
        array = np.lib.format.open_memmap(path, mode="c")
    except (ValueError, OSError, EOFError, SyntaxError) as error:
        raise unreadable(argument, "numpy array", path, error) from None
    rows = rows_of(spec.range, array.shape, argument)
    return from_numpy(array[slice(*rows)], f"{argument}.path")


def several(spec: Npz | Safetensors | Zarr, base: Path, argument: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The arrays that a spec picks from a file of several, and its fields, cut to the range."""
    opened = _OPENERS[spec.kind]
    suffixes = () if spec.kind == "zarr" else (f".{spec.kind}",)
    path = find(spec.path, base, f"{argument}.path", InputError, suffixes)
    with opened(path, argument) as sources:
        names = _picked(spec, sources, argument)
        for name in (*names.values(), *spec.fields.values()):
            if name not in sources:
                raise InputError(f"{argument}.arrays", "names no array of the file", name, nearest(name, sources))
        parts = {as_: _part(sources[name], spec.range, argument) for as_, name in names.items()}
        fields = {as_: _part(sources[name], spec.range, argument) for as_, name in spec.fields.items()}
    return parts, fields


def _picked(spec: Npz | Safetensors | Zarr, sources: Mapping[str, Source], argument: str) -> dict[str, str]:
    """Input name to array name; the empty input name for a bare tensor."""
    if isinstance(spec.arrays, tuple):
        return {name: name for name in spec.arrays}
    if spec.arrays is not None:
        return {"": spec.arrays}
    free = [name for name in sources if name not in spec.fields.values()]
    if len(free) != 1:
        found = Plain(f"the file holds {', '.join(free) or 'none'}")
        raise InputError(f"{argument}.arrays", "must say which arrays are inputs where there is not just one", found)
    return {"": free[0]}


def _part(source: Source, range_: tuple[int, int] | None, argument: str) -> Tensor:
    start, stop = rows_of(range_, source.shape, argument)
    share = (stop - start) / max(source.shape[0], 1)
    check_memory(int(source.bytes * share), f"{argument}.path")
    return source.read(start, stop)


@contextmanager
def _npz(path: Path, argument: str) -> Iterator[dict[str, Source]]:
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {info.filename.removesuffix(".npy"): info.file_size for info in archive.infolist()}
            check_memory(max(sizes.values(), default=0), f"{argument}.path")
            headers = {name: _header(archive, f"{name}.npy") for name in sizes}
        with np.load(path, allow_pickle=False) as arrays:
            yield {name: _npz_source(arrays, name, headers[name], argument) for name in sizes}
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, KeyError, SyntaxError) as error:
        if isinstance(error, UserError):
            raise
        raise unreadable(argument, "npz file", path, error) from None


def _header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    with archive.open(name) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    return shape, dtype


def _npz_source(arrays: Any, name: str, header: tuple[tuple[int, ...], np.dtype[Any]], argument: str) -> Source:
    shape, dtype = header
    size = int(np.prod(shape, dtype=object)) * dtype.itemsize
    return Source(shape, size, lambda a, b: from_numpy(arrays[name][a:b], f"{argument}.path"))


@contextmanager
def _safetensors(path: Path, argument: str) -> Iterator[dict[str, Source]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield {name: _safetensors_source(file, name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise unreadable(argument, "safetensors file", path, error) from None


def _safetensors_source(file: Any, name: str) -> Source:
    part = file.get_slice(name)
    shape = tuple(part.get_shape())
    size = int(np.prod(shape, dtype=object)) * 8
    return Source(shape, size, lambda a, b: part[a:b])


_OPENERS: dict[str, Callable[[Path, str], AbstractContextManager[dict[str, Source]]]] = {
    "npz": _npz,
    "safetensors": _safetensors,
    "zarr": zarr_arrays,
}

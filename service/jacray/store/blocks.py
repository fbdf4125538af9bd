"""Blocks of a store: ranges of samples written and read, and what was never written told apart."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import google_crc32c
import numpy as np
import torch
import zarr
from jacray_workers.errors import JobError, Plain, StorageError
from jacray_workers.plan import ArrayPlan, Shard
from torch import Tensor
from zarr.core.sync import sync

from jacray.store.faults import writing
from jacray.store.group import Store, as_numpy, codecs, node_name
from jacray.target import Target

Place = tuple[slice, ...]
KIND = "crc32c"


def samples_at(array: ArrayPlan, start: int, stop: int) -> Place:
    """Where in an array these samples stand."""
    if array.axis < 0:
        return (slice(None),) * len(array.shape)
    return (*(slice(0, n) for n in array.shape[: array.axis]), slice(start, stop))


def write_block(store: Store, array: ArrayPlan, value: Any, start: int = 0) -> None:
    """Write one range of samples of an array, or an array without samples.

    Args:
        store: where to.
        array: which array.
        value: a tensor of the range's shape, or for a factored array the block of one shard.
        start: the range's first sample.

    Raises:
        StorageError: it cannot be written.
    """
    if array.factored:
        write_factors(store, array, value, shard_from(store, start))
        return
    stop = start + value.shape[array.axis] if array.axis >= 0 else 0
    write_dense(store, store.node(array.key), samples_at(array, start, stop), as_numpy(value, array.dtype))


def write_whole(store: Store, array: ArrayPlan, value: Any) -> None:
    """Write an array of which all samples are in memory; a block in factors shard by shard."""
    if not array.factored:
        write_block(store, array, value)
        return
    for start in range(0, store.plan.samples, store.plan.shard_size):
        write_block(store, array, value[start : start + store.plan.shard_size], start)


def write_dense(store: Store, node: Any, place: Place, values: np.ndarray[Any, Any]) -> None:
    """Write numbers to a place of a zarr array, a few chunks at a time so that their copies stay small."""
    with writing(store.target, values.nbytes):
        axis = _longest(node, place)
        if axis is None:
            node[place] = values
            return
        start, stop, step = place[axis].start, place[axis].stop, node.chunks[axis]
        for low in range(start, stop, step):
            high = min(low + step, stop)
            there = (*place[:axis], slice(low, high), *place[axis + 1 :])
            node[there] = values[(*(slice(None),) * axis, slice(low - start, high - start))]


def _longest(node: Any, place: Place) -> int | None:
    """The axis along which a place spans the most chunks."""
    spans = [
        (-(-(p.stop - p.start) // c), i) for i, (p, c) in enumerate(zip(place, node.chunks, strict=False)) if p.stop
    ]
    most, axis = max(spans, key=lambda pair: (pair[0], -pair[1]), default=(1, 0))
    return axis if most > 1 else None


def shard_from(store: Store, start: int) -> Shard:
    """The shard that begins at a sample."""
    return store.plan.shard(start // store.plan.shard_size)


# Factors ------------------------------------------------------------------------------------------------------------


def write_factors(store: Store, array: ArrayPlan, block: Any, shard: Shard) -> None:
    """Write a shard's block: a group with an array per factor. Its attributes come last and make it count."""
    path = f"{store.group.path}/{node_name(array.key)}/{shard.index}".lstrip("/")
    with writing(store.target, block.nbytes_factored):
        for name, factor in block.factors().items():
            values = as_numpy(factor)
            made = zarr.create_array(
                store.group.store, name=f"{path}/{name}", shape=values.shape, dtype=values.dtype, filters=None,
                compressors=codecs(store.target), chunks=tuple(max(n, 1) for n in values.shape), overwrite=True,
                config={"write_empty_chunks": True},
            )  # fmt: skip
            if values.size:
                made[...] = values
        about = {"block": block.meta(), "start": shard.start, "stop": shard.stop}
        zarr.open_group(store.group.store, path=path, mode="a", zarr_format=3).attrs.update(about)


def read_factors(store: Store, array: ArrayPlan, start: int, stop: int) -> Tensor:
    """The block of these samples, in factors; reads the parts of those shards that hold them."""
    from jacray_workers.blocks.block import Block

    size = store.plan.shard_size
    parts = []
    for index in range(start // size, max(-(-stop // size), start // size + 1)):
        shard = store.plan.shard(index)
        low, high = max(start, shard.start), min(stop, shard.stop)
        meta, nodes = _part(store, array, shard)
        # What is not there reads as zeros.
        if any(next(unwritten(node), None) is not None for node in nodes.values()):
            raise not_there(store, array, shard.start, shard.stop)
        factors = {
            name: _read(store, node, slice(low - shard.start, high - shard.start)) for name, node in nodes.items()
        }
        parts.append(Block.from_factors({**meta, "samples": high - low}, factors))
    return parts[0] if len(parts) == 1 else Block.cat(parts)


def _part(store: Store, array: ArrayPlan, shard: Shard) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """What is known of a shard's block, and the zarr arrays of its factors."""
    try:
        group = store.node(array.key)[str(shard.index)]
        return group.attrs["block"], dict(group.arrays())
    except KeyError:
        raise not_there(store, array, shard.start, shard.stop) from None


# Reading ------------------------------------------------------------------------------------------------------------


def read_block(store: Store, array: ArrayPlan, start: int = 0, stop: int | None = None) -> Tensor:
    """Read a range of samples of an array, or an array without samples, as a tensor.

    A block in factors comes back in factors.

    Raises:
        JobError: some of it has not been written yet.
        StorageError: some of it is lost or damaged.
    """
    stop = store.plan.samples if stop is None else stop
    if array.factored:
        return read_factors(store, array, start, stop)
    return torch.from_numpy(read_place(store, array, samples_at(array, start, stop)))


def read_place(store: Store, array: ArrayPlan, place: tuple[Any, ...]) -> np.ndarray[Any, Any]:
    """Read what slices pick of an array; every chunk that they touch must have been written."""
    return read_node(store, array, store.node(array.key), place)


def read_node(store: Store, array: ArrayPlan, node: Any, place: tuple[Any, ...]) -> np.ndarray[Any, Any]:
    """The same of an array's own node, or of the one with the parts of a sum."""
    missing = next(unwritten(node, place), None)
    if missing is not None:
        at = missing[array.axis] * node.chunks[array.axis] if array.axis >= 0 else 0
        size = node.chunks[array.axis] if array.axis >= 0 else store.plan.samples
        raise not_there(store, array, at, min(at + size, store.plan.samples))
    return _read(store, node, place)


def read_field(store: Store, name: str) -> Tensor:
    """What is known of each sample under this name."""
    node = store.group[store.fields[name]]
    if next(unwritten(node), None) is not None:
        rule = f"must hold every block of {name}, but some are lost"
        raise StorageError(store.target.results, rule, None, "take the field from where the inputs came from")
    return torch.from_numpy(_read(store, node, ...))


def _read(store: Store, node: Any, place: Any) -> np.ndarray[Any, Any]:
    """What is at a place.

    Raises:
        StorageError: the bytes are not those that were written.
    """
    try:
        return np.asarray(node[place])
    except (ValueError, OSError) as error:
        where = f"{store.target.results}/{node.path}"
        rule = "must hold what was written, but a block is damaged or cannot be read"
        raise StorageError(where, rule, Plain(str(error)), "run it again: damaged blocks are computed anew") from error


def not_there(store: Store, array: ArrayPlan, start: int, stop: int) -> JobError | StorageError:
    """The error for samples without a block: not yet, or no more."""
    what = Plain(f"samples {start} to {stop - 1}")
    if store.complete:
        rule, way_out = (
            f"must hold every block of {array.key}, but some are lost",
            "run it again: lost blocks are computed anew",
        )
        return StorageError(store.target.results, rule, what, way_out)
    rule, way_out = (
        f"holds no numbers of {array.key} yet for these",
        "wait for the job, or ask for what `written` lists",
    )
    return JobError(store.target.results, rule, what, way_out)


def is_there(store: Store, array: ArrayPlan, place: tuple[Any, ...], shard: Shard) -> bool:
    """Whether a shard's block has been written."""
    if array.factored:
        return f"{shard.index}" in store.node(array.key) and "block" in store.node(array.key)[f"{shard.index}"].attrs
    return next(unwritten(store.node(array.key), place), None) is None


def is_whole(node: Any, place: tuple[Any, ...], target: Target, sizes: Mapping[str, int]) -> bool:
    """Whether every chunk that a place touches is among the files listed, and of the size that it must have."""
    names = (f"{node.path}/{node.metadata.encode_chunk_key(at)}" for at in touched(node, place))
    if target.compression:
        return all(name in sizes for name in names)
    # Chunks at the edges are as large as the others; the checksum takes four bytes.
    size = math.prod(node.chunks) * node.dtype.itemsize + 4
    return all(sizes.get(name) == size for name in names)


def unwritten(node: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[int, ...]]:
    """The chunks that a place touches and that were never written, by their numbers along each axis."""
    chunks = list(touched(node, place))
    names = [node.metadata.encode_chunk_key(at) for at in chunks]
    for at, there in zip(chunks, sync(_exist(node.store_path, names)), strict=True):
        if not there:
            yield at


async def _exist(where: Any, names: Iterable[str]) -> list[bool]:
    gate = asyncio.Semaphore(64)

    async def one(name: str) -> bool:
        async with gate:
            return bool(await (where / name).exists())

    return await asyncio.gather(*(one(name) for name in names))


def touched(node: Any, place: tuple[Any, ...]) -> Iterator[tuple[int, ...]]:
    """The chunks that a place touches, by their numbers along each axis."""
    spans = []
    for axis, (size, chunk) in enumerate(zip(node.shape, node.chunks, strict=True)):
        at = place[axis] if axis < len(place) else slice(None)
        low, high, _ = at.indices(size) if isinstance(at, slice) else (int(at), int(at) + 1, 1)
        spans.append(range(low // chunk, -(-high // chunk)) if high > low else range(0))
    return itertools.product(*spans)


# Checksums ----------------------------------------------------------------------------------------------------------


def checksum(values: np.ndarray[Any, Any]) -> str:
    """Of an array's bytes in C order, little-endian as they are stored."""
    little = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"), copy=False)
    return f"{KIND}:{google_crc32c.value(little.reshape(-1).view(np.uint8)):08x}"


def factors_checksum(block: Any) -> str:
    """Of a block's factors, one after the other by name, and of what else makes it."""
    total = google_crc32c.value(json.dumps(block.meta(), sort_keys=True).encode())
    for _, factor in sorted(block.factors().items()):
        values = np.ascontiguousarray(as_numpy(factor))
        total = google_crc32c.extend(total, values.reshape(-1).view(np.uint8))
    return f"{KIND}:{total:08x}"


def size_of(array: ArrayPlan, value: Any) -> int:
    """Bytes of numbers as they are stored."""
    if array.factored:
        return int(value.nbytes_factored)
    return int(math.prod(value.shape) * np.dtype(array.dtype).itemsize)

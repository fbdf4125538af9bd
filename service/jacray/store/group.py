"""The zarr group of a job: made before the first shard, marked as complete after the last."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
import zarr
from jacray_workers.errors import Plain, StorageError, UserError
from jacray_workers.plan import ArrayPlan, Plan
from torch import Tensor
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, ZstdCodec
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore

from jacray.chunks import chunk_shape, dimension_names
from jacray.plans import read_plan
from jacray.store.faults import writing
from jacray.target import RESULTS, Target

FORMAT = 2
PARTS = "parts"
"""The group that holds the shards' parts of sums while a job runs."""
_UNITS = {
    "outputs": "output",
    "jacobian": "output / input",
    "mean_jacobian": "output / input",
    "weighted_gradient": "weight * output / input",
    "jvp": "output",
    "norms": "output / input",
    "singular_values": "output / input",
}
_CODECS: Mapping[str, Any] = {"zstd": ZstdCodec, "gzip": GzipCodec, "blosc": BloscCodec}


@dataclass(frozen=True)
class Store:
    """An open store. Nothing is read until it is asked for.

    Attributes:
        target: where it is.
        group: the zarr group.
        plan: how the results are computed.
        structure: for each result, its tree with array keys in place of arrays.
        fields: the nodes of what else is known of each sample, by name.
        complete: whether every block had been written when it was opened.
    """

    target: Target
    group: zarr.Group
    plan: Plan
    structure: Mapping[str, Any]
    fields: Mapping[str, str]
    complete: bool = False
    _nodes: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def arrays(self) -> dict[str, ArrayPlan]:
        """The arrays by key."""
        return {array.key: array for array in self.plan.arrays}

    def node(self, key: str) -> Any:
        """The zarr array of a key, or the group of a block in factors."""
        return self._known(node_name(key))

    def parts(self, key: str) -> Any:
        """The zarr array that holds the shards' parts of a sum, one after the other."""
        return self._known(f"{PARTS}/{node_name(key)}")

    def _known(self, path: str) -> Any:
        # Opened once: each opening reads the node's metadata, a request where the store is far away.
        if path not in self._nodes:
            found = self.group[path]
            # A chunk full of fill values is skipped otherwise, and then looks as if it had never been written.
            kept = found.with_config({"write_empty_chunks": True}) if isinstance(found, zarr.Array) else found
            self._nodes[path] = kept
        return self._nodes[path]


def create(
    target: Target,
    plan: Plan,
    structure: Mapping[str, Any],
    samples: Mapping[str, Tensor] | None = None,
    start: int = 0,
) -> Store:
    """Make an empty store with every array of the plan.

    Args:
        target: whose `results.zarr`; there must be none yet.
        plan: names, shapes and shards.
        structure: for each result, its tree with array keys in place of arrays, as plain JSON data.
        samples: what else is known of each sample, by name.
        start: the number of the first sample in its source.

    Raises:
        StorageError: it cannot be written there.
    """
    dims = dimension_names(plan.arrays)
    taken = {"sample", PARTS, *(name for names in dims.values() for name in names), *(a.key for a in plan.arrays)}
    known = {name: node_name(f"field.{name}" if name in taken else name) for name in samples or {}}
    about = {
        "format": FORMAT,
        "complete": False,
        "plan_digest": plan.digest,
        "plan": plain(plan.to_dict()),
        "structure": dict(structure),
        "fields": known,
    }
    with writing(target):
        group = zarr.create_group(_zarr_store(target), zarr_format=3)
        for array in plan.arrays:
            _create(group, array, plan, dims[array.key], target)
        _write_per_sample(group, "sample", np.arange(start, start + plan.samples, dtype=np.int64))
        for name, tensor in (samples or {}).items():
            _write_per_sample(group, known[name], as_numpy(tensor))
        # Last: a group with these is one whose arrays are all there.
        group.attrs.update({"title": "jacray results", "jacray": about})
    return Store(target, group, plan, structure, known)


def reopen(target: Target, plan: Plan) -> Store:
    """The store that an earlier run of the same job began, as it was left.

    Raises:
        StorageError: another job's results are there.
    """
    found = open_store(target, write=True)
    if found.plan.digest != plan.digest:
        rule, way_out = f"{target.results} holds another job", "choose another folder, or remove that one"
        raise StorageError("to", rule, None, way_out)
    sweep(target)
    return found


def exists(target: Target) -> bool:
    """Whether a job has made its store there."""
    try:
        return "jacray" in zarr.open_group(_zarr_store(target, read_only=True), mode="r").attrs
    except (OSError, KeyError, ValueError):
        return False


def remove(target: Target) -> None:
    """Take a job's store away, complete or not."""
    with writing(target):
        sync(_zarr_store(target).clear())


def _create(group: zarr.Group, array: ArrayPlan, plan: Plan, dims: tuple[str, ...], target: Target) -> None:
    name, about = node_name(array.key), _attributes(array)
    if array.factored:
        group.create_group(name, attributes={**about, "dims": list(array.dims), "shape": list(array.shape)})
        return
    chunks = chunk_shape(array, plan)
    how: dict[str, Any] = {
        "dtype": array.dtype,
        "compressors": codecs(target),
        "filters": None,
        "fill_value": float("nan"),  # a sample that was never written must not look like a zero
    }
    group.create_array(name, shape=array.shape, chunks=chunks, dimension_names=dims, attributes=about, **how)
    if array.axis < 0:
        shape = (plan.shard_count, *array.shape)
        group.create_array(f"{PARTS}/{name}", shape=shape, chunks=(1, *chunks), attributes=about, **how)


def codecs(target: Target) -> list[Any]:
    """What a chunk's bytes go through: compressed where that was asked for, and always with a checksum behind."""
    first = [_CODECS[target.compression]()] if target.compression else []
    return [*first, Crc32cCodec()]


def _attributes(array: ArrayPlan) -> dict[str, Any]:
    return {"result": array.name, "key": array.key, "units": _UNITS.get(array.name, "1")}


def _write_per_sample(group: zarr.Group, name: str, values: np.ndarray[Any, Any]) -> None:
    """A small array with a row per sample; under the name of its dimension it is a coordinate."""
    made = group.create_array(
        name, shape=values.shape, dtype=values.dtype, compressors=[Crc32cCodec()], config={"write_empty_chunks": True},
        dimension_names=("sample", *(f"{name}_{axis}" for axis in range(values.ndim - 1))),
    )  # fmt: skip
    made[...] = values


def open_store(target: Target, *, write: bool = False) -> Store:
    """Open a store, whether its job has ended or not.

    Args:
        target: whose `results.zarr`.
        write: for a worker of the job, which writes its blocks.

    Raises:
        UserError: there is none, or another version of jacray wrote it.
    """
    place = target.results
    try:
        group = zarr.open_group(_zarr_store(target, read_only=not write), mode="r+" if write else "r")
        found: Any = group.attrs["jacray"]
        if found["format"] != FORMAT:
            raise UserError(place, f"must have format {FORMAT}", found["format"], "use the jacray that wrote it")
        plan = read_plan(found["plan"])
        return Store(target, group, plan, found["structure"], found["fields"], found["complete"])
    except (OSError, KeyError, TypeError) as error:
        raise UserError(place, "must be a store that jacray wrote", Plain(f"{type(error).__name__}: {error}")) from None


def finish(store: Store) -> Store:
    """Mark a store as complete; what was only needed on the way goes."""
    with writing(store.target):
        if not store.complete:
            about: Any = store.group.attrs["jacray"]
            store.group.attrs["jacray"] = {**about, "complete": True}
        if PARTS in store.group:
            del store.group[PARTS]
        sweep(store.target)
    return open_store(store.target)


def sweep(target: Target) -> None:
    """Remove the files that writers who were killed have left half-written, of a store that nobody writes to.

    Object stores show no object before it is whole.
    """
    if target.path is None:
        return
    inside = (Path(folder, n) for folder, _, names in os.walk(target.path / RESULTS) for n in names)
    half = (path for path in inside if path.suffix == ".partial")
    for path in itertools.chain(half, target.begun()):
        with contextlib.suppress(OSError):  # read-only now, perhaps: the next run sweeps again
            path.unlink(missing_ok=True)


def _zarr_store(target: Target, *, read_only: bool = False) -> Any:
    if target.path is not None:
        return LocalStore(target.path / RESULTS, read_only=read_only)
    return FsspecStore.from_url(target.results, storage_options=dict(target.options), read_only=read_only)


def node_name(key: str) -> str:
    """A key as the name of a zarr node: no slashes, no dots alone, no more than a file name may hold."""
    name = quote(key, safe=" .:,;=+@()[]{}*")
    if len(name) > 200:
        name = f"{name[:150]}~{hashlib.sha256(key.encode()).hexdigest()[:32]}"
    return name.replace(".", "%2E") if set(name) == {"."} or name.startswith("__") else name


def as_numpy(value: Any, dtype: str | None = None) -> np.ndarray[Any, Any]:
    """A tensor's numbers; bfloat16, which numpy lacks, as float32."""
    tensor = torch.as_tensor(value).detach().cpu()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    array: np.ndarray[Any, Any] = tensor.numpy()
    return array if dtype is None else array.astype(dtype, copy=False)


def plain(value: Any) -> Any:
    """JSON without infinities and NaN, which it does not have: they become texts."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

"""The zarr group of a job: its layout, its blocks, and what it says of itself.

The group opens in xarray as it is. Blocks that are kept in factors are groups of
their factors; everything else is one array per key of the plan.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
import zarr
from jacray_workers.errors import Plain, UserError
from jacray_workers.plan import ArrayPlan, Plan
from torch import Tensor

from jacray.chunks import chunk_shape, dimension_names
from jacray.plans import read_plan

FORMAT = 1
_UNITS = {
    "outputs": "output",
    "jacobian": "output / input",
    "mean_jacobian": "output / input",
    "weighted_gradient": "weight * output / input",
    "jvp": "output",
    "norms": "output / input",
    "singular_values": "output / input",
}


@dataclass(frozen=True)
class Store:
    """An open store. Nothing is read until it is asked for.

    Attributes:
        group: the zarr group.
        plan: how the results were computed.
        structure: for each result, its tree with array keys in place of arrays.
        fields: the nodes of what else is known of each sample, by name.
    """

    group: zarr.Group
    plan: Plan
    structure: Mapping[str, Any]
    fields: Mapping[str, str]

    @property
    def arrays(self) -> dict[str, ArrayPlan]:
        """The arrays by key."""
        return {array.key: array for array in self.plan.arrays}

    def node(self, key: str) -> Any:
        """The zarr array of a key, or the group of a block in factors."""
        return self.group[node_name(key)]


def create(
    path: Path,
    plan: Plan,
    structure: Mapping[str, Any],
    samples: Mapping[str, Tensor] | None = None,
    start: int = 0,
) -> Store:
    """Make an empty store with every array of the plan.

    Args:
        path: the group's folder; must not hold one.
        plan: names, shapes and shards.
        structure: for each result, its tree with array keys in place of arrays, as plain JSON data.
        samples: what else is known of each sample, by name.
        start: the number of the first sample in its source.
    """
    group = zarr.create_group(path, zarr_format=3)
    dims = dimension_names(plan.arrays)
    taken = {"sample", *(name for names in dims.values() for name in names), *(a.key for a in plan.arrays)}
    known = {name: node_name(f"field.{name}" if name in taken else name) for name in samples or {}}
    group.attrs.update(
        {
            "title": "jacray results",
            "jacray": {
                "format": FORMAT,
                "plan_digest": plan.digest,
                "plan": plain(plan.to_dict()),
                "structure": dict(structure),
                "fields": known,
            },
        }
    )
    for array in plan.arrays:
        if not array.factored:
            _create_array(group, array, plan, dims[array.key])
    _write_per_sample(group, "sample", np.arange(start, start + plan.samples, dtype=np.int64))
    for name, tensor in (samples or {}).items():
        _write_per_sample(group, known[name], _numpy(tensor))
    return Store(group, plan, structure, known)


def _create_array(group: zarr.Group, array: ArrayPlan, plan: Plan, dims: tuple[str, ...]) -> None:
    group.create_array(
        node_name(array.key),
        shape=array.shape,
        chunks=chunk_shape(array, plan),
        dtype=array.dtype,
        compressors=None,
        filters=None,
        fill_value=float("nan"),  # a sample that was never written must not look like a zero
        dimension_names=dims,
        attributes=_attributes(array),
    )


def _attributes(array: ArrayPlan) -> dict[str, Any]:
    return {"result": array.name, "key": array.key, "units": _UNITS.get(array.name, "1")}


def _write_per_sample(group: zarr.Group, name: str, values: np.ndarray[Any, Any]) -> None:
    """A small array with a row per sample; under the name of its dimension it is a coordinate."""
    made = group.create_array(
        name, shape=values.shape, dtype=values.dtype, compressors=None,
        dimension_names=("sample", *(f"{name}_{axis}" for axis in range(values.ndim - 1))),
    )  # fmt: skip
    made[...] = values


def write_block(store: Store, array: ArrayPlan, value: Any, start: int = 0) -> None:
    """Write one range of samples of an array, or an array without samples.

    Args:
        store: where to.
        array: which array.
        value: a tensor of the range's shape, or for a factored array a block.
        start: the range's first sample.
    """
    if array.factored:
        _write_factors(store, array, value)
        return
    node = store.node(array.key)
    if array.axis < 0:
        node[...] = _numpy(value, array.dtype)
        return
    stop = start + value.shape[array.axis]
    step = max(node.chunks[array.axis], 1)
    before = (slice(None),) * array.axis
    for low in range(start, stop, step):
        high = min(low + step, stop)
        node[(*before, slice(low, high))] = _numpy(value.narrow(array.axis, low - start, high - low), array.dtype)


def read_block(store: Store, array: ArrayPlan, start: int = 0, stop: int | None = None) -> Tensor:
    """Read a range of samples of an array, or an array without samples, as a tensor.

    A block in factors comes back in factors.
    """
    node = store.node(array.key)
    stop = store.plan.samples if stop is None else stop
    if array.factored:
        return _read_factors(node, start, stop)
    if array.axis < 0:
        return torch.from_numpy(np.asarray(node[...]))
    return torch.from_numpy(np.asarray(node[(*(slice(None),) * array.axis, slice(start, stop))]))


def read_field(store: Store, name: str) -> Tensor:
    """What is known of each sample under this name."""
    node: Any = store.group[store.fields[name]]
    return torch.from_numpy(np.asarray(node[...]))


def _write_factors(store: Store, array: ArrayPlan, block: Any) -> None:
    """A group with an array per factor; each factor has the samples first."""
    group = store.group.create_group(node_name(array.key))
    group.attrs.update({**_attributes(array), "block": block.meta(), "dims": list(array.dims)})
    for name, factor in block.factors().items():
        values = _numpy(factor)
        per_sample = max(math.prod(values.shape[1:]) * values.itemsize, 1)
        rows = max(1, min(len(values), store.plan.shard_size, (1 << 26) // per_sample))
        made = group.create_array(
            name, shape=values.shape, dtype=values.dtype, compressors=None,
            chunks=(rows, *(max(n, 1) for n in values.shape[1:])),
        )  # fmt: skip
        made[...] = values


def _read_factors(group: zarr.Group, start: int, stop: int) -> Tensor:
    from jacray_workers.blocks.block import Block

    meta: Any = group.attrs["block"]
    factors = {name: np.asarray(part[start:stop]) for name, part in group.arrays()}
    return Block.from_factors({**meta, "samples": stop - start}, factors)


def open_store(path: Path) -> Store:
    """Open a store for reading.

    Raises:
        UserError: there is none, or another version of jacray wrote it.
    """
    try:
        group = zarr.open_group(path, mode="r")
        found: Any = group.attrs["jacray"]
        if found["format"] != FORMAT:
            raise UserError(str(path), f"must have format {FORMAT}", found["format"], "use the jacray that wrote it")
        return Store(group, read_plan(found["plan"]), found["structure"], found["fields"])
    except (FileNotFoundError, KeyError, TypeError) as error:
        raise UserError(str(path), "must be a store that jacray wrote", Plain(str(error))) from None


def node_name(key: str) -> str:
    """A key as the name of a zarr node: no slashes, no dots alone, no more than a file name may hold."""
    name = quote(key, safe=" .:,;=+@()[]{}*")
    if len(name) > 200:
        name = f"{name[:150]}~{hashlib.sha256(key.encode()).hexdigest()[:32]}"
    return name.replace(".", "%2E") if set(name) == {"."} or name.startswith("__") else name


def _numpy(value: Any, dtype: str | None = None) -> np.ndarray[Any, Any]:
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

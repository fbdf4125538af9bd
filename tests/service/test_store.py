"""The zarr store: layout, named dimensions, blocks written shard by shard, and structures that come back."""

from __future__ import annotations

import math
from collections import namedtuple

import numpy as np
import pytest
import torch
import xarray
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from jacray import store
from jacray.chunks import CHUNK_BYTES, LARGE_BYTES, chunk_shape, dimension_names
from jacray.target import Target
from jacray.trees import from_json, to_json
from jacray_workers.blocks.block import Block
from jacray_workers.blocks.terms import Outer
from jacray_workers.errors import JobError, UserError
from jacray_workers.plan import ArrayPlan, Candidate, Plan

from tests.door import compute


def array(key, shape, dims, axis=0, dtype="float32", factored=False, leaf=0):
    return ArrayPlan(key.partition(".")[0], key, 0, leaf, shape, dtype, dims, axis, factored)


def plan(*arrays, samples=10, shard_size=4):
    return Plan(
        method="reverse",
        reason="asked for",
        candidates=(Candidate("reverse", seconds=math.inf), Candidate("chain", refused="no cut pays")),
        samples=samples,
        rows=3,
        chunk_size=2,
        row_chunk=3,
        shard_size=shard_size,
        arrays=arrays,
        bytes_out=0,
        peak_bytes=0,
        budget_bytes=0,
        device="cpu",
        dtype="float32",
        form="dense",
        seed=0,
        notes=("a note",),
    )


JACOBIAN = array("jacobian", (10, 3, 2), ("sample", "output_0", "input_0"))
MANY = array("weighted_gradient", (4, 10, 2), ("cotangent", "sample", "input_0"), axis=1)
SUM = array("mean_jacobian", (3, 2), ("output_0", "input_0"), axis=-1, dtype="float64")


def structure(*arrays):
    return {a.name: {"key": a.key} for a in arrays}


def made(path, *arrays, **fields):
    p = plan(*arrays)
    return store.create(Target(str(path)), p, structure(*arrays), **fields)


def opened_again(path):
    return store.open_store(Target(str(path)))


# Layout ---------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    samples=st.integers(1, 10**6),
    inner=st.lists(st.integers(1, 5000), max_size=3),
    shard=st.integers(1, 10**6),
    lead=st.integers(0, 3),
)
def test_chunks_are_bounded_and_never_shared_by_two_shards(samples, inner, shard, lead):
    shape = (*([lead] if lead else []), samples, *inner)
    a = array("jacobian", shape, tuple(f"d{i}" for i in range(len(shape))), axis=1 if lead else 0)
    p = plan(a, samples=samples, shard_size=min(shard, samples))
    chunks = chunk_shape(a, p)
    assert all(1 <= c <= n for c, n in zip(chunks, shape, strict=True))
    assert p.shard_size % chunks[a.axis] == 0
    assert math.prod(chunks) * 4 <= LARGE_BYTES


def test_small_arrays_have_a_chunk_per_shard_and_large_samples_are_cut():
    assert chunk_shape(JACOBIAN, plan(JACOBIAN)) == (4, 3, 2)
    assert chunk_shape(MANY, plan(MANY)) == (4, 4, 2)
    assert chunk_shape(SUM, plan(SUM)) == (3, 2)
    wide = array("jacobian", (8, 1000, 1_000_000), ("sample", "output_0", "input_0"))
    chunks = chunk_shape(wide, plan(wide, samples=8))
    assert chunks[0] == 1
    assert math.prod(chunks) * 4 <= CHUNK_BYTES
    prime = array("jacobian", (10007, 2500), ("sample", "input_0"))
    assert chunk_shape(prime, plan(prime, samples=10007, shard_size=10007)) == (10007, 2500)


def test_a_dimension_has_one_size_and_stands_once_in_an_array():
    arrays = [
        array("outputs", (10, 3), ("sample", "output_0")),
        array("jacobian", (10, 3, 2, 2), ("sample", "output_0", "output_0", "output_0")),
        array("jvp", (10, 5), ("sample", "output_0")),
    ]
    names = dimension_names(arrays)
    sizes = {}
    for a in arrays:
        assert len(set(names[a.key])) == len(a.shape)
        for name, size in zip(names[a.key], a.shape, strict=True):
            assert sizes.setdefault(name, size) == size
    assert names["outputs"] == ("sample", "output_0")
    assert names["jvp"] == ("sample", "jvp.output_0")


# Blocks ---------------------------------------------------------------------------------------------------------


def test_blocks_written_shard_by_shard_read_back_whole_and_in_part(tmp_path):
    values = {
        "jacobian": torch.arange(60.0).reshape(10, 3, 2),
        "weighted_gradient": torch.arange(80.0).reshape(4, 10, 2),
        "mean_jacobian": torch.arange(6.0, dtype=torch.float64).reshape(3, 2),
    }
    opened = made(tmp_path, JACOBIAN, MANY, SUM)
    for shard in [opened.plan.shard(i) for i in (2, 0, 1)]:
        for a in (JACOBIAN, MANY):
            part = values[a.key].narrow(a.axis, shard.start, shard.stop - shard.start)
            store.write_block(opened, a, part, shard.start)
    store.write_block(opened, SUM, values["mean_jacobian"])
    again = opened_again(tmp_path)
    for key, value in values.items():
        assert torch.equal(store.read_block(again, again.arrays[key]), value)
    assert torch.equal(store.read_block(again, MANY, 3, 6), values["weighted_gradient"][:, 3:6])
    node = zarr.open_group(tmp_path / "results.zarr", mode="r")["jacobian"]
    assert node.chunks == (4, 3, 2)
    assert [type(codec).__name__ for codec in node.compressors] == ["Crc32cCodec"]  # a checksum, no compression


def test_what_was_never_written_is_told_and_looks_like_no_zero_elsewhere(tmp_path):
    opened = made(tmp_path, JACOBIAN)
    store.write_block(opened, JACOBIAN, torch.ones(4, 3, 2), 0)
    assert bool((store.read_block(opened, JACOBIAN, 0, 4) == 1).all())
    with pytest.raises(JobError, match="holds no numbers of jacobian yet for these; got samples 4 to 7"):
        store.read_block(opened, JACOBIAN)
    seen = xarray.open_zarr(tmp_path / "results.zarr", consolidated=False).jacobian
    assert bool(seen[4:].isnull().all())


def test_a_block_of_nan_counts_as_written(tmp_path):
    opened = made(tmp_path, JACOBIAN)
    store.write_block(opened, JACOBIAN, torch.full((10, 3, 2), float("nan")))
    assert bool(store.read_block(opened, JACOBIAN).isnan().all())


def test_bfloat16_is_kept_as_float32(tmp_path):
    opened = made(tmp_path, JACOBIAN)
    store.write_block(opened, JACOBIAN, torch.ones(10, 3, 2, dtype=torch.bfloat16))
    assert store.read_block(opened, JACOBIAN).dtype == torch.float32


def test_a_block_in_factors_is_kept_in_factors(tmp_path):
    x = torch.randn(10, 5, generator=torch.Generator().manual_seed(0))
    model = torch.nn.Linear(5, 2, bias=False)
    block = compute(model, x, wrt="params", form="factors", method="layerwise").jacobian["weight"]
    assert any(isinstance(term, Outer) for term in block.terms)
    weight = array("jacobian.w", (10, 2, 2, 5), ("sample", "output_0", "w_0", "w_1"), factored=True)
    opened = made(tmp_path, weight)
    for shard in opened.plan.shards():
        store.write_block(opened, weight, block[shard.start : shard.stop], shard.start)
    again = opened_again(tmp_path)
    found = store.read_block(again, weight)
    assert isinstance(found, Block)
    assert torch.equal(found.dense(), block.dense())
    part = store.read_block(again, weight, 2, 5)
    assert isinstance(part, Block)
    assert torch.equal(part.dense(), block.dense()[2:5])
    assert set(xarray.open_zarr(tmp_path / "results.zarr", consolidated=False).data_vars) == set()


# Seen from outside ----------------------------------------------------------------------------------------------


def test_xarray_opens_the_group_with_named_dimensions_and_numbered_samples(tmp_path):
    target = torch.arange(10)
    opened = made(tmp_path, JACOBIAN, MANY, SUM, samples={"target": target, "output_0": target}, start=5)
    store.write_block(opened, JACOBIAN, torch.arange(60.0).reshape(10, 3, 2))
    found = xarray.open_zarr(tmp_path / "results.zarr", consolidated=False)
    assert found.jacobian.dims == ("sample", "output_0", "input_0")
    assert found.sample.values.tolist() == list(range(5, 15))
    assert found.jacobian.sel(sample=6).values.tolist() == [[6.0, 7.0], [8.0, 9.0], [10.0, 11.0]]
    assert found.target.values.tolist() == list(range(10))
    assert found.jacobian.attrs["units"] == "output / input"
    assert found.attrs["jacray"]["plan_digest"] == opened.plan.digest
    assert set(opened.fields) == {"target", "output_0"}
    assert torch.equal(store.read_field(opened, "output_0"), target)


@pytest.mark.parametrize(
    "key", ["jacobian.a/b", "jacobian..", "jacobian.é", "jacobian." + "x" * 400, "jacobian.a b:output"]
)
def test_any_name_can_be_a_key(tmp_path, key):
    odd = array(key, (10, 2), ("sample", "x_0"))
    other = array(key + "y", (10, 2), ("sample", "x_0"))
    opened = made(tmp_path, odd, other)
    store.write_block(opened, odd, torch.ones(10, 2))
    store.write_block(opened, other, torch.zeros(10, 2))
    again = opened_again(tmp_path)
    assert bool((store.read_block(again, again.arrays[key]) == 1).all())
    assert set(xarray.open_zarr(tmp_path / "results.zarr", consolidated=False).dims) == {"sample", "x_0"}


def test_the_plan_comes_back_as_it_was(tmp_path):
    opened = made(tmp_path, JACOBIAN, SUM)
    again = opened_again(tmp_path).plan
    assert again == opened.plan
    assert again.digest == opened.plan.digest


@pytest.mark.parametrize("kind", ["missing", "foreign", "newer"])
def test_what_is_no_store_of_ours_is_refused(tmp_path, kind):
    path = tmp_path / "results.zarr"
    if kind == "foreign":
        zarr.create_group(path)
    if kind == "newer":
        made(tmp_path, JACOBIAN)
        group = zarr.open_group(path)
        group.attrs["jacray"] = {**group.attrs["jacray"], "format": 99}
    with pytest.raises(UserError) as caught:
        opened_again(tmp_path)
    assert str(path) in caught.value.argument
    assert ("must have format 2" if kind == "newer" else "must be a store that jacray wrote") in caught.value.rule


# Structures -----------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "first second")


def test_structures_come_back_with_their_containers():
    tree = {"a": [np.float32(1), None, (np.float32(2), {"b": np.float32(3)})]}
    described = to_json(tree, lambda value: f"k{int(value)}")
    assert from_json(described, lambda key: key) == {"a": ["k1", None, ("k2", {"b": "k3"})]}


def test_named_tuples_become_dicts_by_name():
    described = to_json(Pair(np.float32(1), [np.float32(2)]), lambda value: f"k{int(value)}")
    assert from_json(described, lambda key: key) == {"first": "k1", "second": ["k2"]}

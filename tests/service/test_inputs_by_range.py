"""Runs whose inputs are many: nobody holds them all, and the numbers are those of inputs in memory."""

from __future__ import annotations

import json
import subprocess
import sys

import jacray
import numpy as np
import pytest
import torch
from jacray.spec import read_run
from jacray.work import make
from jacray_workers.models import as_model
from jacray_workers.sources import ranged
from jacray_workers.sources.ranged import Rows

from tests.hostile import command
from tests.workers import source_files

WIDTH = 16  # 64 bytes a sample: each begins where a product's vectors like it, whatever it was cut from
N = 3000


def net(width, classes=3):
    return (
        f"model: {{kind: layers, layers: [{{kind: Flatten}}, {{kind: Linear, in_features: {width}, out_features: 8}}, "
        f"{{kind: Tanh}}, {{kind: Linear, in_features: 8, out_features: {classes}}}]}}\n"
    )


REQUEST = "{returns: [jacobian, weighted_gradient], weights: [1, 2, 3], method: reverse, chunk_size: 50}"


def spec(inputs, request=REQUEST):
    return (
        f"{net(WIDTH)}inputs: {json.dumps(inputs)}\nrequest: {request}\n"
        "cluster: {address: inline, shard_size: 100}\noutput: {path: whole}\n"
    )


@pytest.fixture
def far(monkeypatch):
    """From here on inputs of more than some bytes are many; the ranges that are read."""
    read = []
    real = Rows.read

    def watched(self, start, stop):
        read.append(stop - start)
        return real(self, start, stop)

    def begin():
        monkeypatch.setattr(ranged, "HASHED_BYTES", 4096)
        monkeypatch.setattr(Rows, "read", watched)
        return read

    return begin


def write(base, kind):
    x = np.random.default_rng(0).standard_normal((N, WIDTH)).astype(np.float32)
    y = np.arange(N) % 3
    if kind == "npy":
        np.save(base / "x.npy", x)
        return {"kind": "npy", "path": "x.npy"}
    if kind == "npz":
        np.savez(base / "x.npz", x=x, y=y)
        return {"kind": "npz", "path": "x.npz", "arrays": "x", "fields": {"target": "y"}}
    if kind == "zarr":
        import zarr

        group = zarr.create_group(base / "x.zarr")
        group.create_array("x", data=x, chunks=(64, WIDTH))
        group.create_array("y", data=y, chunks=(64,))
        return {"kind": "zarr", "path": "x.zarr", "arrays": "x", "fields": {"target": "y"}}
    import pyarrow as pa
    from pyarrow import parquet

    lists = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), WIDTH)
    parquet.write_table(pa.table({"x": lists, "y": y}), base / "x.parquet", row_group_size=128)
    return {"kind": "parquet", "path": "x.parquet", "columns": "x", "fields": {"target": "y"}}


@pytest.mark.parametrize("kind", ["npy", "npz", "zarr", "parquet"])
def test_a_run_reads_its_shards_and_has_the_same_bits(tmp_path, monkeypatch, far, kind):
    monkeypatch.chdir(tmp_path)
    inputs = write(tmp_path, kind)
    request = "{returns: [jacobian, weighted_gradient], method: reverse, chunk_size: 50, weights: WEIGHTS}"
    chosen = "[1, 2, 3]" if kind == "npy" else "{kind: one_hot, of: target}"
    (tmp_path / "s.yaml").write_text(spec(inputs, request.replace("WEIGHTS", chosen)))
    code, _, err = command("run", "s.yaml")
    assert code == 0, err
    read = far()
    code, _, err = command("run", "s.yaml", "output.path=far")
    assert code == 0, err
    assert max(read) <= 128  # shards, and what the planner tries; in memory it would be all of them at once
    assert sum(read) >= N
    whole, parts = jacray.load("whole"), jacray.load("far")
    for name in ("jacobian", "weighted_gradient"):
        np.testing.assert_array_equal(np.asarray(getattr(parts, name)), np.asarray(getattr(whole, name)))
    assert parts.receipt["verified"]["passed"]
    if kind != "npy":
        np.testing.assert_array_equal(np.asarray(parts.fields["target"]), np.arange(N) % 3)
    assert (tmp_path / "far" / "report.html").stat().st_size > 10_000


def test_a_plan_and_an_export_read_a_few_samples(tmp_path, monkeypatch, far):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(spec(write(tmp_path, "npy")))
    read = far()
    code, out, err = command("plan", "s.yaml")
    assert (code, err) == (0, "")
    assert "3,000" in out
    code, _, err = command("export", "s.yaml", "--to", "net.safetensors")
    assert (code, err) == (0, "")
    assert 0 < max(read) <= 128


def test_the_same_run_again_goes_on_and_another_file_is_another_run(tmp_path, monkeypatch, far):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(spec(write(tmp_path, "npy")))
    far()
    first = make(read_run("s.yaml", [])).digests["inputs"]
    assert make(read_run("s.yaml", [])).digests["inputs"] == first
    x = np.load("x.npy")
    x[7] += 1
    np.save("x.npy", x)
    assert make(read_run("s.yaml", [])).digests["inputs"] != first


@pytest.mark.parametrize("kind", ["npy", "npz", "zarr", "parquet", "images", "datasets", "csv", "safetensors"])
def test_all_fields_are_those_of_the_whole(tmp_path, monkeypatch, kind):
    from tests.workers.test_source_rows import opened

    write_one = next(f for f in source_files.FILES if f.__name__.removesuffix("_group").removesuffix("_file") == kind)
    found = opened(tmp_path, write_one(tmp_path))
    expected = found.whole().fields
    monkeypatch.setattr(ranged, "HASHED_BYTES", found.nbytes // 2)  # two or three pieces
    fields = found.all_fields()
    assert fields.keys() == expected.keys()
    assert all(torch.equal(fields[name], expected[name]) for name in fields)
    if "target" not in fields:
        return
    # Apart from the inputs, where the kind can.
    if kind != "csv":
        monkeypatch.setattr(type(found.reader), "read", None)
        assert torch.equal(found.all_fields()["target"], expected["target"])


def test_several_sources_give_all_their_fields(tmp_path):
    from tests.workers.test_source_rows import opened

    named = {"a": source_files.npz(tmp_path), "b": source_files.npy(tmp_path)}
    found = opened(tmp_path, named)
    assert found.all_fields()["target"].tolist() == source_files.LABELS.tolist()


def test_shapes_are_refused_before_any_worker_has_seen_them(tmp_path, monkeypatch, far):
    from jacray.executors.inline import InlineExecutor

    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.zeros((N, 5), np.float32))
    np.save("y.npy", np.zeros((N - 1, 16), np.float32))
    far()
    monkeypatch.setattr(InlineExecutor, "keep", None)
    for inputs, said in (
        ({"kind": "npy", "path": "x.npy"}, "5"),
        ({"x": {"kind": "npy", "path": "x.npy"}, "y": {"kind": "npy", "path": "y.npy"}}, "same batch size"),
    ):
        (tmp_path / "s.yaml").write_text(spec(inputs))
        code, _, err = command("run", "s.yaml")
        assert code == 1
        assert said in err
        assert len(err.splitlines()) == 1


PROGRAM = """
import resource, sys, threading, time
from pathlib import Path
from jacray.cli import main
import torch, numpy
free = [0]
def watch():
    while True:
        free[0] = max(free[0], int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
        time.sleep(0.02)
threading.Thread(target=watch, daemon=True).start()
code = main(["run", "s.yaml", *sys.argv[1:]])
print("peak", free[0], code)
"""


@pytest.mark.slow
def test_a_file_larger_than_the_memory_allowed_is_run(tmp_path):
    """3 GB of inputs, whose process never holds more than 1.2 GB, torch and the results included."""
    rows, width = 750_000, 1024
    out = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (rows, width))
    rng = np.random.default_rng(0)
    for start in range(0, rows, 10_000):
        out[start : start + 10_000] = rng.standard_normal((10_000, width), np.float32)
    del out
    (tmp_path / "s.yaml").write_text(
        f"{net(width)}inputs: {{kind: npy, path: x.npy}}\n"
        "request: {returns: [outputs, norms], memory_budget: 256MiB}\n"
        "cluster: {address: inline}\noutput: {path: run}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True, timeout=280, check=True
    )
    last = done.stdout.splitlines()[-1].split()
    assert last[0] == "peak", done.stderr
    assert int(last[1]) < 1.2e9
    run = jacray.load(tmp_path / "run")
    assert run.receipt["verified"]["passed"]
    module = as_model(read_run(str(tmp_path / "s.yaml"), []).spec.model)
    x = torch.from_numpy(np.load(tmp_path / "x.npy", mmap_mode="r")[[0, rows // 2, rows - 1]].copy())
    for place, sample in zip((0, rows // 2, rows - 1), x, strict=True):
        y = torch.as_tensor(np.asarray(run.outputs[place]))
        torch.testing.assert_close(y, module(sample[None])[0].detach(), rtol=1e-5, atol=1e-6)

"""Jobs whose workers write: the same numbers as in memory, readable meanwhile, damage found, full disks told."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jacray
import numpy as np
import pytest
import torch
from jacray import store
from jacray.store import StoredArray
from jacray.target import Target, as_target
from jacray_workers import sources
from jacray_workers.blocks.block import Block
from jacray_workers.errors import JobError, StorageError
from jacray_workers.models import as_model
from jacray_workers.planning import ladder, sizing
from jacray_workers.sources import ranged
from jacray_workers.sources.loaded import Loaded
from jacray_workers.sources.ranged import Rows
from jacray_workers.sources.specs import Npy, Safetensors
from safetensors.torch import save_file
from torch.utils import _pytree as pytree

ROOT = Path(__file__).parents[2]
MODEL = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
X = torch.randn(21, 6, generator=torch.Generator().manual_seed(0))
K = torch.randn(4, 21, 3, generator=torch.Generator().manual_seed(1))
CASES = {
    "inputs": {"returns": ["jacobian", "outputs", "gram", "ntk", "weighted_gradient"], "weights": K},
    "params": {"wrt": "params", "returns": ["jacobian", "weighted_gradient"], "weights": K, "form": "dense"},
    "factors": {"wrt": "params", "form": "factors", "method": "layerwise"},
}


def dense(value):
    return value.dense() if isinstance(value, Block | StoredArray) else value


@pytest.mark.parametrize("case", CASES)
def test_a_job_that_writes_gives_the_bits_of_one_that_does_not(client, case, tmp_path):
    asked = {"method": "reverse", **CASES[case]}
    memory = client.submit(MODEL, X, **asked).result()
    stored = client.submit(MODEL, X, to=tmp_path / "run", **asked).result()
    for name in memory.names:
        wanted, found = (
            pytree.tree_leaves(getattr(r, name), is_leaf=lambda v: isinstance(v, Block)) for r in (memory, stored)
        )
        assert len(wanted) == len(found)
        for a, b in zip(wanted, found, strict=True):
            assert torch.equal(dense(a), dense(b)), name
    again = jacray.load(tmp_path / "run")
    assert again.complete
    assert again.receipt["plan_digest"] == stored.plan.digest
    assert list(store.damages(store.open_store(as_target(tmp_path / "run")))) == []
    left = [p for p in (tmp_path / "run").rglob("*") if p.suffix == ".partial" or p.name == "_parts"]
    assert left == []


@pytest.mark.parametrize("url", ["memory://jacray-test/run", "local://{}/run"])
def test_a_url_that_fsspec_knows_takes_the_results_too(inline_client, tmp_path, url):
    target = Target(url.format(tmp_path), {"auto_mkdir": True} if url.startswith("local") else {})
    result = inline_client.submit(MODEL, X, to=target, method="reverse").result()
    assert torch.equal(result.jacobian, jacray.jacobian(MODEL, X, method="reverse", chunk_size=result.plan.chunk_size))
    assert store.open_store(target).complete


def test_a_sample_larger_than_a_shard_is_written_by_rows(inline_client, tmp_path, monkeypatch):
    model = torch.nn.Linear(6, 3)  # of its own: plans are kept by model
    whole = inline_client.submit(model, X, method="reverse").result().jacobian
    monkeypatch.setattr(sizing, "SHARD_BYTES", 40)
    result = inline_client.submit(model, X, to=tmp_path / "run", method="reverse").result()
    assert result.plan.row_cuts == (0, 1, 2, 3)
    assert result.arrays["jacobian"].chunks == (1, 1, 6)
    torch.testing.assert_close(result.jacobian, whole)
    assert result.written == [(0, 21)]


def test_what_is_small_is_a_setting(inline_client, tmp_path):
    target = Target(str(tmp_path / "run"), small=100)
    result = inline_client.submit(MODEL, X, to=target, method="reverse").result()
    assert isinstance(result.jacobian, StoredArray)
    found = jacray.load(tmp_path / "run")
    assert isinstance(found.jacobian, torch.Tensor)
    assert torch.equal(found.jacobian, result.jacobian.dense())
    assert isinstance(jacray.load(target).jacobian, StoredArray)
    assert isinstance(jacray.load(tmp_path / "run", small=0).jacobian, StoredArray)
    with pytest.raises(jacray.RequestError, match="small: must be a number of bytes"):
        jacray.load(tmp_path / "run", small=-1)


def test_stored_arrays_are_indexed_as_tensors_are(inline_client, tmp_path):
    result = inline_client.submit(MODEL, X, to=tmp_path / "run", **CASES["inputs"]).result()
    for key in ("jacobian", "weighted_gradient", "gram"):
        lazy = result.arrays[key]
        whole = lazy.dense()
        assert (lazy.shape, lazy.dtype, len(lazy)) == (whole.shape, whole.dtype, len(whole))
        assert torch.equal(torch.as_tensor(lazy), whole)
        for index in (0, -1, slice(1, 3), (slice(None), 2), (..., 1), (slice(0, 4, 2), slice(1, None)), slice(2, 2)):
            assert torch.equal(lazy[index], whole[index]), (key, index)
        with pytest.raises(IndexError):
            lazy[len(whole)]
        with pytest.raises(IndexError):
            lazy[None]
    jacobian = result.arrays["jacobian"]
    assert torch.equal(jacobian[[7, 2, 3]], jacobian.dense()[[7, 2, 3]])
    assert torch.equal(torch.cat(list(jacobian.batches(4))), jacobian.dense())
    assert torch.equal(
        result.arrays["weighted_gradient"].at(2)[3:5], result.arrays["weighted_gradient"].dense()[2, 3:5]
    )


GO = threading.Event()


class Slow(torch.nn.Linear):
    """Waits for the test at samples of fives."""

    def forward(self, x):
        if bool((x.detach() == 5).any()):
            GO.wait(60)
        return super().forward(x)


def test_a_run_can_be_read_while_it_is_computed(tmp_path):
    x = torch.zeros(12, 6)
    x[9:] = 5
    with jacray.Client("inline", workers=1, shard_size=3) as client:
        GO.set()
        model = Slow(6, 3)
        job = client.submit(model, x, to=tmp_path / "run", method="backward_loop", verify=False, chunk_size=3)
        GO.clear()
        found = jacray.load(tmp_path / "run")
        while len(found.written) == 0 and not job.status().finished:
            found = jacray.load(tmp_path / "run")
        assert "unfinished" in repr(found) or found.complete
        if not found.complete:
            start, stop = found.written[0]
            assert torch.equal(found.jacobian[start:stop], model.weight.detach().expand(stop - start, 3, 6))
            with pytest.raises(JobError, match="holds no numbers of jacobian yet for these"):
                found.jacobian[9:12]
            with pytest.raises(JobError, match="receipt: is written when a run has finished"):
                found.receipt  # noqa: B018
        GO.set()
        job.result()
    assert jacray.load(tmp_path / "run").written == [(0, 12)]


# Faults -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["truncated", "flipped", "lost"])
def test_a_damaged_block_is_found_and_never_read_as_numbers(inline_client, tmp_path, harm):
    result = inline_client.submit(MODEL, X, to=tmp_path / "run", method="reverse").result()
    chunk = sorted(p for p in (tmp_path / "run/results.zarr/jacobian/c").rglob("*") if p.is_file())[1]
    data = bytearray(chunk.read_bytes())
    if harm == "lost":
        chunk.unlink()
    else:
        data[7] ^= 1
        chunk.write_bytes(bytes(data) if harm == "flipped" else bytes(data[:-9]))
    opened = store.open_store(as_target(tmp_path / "run"))
    shard = result.plan.shard(1)
    assert [(d.key, d.start, d.stop, d.lost) for d in store.damages(opened)] == [
        ("jacobian", shard.start, shard.stop, harm == "lost")
    ]
    with pytest.raises(StorageError, match="lost" if harm == "lost" else "damaged"):
        jacray.load(tmp_path / "run").arrays["jacobian"][shard.start]


def test_what_a_shard_wrote_is_verified_by_its_checksum(tmp_path):
    from jacray.outcome import begin_store
    from jacray_workers.engine import prepare, run_shard
    from jacray_workers.request import make_request

    asked = make_request(returns=["jacobian", "gram"], method="reverse")
    prepared = prepare(MODEL, X, asked, workers=2)
    target = as_target(tmp_path / "run")
    opened = begin_store(target, prepared, prepared.plan)
    writer = store.Writer(target, prepared.plan)
    shard = prepared.plan.shard(1)
    result = writer.write(run_shard(prepared, shard, into=writer.into(shard)))
    assert result.blocks == {}
    assert [w.key for w in result.written] == ["jacobian", "gram"]
    assert all(store.verify(opened, written) for written in result.written)
    other = writer.write(run_shard(prepared, prepared.plan.shard(2)))
    for mine, theirs in zip(result.written, other.written, strict=True):
        assert mine.checksum != theirs.checksum
    chunk = next(p for p in (tmp_path / "run/results.zarr/jacobian/c/1").rglob("*") if p.is_file())
    chunk.write_bytes(chunk.read_bytes()[:10])
    assert [store.verify(opened, written) for written in result.written] == [False, True]


def test_another_jobs_folder_is_refused(inline_client, tmp_path):
    inline_client.submit(MODEL, X, to=tmp_path / "run").result()
    with pytest.raises(JobError, match="holds another job"):
        inline_client.submit(MODEL, X[:5], to=tmp_path / "run")


def test_a_full_disk_is_told_with_the_bytes_needed_and_leaves_no_half_file(inline_client, tmp_path):
    """The limit on the size of files stands for a disk that is full: both refuse a write in the middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    model, x = torch.nn.Linear(200, 200), torch.randn(64, 200)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        job = inline_client.submit(model, x, to=tmp_path / "run", method="reverse", verify=False)
        with pytest.raises(StorageError) as caught:
            job.result()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    told = str(caught.value)
    assert str(tmp_path / "run") in told
    assert "more, but: File too large" in told
    assert "free there" in told
    assert list(Path(tmp_path).rglob("*.partial")) == []
    assert job.status().state == "failed"


def test_a_store_that_was_taken_away_is_told(inline_client, tmp_path):
    with pytest.raises(StorageError, match="must be reached from every worker"):
        store.Writer(as_target(tmp_path / "none"), inline_client.submit(MODEL, X).plan)


@pytest.mark.slow
def test_a_result_of_20_gb_goes_through_in_2_gb_of_every_process(tmp_path):
    """Resident memory of the driver, the workers and Ray's processes; pages of Ray's shared store are counted apart."""
    gigabytes = 20
    if shutil.disk_usage(tmp_path).free < 1.5e9 * gigabytes:
        pytest.skip("there is no room for it on this disk")
    command = [sys.executable, "-m", "tests.large", str(gigabytes), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=1700, cwd=ROOT)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["gigabytes"] > 0.99 * gigabytes
    assert set(found["peak"]) == {"driver", "worker", "ray"}
    assert max(found["peak"].values()) < 2e9, found
    assert found["shared"] < 2e9, found


# Inputs that are read by range -------------------------------------------------------------------------------------


def test_samples_are_read_by_range_where_they_are_computed(client, tmp_path, monkeypatch):
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(3))
    np.save(tmp_path / "x.npy", x.numpy())
    rows = sources.rows(Npy(path="x.npy"), tmp_path)
    returns = ["jacobian", "outputs", "weighted_gradient"]
    asked = {"method": "reverse", "chunk_size": 2, "returns": returns, "weights": torch.ones(3)}
    expected = client.submit(MODEL, x, **asked).result()
    monkeypatch.setattr(ladder, "SCANNED", 10)  # small batches are looked through for their largest number
    monkeypatch.setattr(ranged, "HASHED_BYTES", 100)  # the digest of a small batch is that of its numbers
    read = []
    real = Rows.read
    monkeypatch.setattr(Rows, "read", lambda self, start, stop: read.append(stop - start) or real(self, start, stop))
    result = client.submit(MODEL, rows, to=tmp_path / "run", **asked).result()
    assert result.plan.digest == expected.plan.digest
    for name in expected.names:
        assert torch.equal(torch.as_tensor(getattr(result, name)), getattr(expected, name)), name
    assert 0 < max(read) <= 64  # what the planner's trial takes; shards take 38


def test_named_inputs_are_read_together(inline_client, tmp_path):
    a, b = torch.randn(9, 2), torch.randn(9, 2)
    save_file({"a": a, "b": b}, tmp_path / "x.safetensors")
    rows = sources.rows(Safetensors(path="x.safetensors", arrays=("a", "b")), tmp_path)
    model = as_model({"kind": "function", "expression": "a*b", "inputs": ["a", "b"]})
    found = inline_client.submit(model, rows, method="reverse").result().jacobian
    assert torch.equal(found["a"], torch.diag_embed(b))
    assert torch.equal(found["b"], torch.diag_embed(a))


@pytest.mark.parametrize("where", ["jacobian*/0/*/c", "target/c"])
def test_a_file_that_is_lost_is_never_read_as_zeros(inline_client, tmp_path, where):
    inputs = Loaded(X, fields={"target": torch.arange(21)})
    asked = {"wrt": "params", "form": "factors", "method": "layerwise"}
    inline_client.submit(MODEL, inputs, to=tmp_path / "run", **asked).result()
    whole = jacray.load(tmp_path / "run")
    assert whole.fields["target"].tolist() == list(range(21))
    assert all(array.dense().shape == array.shape for array in whole.arrays.values())
    for folder in (tmp_path / "run/results.zarr").glob(where):
        for path in folder.rglob("*"):
            path.unlink() if path.is_file() else None
    found = jacray.load(tmp_path / "run")
    with pytest.raises(StorageError, match="lost"):
        [found.fields["target"], *(array.dense() for array in found.arrays.values())]

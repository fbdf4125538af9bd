"""Jobs whose results go to a URL: taken up again, refused where another job is, checked, and how they stand."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import uuid
from pathlib import Path

import fsspec
import jacray
import pytest
import torch
from jacray import store
from jacray.checking import check
from jacray.cli import main
from jacray.mirror import reading
from jacray.target import Target

from tests.service.test_resume import FIELDS, X, done, poisoned, same
from tests.toys import Waits, mlp

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(params=["memory", "local"])
def target(request, tmp_path) -> Target:
    """A place that is no local folder to us, whatever it is in truth."""
    if request.param == "memory":
        return Target(f"memory://jacray-{uuid.uuid4().hex}/run")
    return Target(f"local://{tmp_path}/there/run", {"auto_mkdir": True})


@pytest.fixture
def client():
    with jacray.Client("inline", shard_size=4) as found:
        yield found


def journals(cache: Path) -> list[Path]:
    return list(cache.rglob("journal.sqlite"))


def test_a_rerun_skips_what_is_finished(client, tmp_path, cache, target) -> None:
    model, x, poison = poisoned(tmp_path)
    quiet = client.submit(model, x, **FIELDS).result(timeout=60)
    poison.touch()
    with pytest.raises(Exception, match="poison"):
        client.submit(model, x, to=target, **FIELDS).result(timeout=60)
    assert journals(cache) == []  # what is known is all there
    poison.unlink()
    second = client.submit(model, x, to=target, **FIELDS)
    result = second.result(timeout=60)
    assert done(second) == [4]
    assert second.status().shards_kept == result.receipt["shards_kept"] == 9
    same(result, quiet)
    third = client.submit(model, x, to=target, **FIELDS)
    same(third.result(timeout=60), quiet)
    assert done(third) == []


def test_the_parts_of_sums_go_once_they_are_added_up(tmp_path, target) -> None:
    model, x, poison = poisoned(tmp_path, at=37)
    fields, files = {**FIELDS, "chunk_size": 1}, fsspec.core.url_to_fs(target.url, **target.options)[0]
    with jacray.Client("inline", shard_size=1) as client:
        quiet = client.submit(model, x, **fields).result(timeout=60)
        poison.touch()
        with pytest.raises(Exception, match="poison"):
            client.submit(model, x, to=target, **fields).result(timeout=60)
        left = {path.split("/gram/c/")[1].split("/")[0] for path in files.find(target.url) if "/parts/gram/c/" in path}
        assert left == {"32", "33", "34", "35", "36", "38", "39"}
        poison.unlink()
        job = client.submit(model, x, to=target, **fields)
        same(job.result(timeout=60), quiet)
        assert done(job) == [37]
        assert not [path for path in files.find(target.url) if "/parts/" in path]


def test_another_job_is_refused_and_told_what_differs(client, cache, target) -> None:
    client.submit(mlp(), X, to=target, **FIELDS).result(timeout=60)
    with pytest.raises(jacray.JobError, match=r"holds another job \(inputs was"):
        client.submit(mlp(), X + 1, to=target, **FIELDS)
    assert journals(cache) == []


def test_a_job_that_was_taken_away_is_forgotten(client, target) -> None:
    client.submit(mlp(), X, to=target, **FIELDS).result(timeout=60)
    fsspec.core.url_to_fs(target.url, **target.options)[0].rm(target.url, recursive=True)
    job = client.submit(mlp(), X + 1, to=target, **FIELDS)
    job.result(timeout=60)
    assert len(done(job)) == 10


@pytest.mark.parametrize("harm", ["lost", "shorter", "changed"])
def test_blocks_are_looked_at_without_reading_them_or_read_where_asked(client, tmp_path, harm) -> None:
    target = Target(f"local://{tmp_path}/there/run", {"auto_mkdir": True}, recheck=harm == "changed")
    quiet = torch.as_tensor(client.submit(mlp(), X, to=target, **FIELDS).result(timeout=60).jacobian).clone()
    victim = sorted(p for p in (tmp_path / "there/run/results.zarr/jacobian/c").rglob("*") if p.is_file())[6]
    data = bytearray(victim.read_bytes())
    victim.unlink()
    if harm != "lost":
        data[0] ^= 1
        victim.write_bytes(data if harm == "changed" else data[:-1])
    job = client.submit(mlp(), X, to=target, **FIELDS)
    assert torch.equal(torch.as_tensor(job.result(timeout=60).jacobian), quiet)
    assert done(job) == [6]
    assert list(store.damages(store.open_store(target))) == []


def test_factors_and_codecs_are_looked_at_too(client, tmp_path) -> None:
    target = Target(f"local://{tmp_path}/there/run", {"auto_mkdir": True}, compression="zstd")
    fields = {"wrt": "params", "form": "factors", "method": "layerwise", "chunk_size": 4}
    for kept in (0, 10, 9):
        job = client.submit(mlp(), X, to=target, **fields)
        job.result(timeout=60)
        assert job.status().shards_kept == kept
        for path in (tmp_path / "there/run/results.zarr").glob("jacobian*weight/3/zarr.json"):
            path.unlink() if kept == 10 else None


def test_after_a_killed_coordinator_the_copy_is_gone_on_from(client, tmp_path, cache, monkeypatch) -> None:
    target = Target(f"local://{tmp_path}/there/run", {"auto_mkdir": True})
    script = """
    import sys, torch, jacray
    from jacray.target import Target
    from tests.service.test_resume import FIELDS, X
    from tests.toys import Waits
    target = Target(sys.argv[1], {"auto_mkdir": True})
    with jacray.Client("inline", shard_size=4) as client:
        client.submit(Waits(sys.argv[2], X[20]), X, to=target, **FIELDS).result()
    """
    gate = tmp_path / "gate"
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), target.url, str(gate)], cwd=ROOT, env=dict(os.environ)
    )
    try:
        with_copy = 0
        while process.poll() is None and with_copy < 5:  # the copy follows within some seconds
            with reading(target) as journal:
                with_copy = 0 if journal is None else sum(journal.counts(job.id).done for job in journal.jobs())
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert with_copy == 5
    assert len(journals(cache)) == 1
    gate.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another-machine"))
    job = client.submit(Waits(gate, X[20]), X, to=target, **FIELDS)
    same(job.result(timeout=60), client.submit(Waits(gate, X[20]), X, **FIELDS).result(timeout=60))
    assert done(job) == [5, 6, 7, 8, 9]


def test_how_it_stands_and_whether_it_is_whole(client, tmp_path, capsys) -> None:
    target = Target(f"memory://jacray-{uuid.uuid4().hex}/run")
    client.submit(mlp(), X, to=target, **FIELDS).result(timeout=60)
    assert main(["status", target.url, "--json", "--shards"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (lines[0]["state"], lines[0]["shards_done"], len(lines)) == ("done", 10, 11)
    assert main(["verify", target.url]) == 0
    assert "10 of 10 shards are finished, and hold what was written" in capsys.readouterr().out
    files = fsspec.filesystem("memory")
    victim = next(path for path in files.find(target.url) if "/jacobian/c/3/" in path)
    files.pipe_file(victim, files.cat_file(victim)[:-2])
    assert main(["verify", target.url]) == 1
    assert "jacobian, samples 12 to 15: damaged" in capsys.readouterr().out
    assert main(["status", "memory://jacray-none/run"]) == 1
    assert "path: must hold a journal" in capsys.readouterr().err


def test_a_job_that_ends_while_it_is_looked_through(client, tmp_path, monkeypatch, target) -> None:
    model, x, poison = poisoned(tmp_path)
    poison.touch()
    with pytest.raises(Exception, match="poison"):
        client.submit(model, x, to=target, **FIELDS).result(timeout=60)
    opened = store.open_store(target)
    poison.unlink()
    client.submit(model, x, to=target, **FIELDS).result(timeout=60)
    early, honest = [opened], store.open_store
    monkeypatch.setattr(store, "open_store", lambda where: early.pop() if early else honest(where))
    found = check(target)
    assert early == []
    assert (found.seen, found.shards, found.damages) == (10, 10, [])

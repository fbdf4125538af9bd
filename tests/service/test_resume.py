"""Jobs that go on from what is finished: in one process, through the client and through the command."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import jacray
import pytest
import torch
from jacray.events import ShardDone, ShardFailed, ShardsKept
from jacray.journal import Journal
from jacray.limits import Limits

from tests.toys import Gated, Poisoned, Raises, Waits, mlp

X = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
FIELDS = {"returns": ["jacobian", "gram"], "method": "backward_loop", "chunk_size": 4, "verify": 2}


@pytest.fixture
def client():
    with jacray.Client("inline", shard_size=4) as found:
        yield found


def poisoned(tmp_path: Path, at: int = 17) -> tuple[Poisoned, torch.Tensor, Path]:
    """A model that raises at one sample while a file is there."""
    x = X.clone()
    x[at, 0] = 100.0
    poison = tmp_path / "poison"
    return Poisoned(poison), x, poison


def same(a: jacray.Result, b: jacray.Result) -> None:
    """Bit for bit under one plan; a plan made while the poison was there may treat the samples otherwise."""
    exact = {} if a.plan.digest == b.plan.digest else {"rtol": 1e-6, "atol": 1e-5}
    for name in a.names:
        found, expected = torch.as_tensor(getattr(a, name)), torch.as_tensor(getattr(b, name))
        torch.testing.assert_close(found, expected, **(exact or {"rtol": 0, "atol": 0}))


def done(job: jacray.Job) -> list[int]:
    return sorted(event.shard for event in job.events() if isinstance(event, ShardDone))


def test_the_rest_of_a_job_is_kept_and_only_what_failed_is_computed_again(client, tmp_path) -> None:
    model, x, poison = poisoned(tmp_path)
    quiet = client.submit(model, x, **FIELDS).result(timeout=60)
    poison.touch()
    first = client.submit(model, x, to=tmp_path / "run", **FIELDS)
    with pytest.raises(Exception, match="poison"):
        first.result(timeout=60)
    assert done(first) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    (failed,) = [event for event in first.events() if isinstance(event, ShardFailed)]
    assert (failed.start, failed.stop) == (16, 20)
    with Journal(tmp_path / "run/journal.sqlite", read_only=True) as journal:
        (row,) = journal.jobs()
        assert row.state == "failed"
        assert "poison" in row.trace
        (lost,) = journal.shards(row.id, ["failed"])
        assert lost.shard == 4
        assert "poison" in lost.error
    poison.unlink()
    second = client.submit(model, x, to=tmp_path / "run", **FIELDS)
    result = second.result(timeout=60)
    assert done(second) == [4]
    assert next(event for event in second.events() if isinstance(event, ShardsKept)).shards == 9
    assert second.status().shards_kept == 9
    assert result.receipt["shards_kept"] == 9
    assert result.receipt["verified"]["checks"] == quiet.receipt["verified"]["checks"]
    same(result, quiet)


def test_a_finished_job_computes_nothing_again(client, tmp_path) -> None:
    for expected in (list(range(10)), []):
        job = client.submit(mlp(), X, to=tmp_path / "run", **FIELDS)
        result = job.result(timeout=60)
        assert done(job) == expected
        assert job.status().samples_done == 40
        same(result, client.submit(mlp(), X, **FIELDS).result(timeout=60))


def test_another_job_is_refused_and_told_what_differs(client, tmp_path) -> None:
    client.submit(mlp(), X, to=tmp_path / "run", **FIELDS).result(timeout=60)
    for change, named in [
        ((mlp(seed=1), X, FIELDS), "model was"),
        ((mlp(), X + 1, FIELDS), "inputs was"),
        ((mlp(), X, {**FIELDS, "chunk_size": 2}), "chunk_size was 4 and is 2"),
        ((mlp(), X, {**FIELDS, "seed": 5}), "request was"),
    ]:
        model, x, fields = change
        with pytest.raises(jacray.JobError, match=f"holds another job \\({named}"):
            client.submit(model, x, to=tmp_path / "run", **fields)
    same(jacray.load(tmp_path / "run"), client.submit(mlp(), X, **FIELDS).result(timeout=60))


def test_another_number_of_workers_goes_on_with_the_same_shards(tmp_path) -> None:
    model, x, poison = poisoned(tmp_path)
    poison.touch()
    with jacray.Client("inline", workers=2, shard_size=4) as client, pytest.raises(Exception, match="poison"):
        client.submit(model, x, to=tmp_path / "run", **FIELDS).result(timeout=60)
    poison.unlink()
    with jacray.Client("inline", workers=7) as client:
        job = client.submit(model, x, to=tmp_path / "run", **FIELDS)
        result = job.result(timeout=60)
    assert done(job) == [4]
    with jacray.Client("inline", shard_size=4) as client:
        same(result, client.submit(model, x, **FIELDS).result(timeout=60))


def chunks(run: Path, key: str = "jacobian") -> list[Path]:
    return sorted(path for path in (run / "results.zarr" / key / "c").rglob("*") if path.is_file())


@pytest.mark.parametrize("damage", ["truncated", "changed", "gone"])
@pytest.mark.parametrize("returns", [["jacobian"], ["jacobian", "gram"]])
def test_a_damaged_block_is_found_and_computed_again(client, tmp_path, damage, returns) -> None:
    fields = {**FIELDS, "returns": returns}
    quiet = client.submit(mlp(), X, to=tmp_path / "run", **fields).result(timeout=60).jacobian.clone()
    victim = chunks(tmp_path / "run")[3]
    held = victim.read_bytes()
    if damage == "gone":
        victim.unlink()
    else:
        victim.write_bytes(held[:-7] if damage == "truncated" else bytes([held[0] ^ 1]) + held[1:])
    job = client.submit(mlp(), X, to=tmp_path / "run", **fields)
    result = job.result(timeout=60)
    assert torch.equal(torch.as_tensor(result.jacobian), torch.as_tensor(quiet))
    assert len(done(job)) == 1


def test_cancelling_keeps_what_is_finished(client, tmp_path) -> None:
    gate = tmp_path / "gate"
    model = Gated(gate)
    first = client.submit(mlp(), X, to=tmp_path / "a", **FIELDS)
    first.result(timeout=60)
    job = client.submit(model, X, to=tmp_path / "run", method="backward_loop", chunk_size=4, verify=False)

    def cancel_after_three() -> None:
        count = 0
        for event in job.events():
            count += isinstance(event, ShardDone)
            if count == 3:
                job.cancel()

    thread = threading.Thread(target=cancel_after_three)
    thread.start()
    gate.touch()
    with pytest.raises(jacray.CancelledError):
        job.result(timeout=60)
    thread.join()
    kept = job.status().shards_done
    assert 3 <= kept < 10
    again = client.submit(model, X, to=tmp_path / "run", method="backward_loop", chunk_size=4, verify=False)
    again.result(timeout=60)
    assert again.status().shards_kept == kept
    assert len(done(again)) == 10 - kept


def test_two_clients_may_not_write_into_one_folder(tmp_path) -> None:
    gate = tmp_path / "gate"
    with jacray.Client("inline") as one, jacray.Client("inline") as two:
        job = one.submit(Gated(gate), X, to=tmp_path / "run", method="reverse")
        with pytest.raises(jacray.JobError, match=r"in use by this process"):
            two.submit(Gated(gate), X, to=tmp_path / "run", method="reverse")
        gate.touch()
        job.result(timeout=60)


def test_skipping_leaves_nan_and_a_list(client, tmp_path) -> None:
    model, x, poison = poisoned(tmp_path)
    fields = {**FIELDS, "returns": ["jacobian", "outputs"]}
    quiet = client.submit(model, x, **fields).result(timeout=60)
    poison.touch()
    for to in (None, tmp_path / "run"):
        result = client.submit(model, x, to=to, on_error="skip", **fields).result(timeout=60)
        (gap,) = result.receipt["skipped"]
        assert (gap["index"], gap["start"], gap["stop"]) == (4, 16, 20)
        assert "poison" in gap["error"]
        there = [i for i in range(40) if not 16 <= i < 20]
        for name in ("jacobian", "outputs"):
            found = torch.as_tensor(getattr(result, name)[:])
            assert torch.equal(found[there], getattr(quiet, name)[there])
            assert found[16:20].isnan().all()


def test_skipping_is_refused_where_the_gap_would_not_show(client) -> None:
    with pytest.raises(jacray.RequestError, match=r"on_error: skip needs .*; got gram"):
        client.submit(mlp(), X, on_error="skip", returns=["jacobian", "gram"])
    with pytest.raises(jacray.RequestError, match="must be one of fail, skip"):
        client.submit(mlp(), X, on_error="ignore")


def test_a_model_that_always_fails_ends_the_job_early_whatever_was_asked(client, tmp_path) -> None:
    for fields in ({"on_error": "skip"}, {"to": tmp_path / "run"}):
        job = client.submit(Raises(), X, method="backward_loop", chunk_size=4, **fields)
        with pytest.raises(Exception, match="reactor"):
            job.result(timeout=60)
        assert job.status().shards_failed == 3


def test_one_key_gives_one_job(client) -> None:
    first = client.submit(mlp(), X, key="k")
    assert client.submit(mlp(), X.clone(), key="k") is first
    first.result(timeout=60)
    assert client.submit(mlp(), X, key="k") is first
    assert client.submit(mlp(), X) is not first
    with pytest.raises(jacray.JobError, match=r"key: was used for another job \(inputs was"):
        client.submit(mlp(), X + 1, key="k")


def test_a_key_is_free_again_when_its_job_failed(client, tmp_path) -> None:
    model, x, poison = poisoned(tmp_path)
    poison.touch()
    first = client.submit(model, x, key="k", method="backward_loop", chunk_size=4)
    with pytest.raises(Exception, match="poison"):
        first.result(timeout=60)
    poison.unlink()
    assert client.submit(model, x, key="k", method="backward_loop", chunk_size=4).result(timeout=60).jacobian.shape


def test_a_client_says_no_when_it_has_enough(tmp_path) -> None:
    gate = tmp_path / "gate"
    with jacray.Client("inline", shard_size=4, limits=Limits(jobs=2, shards=25)) as client:
        jobs = [client.submit(Gated(gate), X, method="reverse") for _ in range(2)]
        with pytest.raises(jacray.BusyError, match=r"limits\.jobs: at most 2 jobs .* 1 more with 2 there"):
            client.submit(mlp(), X)
        jobs[0].cancel()
        gate.touch()
        for job in jobs:
            job.wait(60)
        with pytest.raises(jacray.BusyError, match=r"limits\.shards: at most 25"):
            client.submit(mlp(), torch.randn(200, 5))
        assert client.submit(mlp(), X).result(timeout=60).jacobian.shape == (40, 3, 5)  # nothing was left behind
    with (
        jacray.Client("inline", limits=Limits(nbytes=1000)) as client,
        pytest.raises(jacray.BusyError, match=r"limits\.nbytes"),
    ):
        client.submit(mlp(), torch.randn(200, 5))


def test_a_full_disk_stops_the_job_and_room_lets_it_go_on(client, tmp_path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", place], check=False).returncode
    ):
        pytest.skip("may not mount")
    x = torch.randn(400, 50, generator=torch.Generator().manual_seed(1))
    model, fields = mlp((50, 10)), {"method": "reverse", "verify": False, "chunk_size": 4}
    try:
        first = client.submit(model, x, to=place / "run", **fields)
        with pytest.raises(jacray.StorageError, match=r"(?i)space|full"):
            first.result(timeout=60)
        assert 0 < first.status().shards_done < 100
        subprocess.run(["mount", "-o", "remount,size=8m", place], check=True)
        second = client.submit(model, x, to=place / "run", **fields)
        result = second.result(timeout=60)
        assert second.status().shards_kept > 0
        assert torch.equal(torch.as_tensor(result.jacobian[:]), client.submit(model, x, **fields).result().jacobian)
    finally:
        del first
        subprocess.run(["umount", "-l", place], check=False)


def test_a_store_gone_read_only_stops_the_job_and_lets_it_go_on(tmp_path) -> None:
    place, gate = tmp_path / "disk", tmp_path / "gate"
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], check=False).returncode:
        pytest.skip("may not mount")
    try:
        with jacray.Client("inline", shard_size=4) as client:
            first = client.submit(Waits(gate, X[20]), X, to=place / "run", **FIELDS)
            while first.status().shards_done < 5:
                time.sleep(0.01)
            held = subprocess.run(["mount", "-o", "remount,ro", place], check=False).returncode
            if held:  # a file is open for writing, which the journal is: only the results' part of it then
                results = place / "run/results.zarr"
                subprocess.run(["mount", "--bind", results, results], check=True)
                subprocess.run(["mount", "-o", "remount,bind,ro", results], check=True)
            gate.touch()
            with pytest.raises(jacray.StorageError, match="Read-only file system"):
                first.result(timeout=60)
            subprocess.run(["umount", "-l", results] if held else ["mount", "-o", "remount,rw", place], check=True)
            second = client.submit(Waits(gate, X[20]), X, to=place / "run", **FIELDS)
            same(second.result(timeout=60), client.submit(Waits(gate, X[20]), X, **FIELDS).result(timeout=60))
            assert done(second) == [5, 6, 7, 8, 9]
    finally:
        subprocess.run(["umount", "-l", place], check=False)


SPEC = """\
model: {kind: layers, layers: [{kind: Linear, in_features: 2, out_features: 3}]}
inputs: {kind: random, shape: [40, 2]}
request: {returns: [outputs, jacobian], chunk_size: 4}
cluster: {address: inline, shard_size: 4}
output: {path: out, report: false}
"""


@pytest.fixture
def spec(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("spec.yaml").write_text(SPEC)
    return "spec.yaml"


def test_running_a_folder_again_keeps_its_shards_and_says_so(spec, capsys) -> None:
    from jacray.cli import main

    assert main(["run", spec]) == 0
    capsys.readouterr()
    numbers = jacray.load("out").jacobian
    assert main(["run", spec]) == 0
    printed = capsys.readouterr()
    assert "10 of 10 shards were finished before and are kept" in printed.out
    assert "kept" in [json.loads(line)["event"] for line in printed.err.splitlines()]
    assert torch.equal(torch.as_tensor(jacray.load("out").jacobian), torch.as_tensor(numbers))
    assert main(["run", spec, "output.overwrite=true"]) == 0
    assert "kept" not in capsys.readouterr().out


def test_a_folder_tells_how_it_stands(spec, capsys) -> None:
    from jacray.cli import main

    assert main(["run", spec]) == 0
    capsys.readouterr()
    assert main(["status", "out"]) == 0
    told = capsys.readouterr().out
    assert "10 of 10 done" in told
    assert main(["status", "out", "--json", "--shards"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (lines[0]["state"], lines[0]["shards_done"], lines[0]["samples"]) == ("done", 10, 40)
    assert [line["shard"] for line in lines[1:]] == list(range(10))
    assert all(line["detail"]["written"] for line in lines[1:])


def test_changed_data_behind_the_same_spec_are_refused(spec, capsys) -> None:
    import numpy as np
    from jacray.cli import main

    np.save("x.npy", np.ones((40, 2), np.float32))
    arguments = ["run", spec, "inputs={kind: npy, path: x.npy}"]
    assert main(arguments) == 0
    np.save("x.npy", np.full((40, 2), 2.0, np.float32))
    capsys.readouterr()
    assert main(arguments) == 1
    assert "holds another job (inputs was" in capsys.readouterr().err


def test_damage_is_told_and_repaired(spec, capsys) -> None:
    from jacray.cli import main

    assert main(["verify", "out"]) == 1
    assert "path: must hold the results of a run; got " in capsys.readouterr().err
    assert main(["run", spec, "request.returns=[outputs, jacobian, gram]"]) == 0
    numbers = {name: torch.as_tensor(value).clone() for name, value in jacray.load("out")}
    capsys.readouterr()
    assert main(["verify", "out"]) == 0
    assert "10 of 10 shards are finished, and hold what was written" in capsys.readouterr().out
    places, others = chunks(Path("out")), chunks(Path("out"), "outputs")
    places[3].write_bytes(places[3].read_bytes()[:-7])
    places[5].unlink()
    others[7].write_bytes(others[8].read_bytes())  # whole, and another's
    assert main(["verify", "out"]) == 1
    told = capsys.readouterr().out
    assert "3 blocks are lost or damaged" in told
    for what, word in (
        ("jacobian, samples 12 to 15", "damaged"),
        ("jacobian, samples 20 to 23", "lost"),
        ("outputs, samples 28 to 31", "damaged (its checksum is"),
    ):
        assert f"{what}: {word}" in told
    assert main(["verify", "out", "--repair"]) == 0
    told = capsys.readouterr().out
    assert "7 of 10 shards were finished before and are kept" in told  # the sum was intact
    assert told.splitlines()[-1] == "out: 10 of 10 shards are finished, and hold what was written"
    for name, value in jacray.load("out"):
        assert torch.equal(torch.as_tensor(value), numbers[name])


def test_a_damaged_sum_takes_all_shards(spec, capsys) -> None:
    from jacray.cli import main

    assert main(["run", spec, "request.returns=[gram]"]) == 0
    numbers = torch.as_tensor(jacray.load("out").gram).clone()
    victim = next(p for p in Path("out/results.zarr/gram/c").rglob("*") if p.is_file())
    victim.write_bytes(victim.read_bytes()[:-1])
    capsys.readouterr()
    assert main(["verify", "out"]) == 1
    assert "gram, the whole array: damaged" in capsys.readouterr().out
    assert main(["verify", "out", "--repair"]) == 0
    assert torch.equal(torch.as_tensor(jacray.load("out").gram), numbers)


def test_what_cannot_be_repaired_from_its_folder_says_how(client, tmp_path, capsys) -> None:
    from jacray.cli import main

    client.submit(mlp(), X, to=tmp_path / "run", **FIELDS).result(timeout=60)
    victim = chunks(tmp_path / "run")[2]
    victim.unlink()
    assert main(["verify", str(tmp_path / "run"), "--repair"]) == 1
    assert "must hold spec.yaml to be repaired from here" in capsys.readouterr().err
    client.submit(mlp(), X, to=tmp_path / "run", **FIELDS).result(timeout=60)
    assert main(["verify", str(tmp_path / "run")]) == 0


def parts(run: Path) -> set[int]:
    """The shards whose parts of a sum are on disk."""
    return {int(path.name) for path in (run / "results.zarr/parts/gram/c").glob("*") if any(path.rglob("*"))}


def quiet_then_poisoned(
    client: jacray.Client, model: Any, x: torch.Tensor, poison: Path, run: Path, fields: dict[str, Any]
) -> jacray.Result:
    """What a job gives; then the same job into a folder, where it fails at the poisoned sample."""
    quiet = client.submit(model, x, **fields).result(timeout=60)
    poison.touch()
    with pytest.raises(Exception, match="poison"):
        client.submit(model, x, to=run, **fields).result(timeout=60)
    return quiet


def test_the_parts_of_sums_go_once_they_are_added_up_and_a_resumed_sum_has_the_same_bits(tmp_path) -> None:
    model, x, poison = poisoned(tmp_path, at=37)
    fields = {**FIELDS, "chunk_size": 1}
    with jacray.Client("inline", shard_size=1) as client:
        quiet = quiet_then_poisoned(client, model, x, poison, tmp_path / "run", fields)
        assert parts(tmp_path / "run") == {32, 33, 34, 35, 36, 38, 39}
        kept = [path.name for path in (tmp_path / "run/results.zarr/parts").glob("kept.*")]
        assert kept == ["kept.32"]
        poison.unlink()
        half = tmp_path / "run/results.zarr/gram/c/0/0.abc.partial"
        half.parent.mkdir(parents=True, exist_ok=True)
        half.touch()
        (tmp_path / "run/.receipt.json.4711").touch()
        job = client.submit(model, x, to=tmp_path / "run", **fields)
        same(job.result(timeout=60), quiet)
        assert done(job) == [37]
        assert not half.exists()
        assert not list((tmp_path / "run").glob(".*"))
        assert not (tmp_path / "run/results.zarr/parts").exists()


def test_sums_so_far_that_are_damaged_are_made_anew(tmp_path) -> None:
    model, x, poison = poisoned(tmp_path, at=37)
    fields = {**FIELDS, "chunk_size": 1}
    with jacray.Client("inline", shard_size=1) as client:
        quiet = quiet_then_poisoned(client, model, x, poison, tmp_path / "run", fields)
        poison.unlink()
        for path in (tmp_path / "run/results.zarr/parts/kept.32").rglob("c/*"):
            for file in path.rglob("*"):
                if file.is_file():
                    file.write_bytes(file.read_bytes()[:-1])
        job = client.submit(model, x, to=tmp_path / "run", **fields)
        same(job.result(timeout=60), quiet)
        assert done(job) == [*range(32), 37]

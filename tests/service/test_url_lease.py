"""Leases: one holder at a time, the silent are taken over, the living are not, and no clock decides."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import jacray
import pytest
from jacray import url_lease
from jacray.target import Target
from jacray.url_lease import Holder, UrlLease, busy, holders

from tests.service.test_resume import X, same
from tests.toys import Waits


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path) -> None:
    """Short beats and little patience."""
    monkeypatch.setattr(url_lease, "BEAT", 0.05)
    monkeypatch.setattr(url_lease, "SILENT", 0.6)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def target(tmp_path) -> Target:
    return Target(f"local://{tmp_path}/there", {"auto_mkdir": True})


@contextlib.contextmanager
def held(target: Target):
    lease = UrlLease(target)
    try:
        yield lease
    finally:
        lease.close()


def put(target: Target, holder: Holder) -> Holder:
    """A lease of somebody elsewhere."""
    target.write(f"lease-{holder.owner}.json", json.dumps(asdict(holder)))
    return holder


def elsewhere(owner: str = "other", **changes) -> Holder:
    """A holder on a machine whose processes cannot be seen from here."""
    now = time.time()
    return replace(Holder(owner, "far", 7, now, "another machine", now, now, 3), **changes)


def test_one_at_a_time_and_nothing_is_left(target) -> None:
    with held(target):
        for _ in range(2):
            with pytest.raises(jacray.JobError, match="is being computed into by process"):
                UrlLease(target)
        assert len(holders(target)) == 1
    assert holders(target) == []
    with held(target):
        pass


def test_of_many_who_come_at_once_one_gets_it(target) -> None:
    start = threading.Barrier(6)

    def try_it(_: int) -> UrlLease | None:
        start.wait()
        with contextlib.suppress(jacray.JobError):
            return UrlLease(target)
        return None

    with ThreadPoolExecutor(6) as threads:
        found = [lease for lease in threads.map(try_it, range(6)) if lease is not None]
    assert len(found) == 1
    assert [h.holds for h in holders(target)] == [True]
    found[0].close()


@pytest.mark.parametrize("skew", [-7200.0, 0.0, 7200.0])
def test_a_silent_one_is_taken_over_whatever_its_clock_says(target, skew) -> None:
    put(target, elsewhere(at=time.time() + skew))
    assert busy(target) is not None
    with held(target) as lease:
        lease.check()
        assert [h.owner for h in holders(target) if h.holds] != ["other"]


@pytest.mark.parametrize("skew", [-7200.0, 7200.0])
def test_one_who_gives_signs_is_left_alone_whatever_its_clock_says(target, skew) -> None:
    over = threading.Event()

    def live() -> None:
        beats = 0
        while not over.wait(0.05):
            beats += 1
            put(target, elsewhere(beats=beats, at=time.time() + skew))

    put(target, elsewhere(beats=0, at=time.time() + skew))
    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(jacray.JobError, match="process 7 of far"):
            UrlLease(target)
    finally:
        over.set()
        thread.join()


def test_a_process_of_this_machine_that_is_gone_is_taken_over_at_once(target, monkeypatch) -> None:
    monkeypatch.setattr(url_lease, "SILENT", 1e9)
    put(target, elsewhere(pid=2**22 + 1, machine=url_lease._machine()))
    put(target, elsewhere("reborn", pid=1, born=0.0, machine=url_lease._machine()))  # its number is another's now
    assert busy(target) is None
    with held(target):
        assert len(holders(target)) == 1


def test_what_cannot_be_read_counts_until_it_is_silent(target) -> None:
    target.write("lease-odd.json", "{")
    with held(target):
        assert len(holders(target)) == 1


def wait_until_lost(lease: UrlLease) -> None:
    until = time.monotonic() + 20
    while not lease.lost and time.monotonic() < until:
        time.sleep(0.01)


@pytest.mark.parametrize("how", ["removed", "taken over"])
def test_who_was_taken_over_finds_out_and_writes_no_more(target, how) -> None:
    lease = UrlLease(target)
    mine = holders(target)[0]
    if how == "taken over":  # and a last beat of ours comes too late
        put(target, elsewhere(over=[mine.owner]))
    else:
        target.remove(f"lease-{mine.owner}.json")
    wait_until_lost(lease)
    with pytest.raises(jacray.JobError, match="by process 7 of far" if how == "taken over" else "lost its lease"):
        lease.check()
    lease.close()


def test_whoever_took_over_removes_a_beat_that_came_too_late(target) -> None:
    silent = put(target, elsewhere())
    with held(target) as lease:
        put(target, silent)
        until = time.monotonic() + 20
        while len(holders(target)) > 1 and time.monotonic() < until:
            time.sleep(0.01)
        assert len(holders(target)) == 1
        lease.check()


def test_a_job_that_was_taken_over_ends_and_the_next_goes_on(target, tmp_path) -> None:
    gate = tmp_path / "gate"
    fields = {"method": "backward_loop", "chunk_size": 4, "verify": False}
    with jacray.Client("inline", shard_size=4) as client:
        job = client.submit(Waits(gate, X[20]), X, to=target, **fields)
        while job.status().shards_done < 5:
            time.sleep(0.01)
        (mine,) = holders(target)
        put(target, elsewhere(over=[mine.owner]))
        time.sleep(0.3)
        gate.touch()
        with pytest.raises(jacray.JobError, match="was taken over by process 7 of far"):
            job.result(timeout=60)
        again = client.submit(Waits(gate, X[20]), X, to=target, **fields)
        result = again.result(timeout=60)
        assert again.status().shards_kept == 5
        quiet = client.submit(Waits(gate, X[20]), X, **fields).result(timeout=60)
    same(result, quiet)
    assert holders(target) == []

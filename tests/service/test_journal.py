"""The journal as a file: what it keeps, who may write, and what a killed writer leaves."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import jacray
import pytest
from jacray.entries import Counts, JobRow, ShardRow, differing
from jacray.journal import Journal

DIGESTS = {"model": "aa" * 32, "inputs": "bb" * 32}


def job(identity: str = "j", **fields: object) -> JobRow:
    return JobRow(identity, DIGESTS, {"samples": 40}, "cc", 40, 4, **fields)


@pytest.fixture
def journal(tmp_path: Path):
    with Journal(tmp_path / "state" / "journal.sqlite") as opened:
        yield opened


def test_a_job_goes_in_and_comes_out_as_it_was(journal: Journal) -> None:
    entered = journal.enter(job(key="k", user="me", spec={"to": "/there"}))
    assert journal.job("j") == journal.find("k") == entered
    assert journal.job("other") is None
    assert journal.jobs() == [entered]
    assert journal.jobs(["running", "done"]) == []


def test_states_have_their_times_and_errors(journal: Journal) -> None:
    journal.enter(job())
    journal.begin("j")
    running = journal.job("j")
    assert (running.state, running.ended) == ("running", None)
    journal.end("j", "failed", "E: no", "line 1")
    failed = journal.job("j")
    assert (failed.state, failed.error, failed.trace) == ("failed", "E: no", "line 1")
    assert failed.ended >= failed.began >= failed.created
    journal.begin("j")
    again = journal.job("j")
    assert (again.state, again.error, again.trace, again.ended) == ("running", "", "", None)


def test_one_key_gives_one_job(journal: Journal) -> None:
    first = journal.enter(job("a", key="k"))
    assert journal.enter(job("b", key="k")) == first
    assert [row.id for row in journal.jobs()] == ["a"]
    with pytest.raises(jacray.JobError, match=r"another job \(model was aaaa.* and is zzzz"):
        journal.enter(JobRow("c", {**DIGESTS, "model": "z" * 64}, {}, "", 1, 1, key="k"))


def test_two_threads_with_one_key_get_the_same_job(journal: Journal) -> None:
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda i=i: found.append(journal.enter(job(f"{i}", key="k")).id)) for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(journal.jobs()) == 1


def test_a_shards_last_state_counts(journal: Journal) -> None:
    journal.enter(job())
    journal.put("j", ShardRow(2, "again", 1, error="the worker died"))
    assert journal.counts("j") == Counts(again=1, retries=1)
    journal.put("j", ShardRow(2, "done", 2, "worker 1", seconds=0.5, detail={"written": [1, 2]}))
    journal.put("j", ShardRow(0, "done", 1, "worker 0"))
    journal.put("j", ShardRow(3, "failed", 2, error="E: no", trace="deep"))
    assert journal.counts("j") == Counts(done=2, failed=1, retries=2)
    rows = list(journal.shards("j"))
    assert [(row.shard, row.state, row.attempt) for row in rows] == [(0, "done", 1), (2, "done", 2), (3, "failed", 2)]
    assert rows[1].detail == {"written": [1, 2]}
    assert [row.trace for row in journal.shards("j", ["failed"])] == ["deep"]


def test_shards_come_in_order_and_in_pages(journal: Journal) -> None:
    journal.enter(job())
    for shard in reversed(range(2500)):
        journal.put("j", ShardRow(shard, "done"))
    assert [row.shard for row in journal.shards("j")] == list(range(2500))


def test_forgetting_a_job_leaves_the_others(journal: Journal) -> None:
    for name in ("a", "b"):
        journal.enter(job(name))
        journal.put(name, ShardRow(0, "done"))
    journal.forget("a")
    assert [row.id for row in journal.jobs()] == ["b"]
    assert journal.counts("a") == Counts()
    assert journal.counts("b") == Counts(done=1)


def test_one_writer_at_a_time_and_any_number_of_readers(journal: Journal) -> None:
    journal.enter(job())
    with pytest.raises(jacray.JobError, match=r"in use by this process"):
        Journal(journal.path)
    with Journal(journal.path, read_only=True) as reader:
        assert reader.jobs() == journal.jobs()
        assert not reader.alone
        journal.put("j", ShardRow(0, "done"))
        assert reader.counts("j") == Counts(done=1)
        with pytest.raises(jacray.StorageError, match="readonly"):
            reader.begin("j")
    journal.close()
    with Journal(journal.path, read_only=True) as reader:
        assert reader.alone


def test_a_closed_journal_is_one_file(journal: Journal) -> None:
    journal.enter(job())
    journal.close()
    journal.close()
    with Journal(journal.path, read_only=True) as reader:
        assert len(reader.jobs()) == 1
    assert [path.name for path in journal.path.parent.iterdir()] == ["journal.sqlite"]


def test_what_a_killed_writer_had_written_is_there(tmp_path: Path) -> None:
    code = """
        import os, signal, sys
        from pathlib import Path
        from jacray.entries import JobRow, ShardRow
        from jacray.journal import Journal
        journal = Journal(Path(sys.argv[1]))
        journal.enter(JobRow("j", {}, {}, "", 40, 4))
        journal.begin("j")
        for shard in range(100):
            journal.put("j", ShardRow(shard, "done"))
        os.kill(os.getpid(), signal.SIGKILL)
        """
    path = tmp_path / "journal.sqlite"
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(path)], check=False, timeout=100)
    assert killed.returncode == -signal.SIGKILL
    with Journal(path, read_only=True) as reader:
        assert reader.alone
        assert reader.job("j").state == "running"
        assert reader.counts("j") == Counts(done=100)
    with Journal(path) as opened:
        opened.begin("j")
        assert opened.counts("j") == Counts(done=100)


def test_what_is_no_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    with pytest.raises(jacray.UserError, match="must hold a journal"):
        Journal(path, read_only=True)
    path.write_text("not a database, but long enough to look like one " * 100)
    with pytest.raises(jacray.StorageError, match="file is not a database"):
        Journal(path)
    path.unlink()
    made = sqlite3.connect(path)
    made.execute("PRAGMA user_version=99")
    made.close()
    with pytest.raises(jacray.UserError, match="must have format 1; got 99"):
        Journal(path)


def fill(journal: Journal) -> None:
    for shard in range(10_000):
        journal.put("j", ShardRow(shard, "done", error="x" * 1000))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to mount")
def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], check=False).returncode:
        pytest.skip("may not mount")
    try:
        with Journal(place / "journal.sqlite") as journal:
            journal.enter(job())
            with pytest.raises(jacray.StorageError, match="full"):
                fill(journal)
            assert journal.counts("j").done > 10
    finally:
        subprocess.run(["umount", place], check=False)


def test_differences_are_named() -> None:
    found = differing({"a": "1", "b": "2"}, {"b": "3", "c": "4"})
    assert found == ["a was 1 and is absent", "b was 2 and is 3", "c was absent and is 4"]

from __future__ import annotations

import io
import json
from pathlib import Path

import jacray
import pytest
import torch
from jacray.events import JobCancelled, JobDone, JobStarted, ShardDone, ShardFailed, ShardRetried, ShardsKept
from jacray.progress import _as_json, _Bar, _in_words, _Lines, progress
from rich.console import Console

from tests.toys import Raises, mlp

X = torch.randn(40, 5)
STORY = [
    JobStarted("j", 100.0, 40, 4, 2),
    ShardDone("j", 101.0, 0, 10, 1.0, "worker 0"),
    ShardRetried("j", 102.0, 1, 1, "the worker died"),
    ShardDone("j", 110.0, 2, 10, 1.0, "worker 1"),
    ShardDone("j", 112.0, 1, 10, 1.0, "worker 1"),
    ShardDone("j", 120.0, 3, 10, 1.0, "worker 1"),
    JobDone("j", 120.0),
]


def console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100)


def text(shown: Console) -> str:
    assert isinstance(shown.file, io.StringIO)
    return shown.file.getvalue()


def test_lines_are_sparse() -> None:
    shown = console(terminal=False)
    lines = _Lines(shown, _in_words)
    for event in STORY:
        lines.hear(event)
    assert text(shown).splitlines() == [
        "job j: 40 samples in 4 shards on 2 workers",
        "job j: shard 1 is computed again: the worker died",
        "job j: 30 of 40 samples, 2 samples/s, 4 s left, 1 retry",
        "job j: done, 40 of 40 samples, 2 samples/s, 1 retry",
    ]


def test_the_bar_shows_samples_rate_and_retries() -> None:
    shown = console(terminal=True)
    with (bar := _Bar(shown)):
        for event in STORY:
            bar.hear(event)
    assert bar.finished.is_set()
    last = text(shown).replace("\r", "\n").splitlines()[-2]
    for part in ("done", "40/40", "samples 2/s", "1 retry"):
        assert part in last


def test_each_line_is_one_json_object() -> None:
    shown = console(terminal=False)
    lines = _Lines(shown, _as_json)
    for event in [STORY[0], ShardsKept("j", 100.0, 2, 20), *STORY[2:4], ShardFailed("j", 111.0, 1, 10, 20, 2, "E: no")]:
        lines.hear(event)
    told = [json.loads(line) for line in text(shown).splitlines()]
    assert [line["event"] for line in told] == ["started", "kept", "retried", "shard_failed"]
    assert told[0]["workers"] == 2
    assert told[1]["samples_done"] == 20
    assert (told[3]["start"], told[3]["stop"], told[3]["error"], told[3]["retries"]) == (10, 20, "E: no", 1)
    assert told[3]["samples_done"] == 30
    assert told[3]["samples_per_second"] == pytest.approx(10 / 11, abs=1e-3)  # not those that were there before


def test_a_worker_that_keeps_dying_does_not_fill_the_log() -> None:
    shown = console(terminal=False)
    lines = _Lines(shown, _as_json)
    for i in range(1000):
        lines.hear(ShardRetried("j", 101.0, i, 1, "the worker died"))
    assert len(text(shown).splitlines()) == 100


@pytest.mark.parametrize("terminal", [True, False])
def test_a_job_is_followed_to_its_end(inline_client: jacray.Client, terminal: bool) -> None:
    shown = console(terminal=terminal)
    job = inline_client.submit(mlp(), X, method="reverse")
    with progress(job, shown):
        job.result(timeout=60)
    assert "done" in text(shown)
    assert "40" in text(shown)


def test_a_failure_is_shown_and_raised(inline_client: jacray.Client) -> None:
    shown = console(terminal=False)
    job = inline_client.submit(Raises(), X, method="reverse")
    with pytest.raises(Exception, match="reactor"), progress(job, shown):
        job.result(timeout=60)
    last = json.loads(text(shown).splitlines()[-1])
    assert (last["event"], last["samples_done"], last["samples"]) == ("failed", 0, 40)
    assert "reactor" in last["error"]


def test_disabled_shows_nothing(inline_client: jacray.Client, capsys: pytest.CaptureFixture[str]) -> None:
    job = inline_client.submit(mlp(), X)
    with progress(job, style="off"):
        job.result(timeout=60)
    assert capsys.readouterr() == ("", "")


def test_standard_output_stays_the_programs_own(
    inline_client: jacray.Client, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    job = inline_client.submit(mlp(), X)
    with progress(job):
        job.result(timeout=60)
    captured = capsys.readouterr()
    assert captured.out == ""
    last = json.loads(captured.err.splitlines()[-1])
    assert (last["event"], last["job"], last["samples_done"]) == ("done", job.id, 40)


def test_a_cancelled_job_says_so() -> None:
    shown = console(terminal=False)
    lines = _Lines(shown, _in_words)
    lines.hear(STORY[0])
    lines.hear(JobCancelled("j", 101.0))
    assert "cancelled, 0 of 40 samples" in text(shown)

from __future__ import annotations

import io
from pathlib import Path

import jacray
import pytest
import torch
from jacray.events import JobCancelled, JobDone, JobStarted, ShardDone, ShardRetried
from jacray.progress import _Bar, _Lines, progress
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
    lines = _Lines(shown)
    for event in STORY:
        lines.hear(event)
    assert text(shown).splitlines() == [
        "job j: 40 samples in 4 shards on 2 workers",
        "job j: shard 1 is computed again: the worker died",
        "job j: 30 of 40 samples, 2 samples/s, 4 s left, 1 retries",
        "job j: done, 40 of 40 samples, 2 samples/s, 1 retries",
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
    assert "failed, 0 of 40 samples" in text(shown)


def test_disabled_shows_nothing(inline_client: jacray.Client, capsys: pytest.CaptureFixture[str]) -> None:
    job = inline_client.submit(mlp(), X)
    with progress(job, enabled=False):
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
    assert "done, 40 of 40 samples" in captured.err


def test_a_cancelled_job_says_so() -> None:
    shown = console(terminal=False)
    lines = _Lines(shown)
    lines.hear(STORY[0])
    lines.hear(JobCancelled("j", 101.0))
    assert "cancelled, 0 of 40 samples" in text(shown)

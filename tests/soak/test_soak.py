"""One minute of the soak; `make soak` is the twenty."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak.run import soak


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_minute_of_mixed_work_leaves_nothing_behind(tmp_path: Path) -> None:
    report = soak(tmp_path, minutes=1, clients=8, address="inline", pause=0.1)
    assert not report.errors
    assert not report.left
    assert not report.swollen
    assert report.passed

"""The short form of `make chaos`: each fault once, on few shards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jacray
import pytest

from tests.chaos import faults
from tests.chaos.ground import Ground, Verdict


@pytest.fixture(scope="module")
def client(local_client: jacray.Client) -> Iterator[jacray.Client]:
    """Two workers on the session's Ray, a short patience and small shards."""
    with jacray.Client("local", workers=2, shard_size=4, shard_timeout=8) as found:
        yield found


def holds(verdict: Verdict) -> None:
    assert verdict.faults == ()
    assert verdict.injected > 0


@pytest.mark.ray
@pytest.mark.parametrize(
    "fault",
    [
        faults.workers_die,
        faults.worker_hangs,
        faults.memory_runs_out,
        faults.poisoned,
        faults.cancelled_in_a_call,
        faults.scaled,
    ],
)
def test_workers(client: jacray.Client, tmp_path: Path, fault) -> None:
    holds(fault(Ground(tmp_path / "try", shards=30), client, seed=1))


@pytest.mark.parametrize("fault", [faults.block_truncated, faults.interrupted])
def test_the_coordinator(tmp_path: Path, fault) -> None:
    holds(fault(Ground(tmp_path / "try", shards=30, seconds=0.05), seed=1))


def test_the_coordinator_is_killed(tmp_path: Path) -> None:
    holds(faults.coordinator_killed(Ground(tmp_path / "try", shards=30, seconds=0.05), seed=1, times=1))


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"far": True}, {"address": "local"}])
def test_the_coordinator_is_killed_at_a_url_and_with_a_ray_of_its_own(tmp_path: Path, how: dict[str, Any]) -> None:
    times = 2 if "far" in how else 1
    holds(faults.coordinator_killed(Ground(tmp_path / "try", shards=60, seconds=0.05, **how), seed=1, times=times))


@pytest.mark.slow
def test_the_coordinator_is_killed_again_and_again(tmp_path: Path) -> None:
    holds(faults.coordinator_killed(Ground(tmp_path / "try", shards=60, seconds=0.02), seed=1))


@pytest.mark.slow
def test_ctrl_c_twice(tmp_path: Path) -> None:
    holds(faults.interrupted(Ground(tmp_path / "try", shards=60, seconds=0.02), seed=1, times=2))


@pytest.mark.slow
@pytest.mark.parametrize("fault", [faults.disk_full, faults.disk_read_only])
def test_storage(tmp_path: Path, fault) -> None:
    if not faults.can_mount(tmp_path / "probe"):
        pytest.skip("may not mount")
    holds(fault(Ground(tmp_path / "try", shards=60, seconds=0.02), seed=1))


@pytest.mark.slow
@pytest.mark.ray
def test_a_store_gone_read_only_under_the_workers(client: jacray.Client, tmp_path: Path) -> None:
    if not faults.can_mount(tmp_path / "probe"):
        pytest.skip("may not mount")
    holds(faults.store_read_only(Ground(tmp_path / "try", shards=60, seconds=0.05), client, seed=1))

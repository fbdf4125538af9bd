"""What only Ray can show: shared memory, lost workers, the same bits from any number of workers, who shuts it down."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import jacray
import psutil
import pytest
import torch
from jacray.events import ShardRetried

from tests.chaos.ground import ray_workers
from tests.toys import KillsAlways, KillsOnce, WhereMemoryLies, mlp

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
X = torch.randn(50, 5, generator=torch.Generator().manual_seed(0))
FIELDS = {
    "returns": ["jacobian", "weighted_gradient", "outputs", "mean_jacobian", "gram"],
    "weights": torch.ones(3),
    "method": "reverse",
    "chunk_size": 4,
}


@pytest.fixture(scope="module")
def one_worker(local_client: jacray.Client) -> Iterator[jacray.Client]:
    with jacray.Client("local", workers=1) as client:
        yield client


def test_workers_have_the_priority_of_whoever_started_them(local_client: jacray.Client) -> None:
    local_client.submit(mlp(), X, method="reverse").result(timeout=120)
    assert {worker.nice() for worker in ray_workers()} == {psutil.Process().nice()}


def same_bits(a: jacray.Result, b: jacray.Result) -> bool:
    pairs = zip(flat(a), flat(b), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def flat(result: jacray.Result) -> list[torch.Tensor]:
    leaves, _ = torch.utils._pytree.tree_flatten(dict(result))
    return leaves


@pytest.mark.parametrize("wrt", ["inputs", "params"])
def test_the_same_bits_from_inline_and_ray(local_client: jacray.Client, inline_client: jacray.Client, wrt: str) -> None:
    there = local_client.submit(mlp(), X, wrt=wrt, **FIELDS).result(timeout=120)
    here = inline_client.submit(mlp(), X, wrt=wrt, **FIELDS).result(timeout=120)
    assert there.plan.digest == here.plan.digest
    assert same_bits(there, here)
    assert {shard["worker"] for shard in here.receipt["shards"]} == {"inline"}
    assert all(shard["worker"].startswith("worker") for shard in there.receipt["shards"])


def test_the_same_bits_from_one_worker_and_two(local_client: jacray.Client, one_worker: jacray.Client) -> None:
    fields = {**FIELDS, "returns": ["jacobian", "weighted_gradient", "outputs"]}
    two = local_client.submit(mlp(), X, **fields).result(timeout=120)
    one = one_worker.submit(mlp(), X, **fields).result(timeout=120)
    assert same_bits(two, one)


def test_a_killed_worker_changes_nothing_but_the_record(local_client: jacray.Client, tmp_path: Path) -> None:
    model = KillsOnce(tmp_path / "mark")
    quiet = jacray.compute(model, X, **FIELDS)
    job = local_client.submit(model, X, **FIELDS)
    result = job.result(timeout=120)
    assert (tmp_path / "mark").exists()
    retried = [event for event in job.events() if isinstance(event, ShardRetried)]
    assert retried
    assert job.status().retries == len(retried) == len(result.receipt["retries"])
    again = local_client.submit(model, X, **FIELDS)
    assert again.status().retries == 0
    assert same_bits(result, again.result(timeout=120))
    torch.testing.assert_close(result.jacobian, quiet.jacobian)


@pytest.mark.slow
def test_a_deadly_shard_ends_the_job_and_names_its_samples(local_client: jacray.Client) -> None:
    job = local_client.submit(KillsAlways(), X, method="reverse", chunk_size=50)
    with pytest.raises(jacray.ShardError, match=r"samples \d+ to \d+ could not be computed: 4 workers were lost"):
        job.result(timeout=200)
    assert job.status().state == "failed"


def test_parameters_lie_in_shared_memory_and_nothing_else_does(local_client: jacray.Client) -> None:
    result = local_client.submit(WhereMemoryLies(), X, method="reverse", verify=False).result(timeout=120)
    assert result.jacobian[:, :, 0].unique(dim=0).tolist() == [[1.0, 0.0, 0.0]]


def test_a_client_joins_the_ray_that_is_there(local_client: jacray.Client, one_worker: jacray.Client) -> None:
    local_client.submit(mlp(), X).result(timeout=120)
    with jacray.Client("local", workers=1, cpus_per_worker=2) as guest:
        receipt = guest.submit(mlp(), X).result(timeout=120).receipt
    assert {shard["threads"] for shard in receipt["shards"]} == {2}
    assert local_client.submit(mlp(), X).result(timeout=120).plan.samples == 50


def test_one_process_has_one_ray(local_client: jacray.Client) -> None:
    local_client.submit(mlp(), X).result(timeout=120)
    with pytest.raises(jacray.RequestError, match="one Ray at a time"), jacray.Client("ray://127.0.0.1:1") as client:
        client.submit(mlp(), X)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        check=False, capture_output=True, text=True, timeout=200, cwd=ROOT, env={**os.environ, **environment},
    )  # fmt: skip


def processes_of(session: str) -> list[str]:
    """Command lines of living processes that carry a mark in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"JACRAY_TEST={session}".encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def test_ray_starts_and_ends_in_silence(tmp_path: Path) -> None:
    done = run(
        """
        import os, jacray, torch
        from pathlib import Path
        from tests.toys import KillsOnce
        with jacray.Client(workers=1) as client:
            job = client.submit(KillsOnce(Path(os.environ['MARK'])), torch.ones(4, 5))
            print(tuple(job.result(timeout=100).jacobian.shape), job.status().retries > 0)
        import ray
        print(ray.is_initialized())
        """,
        JACRAY_TEST=tmp_path.name,
        MARK=str(tmp_path / "mark"),
    )
    assert done.stderr == ""
    assert done.stdout == "(4, 3, 5) True\nFalse\n"
    assert done.returncode == 0
    assert processes_of(tmp_path.name) == []


@pytest.mark.slow
def test_a_ray_of_the_users_is_joined_and_left_running(tmp_path: Path) -> None:
    done = run(
        """
        import logging, ray, jacray, torch
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        with jacray.Client(workers=2) as client:
            print(tuple(client.submit(torch.nn.Linear(5, 3), torch.ones(4, 5)).result(timeout=100).jacobian.shape))
        print(ray.is_initialized())
        """
    )
    assert done.stdout == "(4, 3, 5)\nTrue\n", done.stderr


@pytest.mark.slow
def test_a_script_that_forgets_to_close_leaves_no_process(tmp_path: Path) -> None:
    done = run(
        """
        import jacray, torch
        client = jacray.Client(workers=1)
        print(tuple(client.submit(torch.nn.Linear(5, 3), torch.ones(4, 5)).result(timeout=100).jacobian.shape))
        """,
        JACRAY_TEST=tmp_path.name,
    )
    assert (done.stdout, done.stderr) == ("(4, 3, 5)\n", "")
    assert processes_of(tmp_path.name) == []


@pytest.mark.slow
def test_ctrl_c_ends_everything(tmp_path: Path) -> None:
    code = """
        import jacray, torch
        from pathlib import Path
        from tests.toys import Gated
        with jacray.Client(workers=1) as client:
            job = client.submit(Gated(Path('/nowhere/gate')), torch.ones(4, 5), method='reverse')
            next(job.events())
            print('running', flush=True)
            job.result()
        """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=ROOT, env={**os.environ, "JACRAY_TEST": tmp_path.name}, start_new_session=True,
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        # The whole group, as a terminal does it: Ray's own processes hear it too.
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert errors.splitlines()[-1] == "KeyboardInterrupt"
    assert "ray." not in errors
    assert processes_of(tmp_path.name) == []


@pytest.mark.slow
def test_no_cluster_at_an_address_is_a_clear_error() -> None:
    done = run(
        """
        import jacray, torch
        for address in ('ray://127.0.0.1:1', 'auto'):
            try:
                jacray.Client(address).submit(torch.nn.Linear(5, 3), torch.ones(4, 5))
            except jacray.RequestError as error:
                print(error)
        """,
        RAY_ADDRESS="127.0.0.1:2",  # where `auto` looks first
    )
    first, second = done.stdout.splitlines()
    assert first.startswith("address: nobody answers there (")
    assert first.endswith("got 'ray://127.0.0.1:1'. start Ray there with `ray start --head`")
    assert "got '127.0.0.1:2'" in second

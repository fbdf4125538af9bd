"""The life of a job, on every client: states, snapshots, cancelling, mistakes."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import jacray
import pytest
import torch
from jacray.events import JobDone, JobFailed, JobStarted, ShardDone
from jacray.orders import in_units
from jacray_workers.plan import Candidate
from jacray_workers.request import make_request
from torch import nn

from tests.toys import Deep, Gated, MineError, Raises, Scales, ScalesAtWork, mlp


def tree_model(t: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {"sum": t["a"].sum(-1) * t["b"][0], "pair": t["b"][1] ** 2}


X = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))


def test_a_job_goes_from_running_to_done(client: jacray.Client, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    job = client.submit(Gated(gate), X, method="reverse", chunk_size=5)
    assert job.plan.samples == 40
    assert not job.status().finished
    with pytest.raises(TimeoutError, match="must finish within"):
        job.result(timeout=0.05)
    gate.touch()
    assert job.result(timeout=120).jacobian.shape == (40, 3, 5)
    status = job.status()
    assert (status.state, status.samples_done, status.samples, status.error) == ("done", 40, 40, "")
    assert status.shards_done == status.shards == job.plan.shard_count
    assert status.elapsed == job.status().elapsed > 0
    assert "done, 40 of 40 samples" in repr(job)


def test_what_the_caller_changes_later_does_not_change_the_job(client: jacray.Client, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    model, x, k = Gated(gate), X.clone(), torch.randn(40, 3)
    before = jacray.compute(model, x, weights=k, returns=["jacobian", "weighted_gradient"], method="reverse")
    job = client.submit(model, x, weights=k, returns=["jacobian", "weighted_gradient"], method="reverse")
    with torch.no_grad():
        model.linear.weight.zero_()
    x.fill_(100)
    k.fill_(100)
    gate.touch()
    result = job.result(timeout=120)
    torch.testing.assert_close(result.jacobian, before.jacobian)
    torch.testing.assert_close(result.weighted_gradient, before.weighted_gradient)


def test_the_callers_random_numbers_and_threads_are_left_alone(client: jacray.Client, tmp_path: Path) -> None:
    gate, threads = tmp_path / "gate", torch.get_num_threads()
    job = client.submit(Gated(gate), X, method="reverse")
    assert isinstance(next(job.events()), JobStarted)
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    first = torch.rand(1)
    gate.touch()
    job.result(timeout=120)
    assert torch.equal(torch.cat([first, torch.rand(1)]), expected)
    assert torch.get_num_threads() == threads


def test_the_caller_may_change_the_results(client: jacray.Client) -> None:
    fields = {"returns": ["jacobian", "outputs", "gram", "mean_jacobian"], "method": "reverse"}
    result = client.submit(mlp(), X, **fields).result(timeout=120)
    for _, value in result:
        value.zero_()
    again = client.submit(mlp(), X, **fields).result(timeout=120)
    for _, value in again:
        assert value.abs().sum() > 0


def test_jobs_share_a_client(client: jacray.Client, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    jobs = [client.submit(Gated(gate), X * i, method="reverse") for i in range(1, 4)]
    gate.touch()
    for i, job in enumerate(jobs, 1):
        expected = jacray.jacobian(Gated(gate), X * i, method="reverse")
        torch.testing.assert_close(job.result(timeout=120).jacobian, expected)


def test_events_tell_the_whole_story(client: jacray.Client) -> None:
    job = client.submit(mlp(), X, method="reverse", chunk_size=5)
    events = list(job.events())
    assert isinstance(events[0], JobStarted)
    assert isinstance(events[-1], JobDone)
    done = [event for event in events if isinstance(event, ShardDone)]
    assert sorted(event.shard for event in done) == list(range(job.plan.shard_count))
    assert sum(event.samples for event in done) == 40
    assert list(job.events()) == events
    heard: list[object] = []
    job.listen(heard.append)
    assert heard == events


def test_a_listener_that_fails_does_not_end_the_job(
    inline_client: jacray.Client, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gate = tmp_path / "gate"
    job = inline_client.submit(Gated(gate), X, method="reverse")
    calls: list[object] = []

    def fails(event: object) -> None:
        calls.append(event)
        if isinstance(event, ShardDone):
            raise RuntimeError("listener")

    job.listen(fails)
    gate.touch()
    job.result(timeout=60)
    assert isinstance(calls[-1], ShardDone)
    assert "is not called again" in caplog.text


def test_cancelling_between_chunks(inline_client: jacray.Client, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    job = inline_client.submit(Gated(gate), X, method="backward_loop", chunk_size=1)
    assert job.cancel()
    gate.touch()
    with pytest.raises(jacray.JobError, match="cancelled"):
        job.result(timeout=60)
    assert job.status().state == "cancelled"
    assert job.status().samples_done < 40
    assert not job.cancel()


@pytest.mark.ray
def test_cancelling_inside_a_chunk_that_never_ends(local_client: jacray.Client, tmp_path: Path) -> None:
    stuck = local_client.submit(Gated(tmp_path / "never"), X, method="reverse")
    assert isinstance(next(stuck.events()), JobStarted)
    stuck.cancel()
    with pytest.raises(jacray.JobError, match="cancelled"):
        stuck.result(timeout=30)
    assert stuck.status().state == "cancelled"
    torch.testing.assert_close(
        local_client.submit(mlp(), X, method="reverse").result(timeout=120).jacobian,
        jacray.jacobian(mlp(), X, method="reverse"),
    )


@pytest.mark.ray
def test_cancelling_one_job_leaves_the_others(local_client: jacray.Client, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    stuck = local_client.submit(Gated(tmp_path / "never"), X, method="reverse")
    other = local_client.submit(Gated(gate), X, method="reverse", chunk_size=2)
    stuck.cancel()
    with pytest.raises(jacray.JobError):
        stuck.result(timeout=30)
    gate.touch()
    torch.testing.assert_close(other.result(timeout=120).jacobian, jacray.jacobian(Gated(gate), X, method="reverse"))


def test_the_users_own_error_comes_as_it_was_raised(client: jacray.Client) -> None:
    job = client.submit(Raises(), X, method="reverse")
    with pytest.raises((MineError, jacray.ModelError), match="the reactor is cold") as caught:
        job.result(timeout=120)
    assert "RayTaskError" not in type(caught.value).__name__
    status = job.status()
    assert status.state == "failed"
    assert "the reactor is cold" in status.error
    assert isinstance(list(job.events())[-1], JobFailed)


def test_an_engine_error_comes_as_it_is(client: jacray.Client) -> None:
    x = X.clone()
    x[17, 2] = float("nan")
    job = client.submit(mlp(), x, nan_policy="raise", method="reverse")
    with pytest.raises(jacray.NonFiniteError) as caught:
        job.result(timeout=120)
    assert "first at sample 17" in str(caught.value)
    assert caught.value.argument == "nan_policy"


def test_mistakes_are_raised_by_submit(client: jacray.Client) -> None:
    with pytest.raises(jacray.RequestError, match="did you mean chunk_size"):
        client.submit(mlp(), X, chunksize=3)
    with pytest.raises(jacray.RequestError, match="method"):
        client.submit(mlp(), X, method="magic")
    with pytest.raises(jacray.InputError, match="at least one sample"):
        client.submit(mlp(), X[:0])
    with pytest.raises(jacray.InputError, match="floating point"):
        client.submit(mlp(), X.long())
    with pytest.raises(jacray.RequestError, match="glob"):
        client.submit(mlp(), X, wrt="nothing.*")
    with pytest.raises(jacray.UserError, match="weights"):
        client.submit(mlp(), X, weights=torch.ones(7), returns=["weighted_gradient"])
    with pytest.raises(jacray.ModelError, match="must accept the inputs"):
        client.submit(mlp(), X[:, :3])


def test_a_model_that_cannot_travel_is_refused(client: jacray.Client) -> None:
    model = nn.Linear(5, 3)
    model.lock = threading.Lock()
    with pytest.raises(jacray.ModelError, match="must be picklable"):
        client.submit(model, X)


def test_inputs_may_be_arrays_views_and_parts_of_a_graph(client: jacray.Client) -> None:
    expected = jacray.jacobian(mlp(), X[:4], method="reverse")
    large = torch.zeros(100_000, 5)
    large[10:14] = X[:4]
    part_of_a_graph = X[:4].clone().requires_grad_() * 1
    for x in (X[:4].numpy(), X[:4].tolist(), large[10:14], part_of_a_graph):
        found = client.submit(mlp(), x, method="reverse").result(timeout=120).jacobian
        torch.testing.assert_close(found, expected)
        assert not found.requires_grad


def test_inputs_may_be_trees(client: jacray.Client) -> None:
    inputs = {"a": X, "b": (X[:, 0], X[:, 1:3])}
    found = client.submit(tree_model, (inputs,), wrt="inputs").result(timeout=120).jacobian
    here = jacray.jacobian(tree_model, (inputs,), wrt="inputs")
    leaves = torch.utils._pytree.tree_leaves
    assert len(leaves(found)) == 6
    for one, other in zip(leaves(found), leaves(here), strict=True):
        torch.testing.assert_close(one, other)


def test_functions_made_on_the_spot_travel(client: jacray.Client) -> None:
    scale = torch.arange(5.0)
    result = client.submit(lambda x: (x * scale).sum(-1), X).result(timeout=120)
    torch.testing.assert_close(result.jacobian, scale.expand(40, 5).contiguous())


def test_cancelling_inside_a_long_chunk_in_this_process(inline_client: jacray.Client) -> None:
    x = torch.randn(300, 512)
    job = inline_client.submit(Deep(60, 512), x, returns="norms", method="reverse", chunk_size=100, verify=False)
    assert isinstance(next(job.events()), JobStarted)
    job.cancel()
    assert job.wait(20)  # a chunk takes half a minute
    assert job.status().state == "cancelled"


def test_a_long_job_is_cut_into_units_that_may_be_lost(inline_client: jacray.Client) -> None:
    job = inline_client.submit(Deep(20, 512), torch.randn(10_000, 512), returns="norms", method="reverse", verify=False)
    assert job.cancel()
    assert job.plan.shard_size < job.plan.samples
    assert job.plan.shard_size % job.plan.chunk_size == 0


@pytest.mark.parametrize(("again", "chunk", "shard"), [(0.06, 16, 320), (0.002, 256, 9984), (3.0, 1, 6), (100.0, 1, 3)])
def test_units_are_as_long_as_the_shorter_of_two_timings_allows(again: float, chunk: int, shard: int) -> None:
    request = make_request(returns="norms", method="reverse")
    plan = jacray.plan(torch.nn.Linear(3, 2), torch.randn(10_000, 3), returns="norms", method="reverse")
    timed = Candidate("reverse", seconds=6.0 * plan.samples, measured=True)
    plan = replace(plan, chunk_size=4096, shard_size=plan.samples, candidates=(timed,))
    cut = in_units(plan, request, None, lambda: again)
    assert (cut.chunk_size, cut.shard_size) == (chunk, shard)


@pytest.mark.parametrize(("each", "workers", "shards"), [(1e-2, 2, 127), (1e-3, 8, 40), (1e-5, 2, 1), (1e-3, 1, 1)])
def test_workers_that_share_a_job_end_it_at_about_the_same_time(each: float, workers: int, shards: int) -> None:
    request = make_request(returns=["norms", "gram"], method="reverse", chunk_size=1)
    plan = jacray.plan(torch.nn.Linear(3, 2), torch.randn(10_000, 3), request=request)
    timed = Candidate("reverse", seconds=each * plan.samples, measured=True)
    plan = replace(plan, shard_size=plan.samples, candidates=(timed,))
    assert in_units(plan, request, None, lambda: each, workers).shard_count == shards
    large = tuple(replace(array, shape=(1000, 1000)) if array.axis < 0 else array for array in plan.arrays)
    alone = in_units(plan, request, None, lambda: each)
    assert in_units(replace(plan, arrays=large), request, None, lambda: each, workers).shard_size == alone.shard_size


@pytest.mark.ray
def test_a_model_that_writes_into_its_parameters_on_workers_only_is_refused(local_client: jacray.Client) -> None:
    job = local_client.submit(ScalesAtWork(), X, method="backward_loop", verify=False)
    with pytest.raises(jacray.ModelError, match="wherever it runs, or nowhere"):
        job.result(timeout=120)


@pytest.mark.ray
def test_a_model_that_writes_into_its_parameters_finds_them_as_the_job_did(local_client: jacray.Client) -> None:
    model = Scales()
    given = model.linear.weight.detach().clone()
    layer = nn.Linear(5, 3)
    layer.load_state_dict({"weight": 2 * given, "bias": model.linear.bias.detach()})
    expected = jacray.jacobian(lambda x: torch.tanh(layer(x)), X)
    for _ in range(4):  # what one worker writes into memory that all share, another may read only now and then
        found = local_client.submit(model, X, method="backward_loop", verify=False).result(timeout=120).jacobian
        torch.testing.assert_close(found, expected)
    assert torch.equal(model.linear.weight, given)


def test_checks_are_on_for_jobs_and_off_for_functions(client: jacray.Client) -> None:
    receipt = client.submit(mlp(), X).result(timeout=120).receipt
    assert receipt["verified"]["checks"] > 0
    assert receipt["verified"]["passed"] is True
    assert client.submit(mlp(), X, verify=False).result(timeout=120).receipt["verified"]["checks"] == 0
    assert jacray.compute(mlp(), X).receipt["verified"]["checks"] == 0


def test_a_receipt_tells_how_the_numbers_came_about(client: jacray.Client) -> None:
    x = X.clone()
    x[17, 2] = float("nan")
    job = client.submit(mlp(), x, method="reverse", chunk_size=5, seed=3, weights=torch.ones(3))
    result = job.result(timeout=120)
    receipt = json.loads(json.dumps(result.receipt, allow_nan=False))
    assert receipt["job"] == job.id
    assert receipt["versions"]["torch"] == torch.__version__
    assert set(receipt["versions"]) == {"jacray", "torch", "numpy", "ray", "python"}
    assert (receipt["seed"], receipt["device"], receipt["threads"]) == (3, "cpu", 1)
    assert receipt["plan"]["chunk_size"] == 5
    assert receipt["plan_digest"] == result.plan.digest
    assert receipt["request"]["weights"] == "float32 of shape [3]"
    assert [s["index"] for s in receipt["shards"]] == list(range(job.plan.shard_count))
    assert {s["threads"] for s in receipt["shards"]} == {1}
    assert receipt["seconds"]["compute"] > 0
    (bad,) = receipt["nonfinite"]
    assert (bad["key"], bad["first"]) == ("jacobian", 17)


def test_a_closed_client_refuses_and_closing_twice_is_fine() -> None:
    client = jacray.Client("inline")
    assert not client.closed
    client.close()
    client.close()
    assert client.closed
    with pytest.raises(jacray.JobError, match="closed"):
        client.submit(mlp(), X)


def test_leaving_the_block_waits_for_what_runs() -> None:
    with jacray.Client("inline") as client:
        job = client.submit(mlp(), X)
    assert job.status().state == "done"


def test_an_exception_in_the_block_cancels_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave() -> None:
        with jacray.Client("inline") as client:
            jobs.append(client.submit(Gated(gate), X, chunk_size=1))
            raise KeyboardInterrupt

    def cancel_and_open(job: jacray.Job) -> None:
        cancel(job)
        gate.touch()

    gate, cancel = tmp_path / "gate", jacray.Job.cancel
    monkeypatch.setattr(jacray.Job, "cancel", cancel_and_open)
    jobs: list[jacray.Job] = []
    with pytest.raises(KeyboardInterrupt):
        leave()
    assert jobs[0].status().state == "cancelled"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"address": "locl"}, "inline, local, auto, ray://HOST:PORT; got 'locl'. did you mean local?"),
        ({"address": "ftp://127.0.0.1:8765"}, "address: must be one of"),
        ({"address": "http://"}, "address: must be http://HOST:PORT or https://HOST:PORT; got 'http://'"),
        ({"address": "http://127.0.0.1:876500"}, "address: must be http://HOST:PORT"),
        ({"address": "inline", "workers": 0}, "workers: must be a whole number, at least 1; got 0"),
        ({"address": "inline", "cpus_per_worker": 0}, "cpus_per_worker: must be above 0"),
        ({"address": "inline", "gpus_per_worker": -1}, "gpus_per_worker: must be 0 or more"),
    ],
)
def test_a_wrong_client_is_refused_at_once(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(jacray.RequestError) as caught:
        jacray.Client(**arguments)
    assert text in str(caught.value)

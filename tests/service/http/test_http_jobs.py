"""Jobs over HTTP: the same calls and the same bits as on one's own machine."""

from __future__ import annotations

import threading
import time
from typing import Any

import jacray
import numpy as np
import pytest
import torch
from jacray.events import JobDone, JobStarted, ShardDone
from jacray_workers.models import as_model
from torch import nn

from tests.service.http.test_http_compute import NET
from tests.serving import BOB, Server

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "reverse", "chunk_size": 7, "returns": ["jacobian", "norms", "outputs"]},
        {"method": "layerwise", "wrt": "params"},
        {"method": "layerwise", "wrt": "params", "form": "factors"},
        {"method": "reverse", "weights": torch.ones(2, 40, 2), "returns": ["weighted_gradient", "gram", "ntk"]},
    ],
    ids=["inputs", "params", "factors", "many"],
)
def test_a_job_gives_the_bits_of_the_inline_client(server: Server, fields: dict[str, Any]) -> None:
    with jacray.Client("inline", workers=1) as client:  # as many as the server has, for the same shards
        here = client.submit(as_model(NET), X, **fields).result()
    with server.client() as client:
        job = client.submit(NET, X, **fields)
        there = job.result(timeout=100)
        assert job.status().state == "done"
        assert job.status().samples_done == 40
        assert there.names == here.names
        for name, value in here:
            _same(getattr(there, name), value)
        assert there.receipt["verified"]["checks"] > 0
        assert job.plan.samples == 40
        assert fields["method"] in job.explained
        job.delete()
        with pytest.raises(jacray.UserError, match="names no job of yours"):
            job.status()


def _same(a: Any, b: Any) -> None:
    if isinstance(b, dict):
        assert list(a) == list(b)
        for name in b:
            _same(a[name], b[name])
        return
    assert torch.equal(torch.as_tensor(np.asarray(a)), torch.as_tensor(np.asarray(b)))


def test_events_come_as_they_happen_and_again_from_where_one_was(server: Server) -> None:
    with server.client() as client:
        job = client.submit(NET, X, chunk_size=5, method="reverse")
        found = list(job.events())
        assert isinstance(found[0], JobStarted)
        assert isinstance(found[-1], JobDone)
        assert sum(event.samples for event in found if isinstance(event, ShardDone)) == 40
        status, headers, text = server.ask("GET", f"/v1/jobs/{job.id}/events", headers={"Last-Event-ID": "1"})
        assert (status, headers["content-type"]) == (200, "text/event-stream")
        assert b"JobStarted" not in text
        assert b"event: JobDone" in text


def test_a_part_of_a_result(server: Server) -> None:
    with server.client() as client:
        job = client.submit(NET, X, weights=torch.ones(2, 40, 2), returns=["jacobian", "weighted_gradient", "gram"])
        whole = job.result(timeout=100)
        one = job.array("jacobian", 5, 9)
        assert torch.equal(one, whole.jacobian[5:9])
        assert torch.equal(job.array("weighted_gradient", 30), whole.weighted_gradient[:, 30:])
        assert torch.equal(job.array("gram"), whole.gram)
        with pytest.raises(jacray.UserError, match="must lie within the 40 samples"):
            job.array("jacobian", 39, 41)
        with pytest.raises(jacray.UserError, match="did you mean jacobian"):
            job.array("jacobain")


def test_a_mistake_is_told_where_the_job_is_submitted(server: Server) -> None:
    with server.client() as client:
        before = len(client.jobs())
        with pytest.raises(jacray.RequestError, match="must have one of the shapes"):
            client.submit(NET, X, weights=torch.ones(9), returns=["weighted_gradient"])
        with pytest.raises(jacray.BudgetError):
            client.submit(NET, X, returns=["ntk"], memory_budget=10)
        assert len(client.jobs()) == before


def test_the_same_key_gives_the_same_job(server: Server) -> None:
    with server.client() as client, server.client(BOB) as bob:
        first = client.submit(NET, X, key="one", method="reverse")
        assert client.submit(NET, X, key="one", method="reverse").id == first.id
        assert bob.submit(NET, X, key="one", method="reverse").id != first.id
        with pytest.raises(jacray.UserError, match="was given for another job"):
            client.submit(NET, X + 1, key="one", method="reverse")
        assert client.job(first.id).result(timeout=60).names == ("jacobian",)


def slow(seconds: float) -> dict[str, Any]:
    """A request that takes about so long on this machine: many samples, one at a time, of a deep net."""
    layers = [{"kind": "Linear", "in_features": 64, "out_features": 64}, {"kind": "Tanh"}] * 30
    del seconds
    return {"kind": "layers", "layers": layers}


def test_cancel_ends_a_job_soon(server: Server) -> None:
    with server.client() as client:
        job = client.submit(slow(60), torch.randn(20_000, 64), method="backward_loop", chunk_size=1, verify=False)
        with pytest.raises(TimeoutError):
            job.result(timeout=1)
        began = time.monotonic()
        assert job.cancel()
        with pytest.raises(jacray.JobError, match="was cancelled"):
            job.result(timeout=60)
        assert time.monotonic() - began < 30
        assert job.status().state == "cancelled"
        assert not job.cancel()


class Handmade(nn.Module):
    """No spec describes it: it travels as a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (torch.sin(x * self.scale) @ torch.ones(3, 2)) ** 2


def test_a_module_travels_as_a_graph(server: Server) -> None:
    model = Handmade().train()
    with server.client() as client:
        for _ in range(2):
            here = jacray.compute(model, X, method="reverse", wrt=["inputs", "scale"])
            for there in (
                client.compute(model, X, method="reverse", wrt=["inputs", "scale"]),
                client.submit(model, X, method="reverse", wrt=["inputs", "scale"]).result(timeout=60),
            ):
                assert list(there.jacobian) == list(here.jacobian)
                for name in here.jacobian:
                    torch.testing.assert_close(
                        torch.as_tensor(np.asarray(there.jacobian[name])),
                        torch.as_tensor(np.asarray(here.jacobian[name])),
                    )  # fmt: skip
            with torch.no_grad():
                model.scale.data.mul_(2)  # what was sent ahead must not be used again
    assert model.training


def test_what_cannot_be_exported_is_told_what_to_do(server: Server) -> None:
    def branches(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if bool(x.sum() > 0) else x

    with server.client() as client, pytest.raises(jacray.ModelError, match=r"export"):
        client.submit(branches, X)


def test_what_was_deleted_is_sent_again(server: Server) -> None:
    model = Handmade()
    with server.client() as client:
        first = client.compute(model, X, method="reverse")
        for upload in server.ask("GET", "/v1/models")[2]["models"]:
            assert server.ask("DELETE", f"/v1/models/{upload['digest']}")[0] == 204
        assert torch.equal(client.compute(model, X, method="reverse").jacobian, first.jacobian)


def test_jobs_can_be_awaited(server: Server) -> None:
    import asyncio

    async def both() -> list[Any]:
        async with jacray.AsyncClient(server.url, token="alice-has-a-long-token") as client:
            jobs = [await client.submit(NET, X + i, method="reverse") for i in range(2)]
            small = await client.compute(NET, X, method="reverse")
            return [small, *[await job for job in jobs]]

    small, first, second = asyncio.run(both())
    assert torch.equal(small.jacobian, first.jacobian)
    assert not torch.equal(first.jacobian, second.jacobian)


def test_users_do_not_see_each_other(server: Server) -> None:
    with server.client() as alice, server.client(BOB) as bob:
        mine = alice.submit(NET, X)
        mine.result(timeout=60)
        assert mine.id not in {job["id"] for job in bob.jobs()}
        for method, path in (
            ("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/result"), ("GET", "/receipt"),
            ("GET", "/events"), ("GET", "/plan"),
        ):  # fmt: skip
            status, _, found = server.ask(method, f"/v1/jobs/{mine.id}{path}", token=BOB)
            unknown = server.ask(method, f"/v1/jobs/{'0' * 12}{path}", token=BOB)[2]
            assert status == 404
            assert found["rule"] == unknown["rule"]
        assert alice.job(mine.id).status().state == "done"


def test_health_answers_while_work_is_done(server: Server) -> None:
    with server.client() as client:
        job = client.submit(slow(60), torch.randn(20_000, 64), method="backward_loop", chunk_size=1, verify=False)
        answered = threading.Event()
        for _ in range(20):
            assert server.ask("GET", "/healthz", token="")[0] == 200
        answered.set()
        job.cancel()
        job.wait(60)

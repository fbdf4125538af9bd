"""Small work of one kind that comes together is computed as one batch; nobody's answer depends on whose it stood by."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jacray
import numpy as np
import pytest
import torch
from jacray_workers.models import as_model

from tests.service.http.test_http_compute import NET
from tests.service.http.test_http_limits import DEEP
from tests.serving import BOB, Server

BUSY = {"method": "backward_loop", "chunk_size": 1, "returns": ["norms"]}


def together(server: Server, calls: list[Callable[[jacray.Client], Any]], token: str | None = None) -> list[Any]:
    """The answers to calls that wait together: the server's one process is kept busy until all have been sent."""
    given = {} if token is None else {"token": token}
    with server.client(**given) as client, ThreadPoolExecutor(len(calls) + 1) as pool:
        busy = pool.submit(lambda: client.compute(DEEP, torch.randn(8, 64), **BUSY))
        time.sleep(0.2)
        found = [pool.submit(call, client) for call in calls]
        busy.result()
        return [_answer(one) for one in found]


def _answer(one: Any) -> Any:
    try:
        return one.result(timeout=60)
    except jacray.UserError as error:
        return error


@pytest.mark.parametrize("even", [False, True], ids=["of many sizes", "of one size"])
@pytest.mark.parametrize(
    "fields",
    [
        {"returns": ["jacobian", "outputs", "norms"]},
        {"returns": ["weighted_gradient"], "weights": "per sample"},
        {"returns": ["weighted_gradient"], "weights": torch.tensor([1.0, 2.0])},
        {"returns": ["weighted_gradient"], "weights": "many"},
        {"returns": ["jvp", "singular_values"], "vectors": torch.ones(3)},
        {"returns": ["weighted_gradient"], "wrt": "params", "reduction": "none", "weights": torch.ones(2)},
    ],
    ids=lambda fields: "-".join(map(str, [*fields["returns"], fields.get("wrt", ""), type(fields.get("weights"))])),
)
def test_answers_are_those_of_single_requests(server: Server, fields: dict[str, Any], even: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    # Of one size, messages differ in their numbers alone, and are read and answered as one array.
    sizes = [2] * 6 if even or fields.get("weights") == "many" else [1, 3, 1, 2, 1, 1]
    batches = [torch.randn(n, 3, generator=generator) for n in sizes]

    def asked(x: torch.Tensor) -> dict[str, Any]:
        count = len(x)
        shapes = {"per sample": (count, 2), "many": (3, count, 2)}
        weights = fields.get("weights")
        given = torch.randn(shapes[weights], generator=generator) if isinstance(weights, str) else weights
        return {**fields, "method": "reverse", **({} if given is None else {"weights": given})}

    requests = [asked(x) for x in batches]
    for _ in range(2):  # the second time the batch is warm
        found = together(
            server,
            [lambda c, x=x, r=r: c.compute(NET, x, **r) for x, r in zip(batches, requests, strict=True)],
        )
        assert max(answer.receipt["batched_with"] for answer in found) >= 1
        for answer, x, request in zip(found, batches, requests, strict=True):
            alone = jacray.compute(as_model(NET), x, **request)
            assert answer.plan.samples == len(x)
            for name, value in alone:
                _close(getattr(answer, name), value)


def _close(a: Any, b: Any) -> None:
    if isinstance(b, dict):
        for name in b:
            _close(a[name], b[name])
        return
    torch.testing.assert_close(torch.as_tensor(np.asarray(a)), torch.as_tensor(np.asarray(b)))


def test_a_bad_sample_fails_alone(server: Server) -> None:
    root = {"kind": "function", "expression": "sqrt(a[0])"}
    values = [4.0, -1.0, 9.0, 16.0, -4.0]
    found = together(
        server,
        [lambda c, v=v: c.compute(root, [[v]], nan_policy="raise", method="reverse") for v in values],
    )
    for value, answer in zip(values, found, strict=True):
        if value < 0:
            assert isinstance(answer, jacray.NonFiniteError)
        else:
            torch.testing.assert_close(answer.jacobian, torch.tensor([[0.5 / value**0.5]]))


def test_a_wrong_shape_fails_alone(server: Server) -> None:
    calls = [lambda c: c.compute(NET, torch.ones(1, 3), method="reverse") for _ in range(3)]
    calls.insert(1, lambda c: c.compute(NET, torch.ones(1, 4), method="reverse"))
    found = together(server, calls)
    assert isinstance(found[1], jacray.UserError)
    assert all(answer.jacobian.shape == (1, 2, 3) for i, answer in enumerate(found) if i != 1)


def test_sums_over_the_batch_are_nobody_elses(server: Server) -> None:
    batches = [torch.full((2, 3), float(i)) for i in range(4)]
    fields: dict[str, Any] = {"wrt": "params", "returns": ["weighted_gradient", "gram"], "weights": torch.ones(2)}
    found = together(server, [lambda c, x=x: c.compute(NET, x, **fields) for x in batches])
    for answer, x in zip(found, batches, strict=True):
        alone = jacray.compute(as_model(NET), x, **fields)
        _close(answer.weighted_gradient, alone.weighted_gradient)


def test_a_model_that_mixes_its_samples_is_noticed(server: Server) -> None:
    mixing = {"kind": "function", "expression": "a[0] * 1"}
    layers = {"kind": "layers", "layers": [{"kind": "Softmax", "dim": 0}]}
    found = together(server, [lambda c: c.compute(layers, torch.randn(2, 3)) for _ in range(3)])
    assert all(isinstance(answer, jacray.UserError) for answer in found)
    assert together(server, [lambda c: c.compute(mixing, [[2.0]], method="reverse")])[0].jacobian.tolist() == [[1.0]]


def test_who_asks_much_does_not_keep_others_waiting(server: Server) -> None:
    order: list[str] = []
    lock = threading.Lock()

    def ask(client: jacray.Client, who: str, value: float) -> None:
        with lock:
            order.append(f"{who} asks")
        client.compute(NET, torch.full((1, 3), value), method="reverse", training=True)  # goes alone
        with lock:
            order.append(who)

    with server.client() as alice, server.client(BOB) as bob, ThreadPoolExecutor(64) as pool:
        busy = pool.submit(lambda: alice.compute(DEEP, torch.randn(8, 64), **BUSY))
        time.sleep(0.2)
        many = [pool.submit(ask, alice, "alice", float(i)) for i in range(50)]
        time.sleep(0.3)
        one = pool.submit(ask, bob, "bob", 1.0)
        for future in (busy, *many, one):
            future.result(timeout=60)
    between = order[order.index("bob asks") : order.index("bob")]
    # Those that were being answered when bob asked, and a few by turns: not the forty that wait.
    assert between.count("alice") < 20


def test_work_may_ask_to_be_computed_alone(server: Server) -> None:
    calls = [lambda c, i=i: c.compute(NET, torch.ones(1, 3), method="reverse", batch=i % 2 == 0) for i in range(6)]
    found = together(server, calls)
    assert [answer.receipt["batched_with"] for answer in found[1::2]] == [0, 0, 0]
    assert max(answer.receipt["batched_with"] for answer in found[::2]) >= 1

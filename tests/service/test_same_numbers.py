"""The same numbers whatever the door, the workers, the shards and the chunks: to the bit where the plan is the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jacray
import pytest
import torch
from torch import Tensor, nn

from tests import reference
from tests.door import compute

SAMPLES = 23
REQUESTS: tuple[dict[str, Any], ...] = (
    {"returns": ["outputs", "jacobian", "weighted_gradient"]},
    {"wrt": "params", "returns": ["jacobian", "weighted_gradient"], "form": "dense"},
    {"wrt": "params", "returns": ["weighted_gradient"], "reduction": "none"},
    {"wrt": ["inputs", "*.bias"], "returns": ["jacobian", "mean_jacobian", "norms"]},
)


def case(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.LayerNorm(9), nn.Linear(9, 4)).to(dtype)
    return net, torch.randn(SAMPLES, 6, dtype=dtype), torch.randn(SAMPLES, 4, dtype=dtype)


def fields(request: dict[str, Any], k: Tensor) -> dict[str, Any]:
    return {**request, "weights": k} if "weighted_gradient" in request["returns"] else request


def leaves(found: Any) -> list[Tensor]:
    if isinstance(found, dict):
        return [leaf for key in sorted(found) for leaf in leaves(found[key])]
    return [found.dense() if hasattr(found, "dense") else found]


def assert_close(a: Any, b: Any, names: list[str], tolerance: float) -> None:
    for name in names:
        for x, y in zip(leaves(getattr(a, name)), leaves(getattr(b, name)), strict=True):
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", ["reverse", "forward", "backward_loop", "layerwise"])
@pytest.mark.parametrize("chunk", [1, 2, 7, 22, 23, 100])
def test_any_chunk(method: str, chunk: int) -> None:
    net, x, k = case(torch.float64)
    request = fields({"returns": ["jacobian", "weighted_gradient", "norms", "gram"]}, k)
    whole = compute(net, x, method=method, **request)
    cut = compute(net, x, method=method, chunk_size=chunk, **request)
    assert cut.plan.chunk_size == min(chunk, SAMPLES)
    assert_close(cut, whole, request["returns"], 1e-12)
    assert reference.worst(cut.jacobian, reference.jacobian(net, x)) < 1e-10


@pytest.mark.parametrize("shard", [1, 3, 8, 23])
def test_any_shard(shard: int) -> None:
    net, x, k = case(torch.float64)
    request = fields({"wrt": ["params", "inputs"], "returns": ["jacobian", "weighted_gradient", "mean_jacobian"]}, k)
    whole = compute(net, x, method="reverse", **request)
    cut = compute(
        net, x, method="reverse", change=lambda p: replace(p, shard_size=shard, chunk_size=min(shard, 2)), **request
    )
    assert len(cut.shards) == -(-SAMPLES // shard)
    assert_close(cut, whole, request["returns"], 1e-12)


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: "-".join(map(str, r.values())))
def test_one_plan_gives_one_set_of_bits(request_: dict[str, Any]) -> None:
    net, x, k = case()
    first = compute(net, x, workers=3, **fields(request_, k))
    again = compute(net, x, plan=first.plan, **fields(request_, k))
    for name in request_["returns"]:
        for a, b in zip(leaves(getattr(first, name)), leaves(getattr(again, name)), strict=True):
            assert torch.equal(a, b)


def test_the_order_of_samples_is_the_order_of_results() -> None:
    net, x, _ = case(torch.float64)
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(1))
    there = jacray.jacobian(net, x)
    back = jacray.jacobian(net, x[order])
    torch.testing.assert_close(back, there[order], rtol=1e-12, atol=1e-12)


@pytest.mark.ray
@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: "-".join(map(str, r.values())))
def test_clients_agree_to_the_bit(
    request_: dict[str, Any], local_client: jacray.Client, inline_client: jacray.Client
) -> None:
    net, x, k = case()
    here = inline_client.submit(net, x, method="reverse", chunk_size=3, **fields(request_, k)).result(60)
    there = local_client.submit(net, x, method="reverse", chunk_size=3, **fields(request_, k)).result(60)
    assert here.plan.digest == there.plan.digest
    for name in request_["returns"]:
        for a, b in zip(leaves(getattr(here, name)), leaves(getattr(there, name)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.ray
@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers(workers: int, local_client: jacray.Client) -> None:
    net, x, k = case(torch.float64)
    request = fields(REQUESTS[0], k)
    two = local_client.submit(net, x, **request).result(60)
    with jacray.Client("local", workers=workers) as client:
        other = client.submit(net, x, **request).result(60)
    assert_close(other, two, request["returns"], 1e-12)
    assert reference.worst(other.jacobian, reference.jacobian(net, x)) < 1e-10

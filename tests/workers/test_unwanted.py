"""Work that nobody wants any more ends between the passes within a chunk, by every method."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from jacray_workers.engine import prepare, run_shard
from jacray_workers.errors import JobError
from jacray_workers.request import make_request
from jacray_workers.unwanted import listening, look
from torch import nn

X = torch.randn(8, 24, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Layers one after the other, and none of those that have a short way of their own."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


CASES = {
    "reverse": {"method": "reverse"},
    "forward": {"method": "forward"},
    "backward_loop": {"method": "backward_loop", "wrt": "params"},
    "layerwise": {"method": "layerwise", "wrt": "params", "form": "dense"},
    "chain": {"method": "chain"},
    "singular_values": {"method": "reverse", "returns": "singular_values", "top_k": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_asked_within_a_chunk(case: str) -> None:
    request = make_request(None, **{"verify": False, "chunk_size": 8, **CASES[case]})
    sizes = (24, 512, 8, 512, 96) if case == "chain" else (24, 16, 12)
    prepared = prepare(Net(*sizes), X, request)
    prepared = replace(prepared, plan=replace(prepared.plan, row_chunk=4))
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked == stop_at

    stop_at = 0
    expected = run_shard(prepared, prepared.plan.shard(0), cancelled=cancelled).blocks
    assert asked > 2  # once is before the chunk
    stop_at, asked = asked - 1, 0
    with pytest.raises(JobError, match="was cancelled"):
        run_shard(prepared, prepared.plan.shard(0), cancelled=cancelled)
    again = run_shard(prepared, prepared.plan.shard(0)).blocks
    for key, block in expected.items():
        assert torch.equal(torch.as_tensor(again[key]), torch.as_tensor(block))


def test_nobody_is_asked_outside() -> None:
    def ask() -> None:
        raise JobError("job", "was cancelled")

    look()
    with listening(ask):
        with listening(lambda: None):
            look()
        with pytest.raises(JobError):
            look()
    look()

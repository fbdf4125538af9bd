"""Samples too large for a shard: their rows in ranges that are boxes, and the same numbers as uncut."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jacray_workers.engine import prepare
from jacray_workers.errors import MethodError
from jacray_workers.planning import sizing
from jacray_workers.request import make_request
from jacray_workers.rowcuts import box, cuts

from tests.door import compute

SHAPES = st.lists(st.lists(st.integers(1, 7), max_size=3).map(tuple), min_size=1, max_size=3)


@settings(max_examples=300, deadline=None)
@given(SHAPES, st.integers(1, 60))
def test_ranges_cover_every_row_once_and_are_boxes_within_the_bound(shapes, most):
    found = cuts(shapes, most)
    assert (found[0], found[-1]) == (0, sum(math.prod(shape) for shape in shapes))
    assert all(0 < b - a <= most for a, b in pairwise(found))
    before = 0
    for shape in shapes:
        size = math.prod(shape)
        numbers = torch.arange(size).reshape(shape)
        mine = [(a - before, b - before) for a, b in pairwise(found) if before <= a < before + size]
        for start, stop in mine:
            assert numbers[box(shape, start, stop)].flatten().tolist() == list(range(start, stop))
        before += size


class TwoOutputs(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(5, 12), torch.nn.Linear(12, 7)

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        return {"a": hidden.reshape(-1, 3, 4), "b": self.second(hidden)}


@pytest.mark.parametrize("method", ["reverse", "forward", "backward_loop", "layerwise", "chain"])
@pytest.mark.parametrize("wrt", ["inputs", "params"])
def test_a_job_cut_by_rows_gives_the_numbers_of_one_that_is_not(method, wrt):
    if method == "chain" and wrt == "params":
        pytest.skip("chain is for inputs")
    torch.manual_seed(0)
    model, x = TwoOutputs().double(), torch.randn(3, 5, dtype=torch.float64)
    returns = ["jacobian", "outputs", "norms", "mean_jacobian"]
    fields = {"wrt": wrt, "method": method, "form": "dense", "returns": returns, "verify": True}
    ranges = cuts([(3, 4), (7,)], 3)
    try:
        whole = compute(model, x, **fields)
    except MethodError as error:
        pytest.skip(str(error))
    cut = compute(model, x, change=lambda p: replace(p, row_cuts=ranges, shard_size=1, chunk_size=1), **fields)
    assert len(cut.shards) == 3 * (len(ranges) - 1) == cut.plan.shard_count
    assert all(check.passed for result in cut.shards for check in result.checks)
    for name in returns:
        found, wanted = (torch.utils._pytree.tree_leaves(answer.found[name]) for answer in (cut, whole))
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_plan_cuts_a_sample_that_is_larger_than_a_shard(monkeypatch):
    monkeypatch.setattr(sizing, "SHARD_BYTES", 300)
    model, x = TwoOutputs(), torch.randn(6, 5)
    asked = make_request(method="reverse")
    assert prepare(model, x, asked).plan.row_cuts == ()
    plan = prepare(model, x, asked, apart=True).plan
    assert plan.row_cuts == (0, 12, 19)
    assert (plan.shard_size, plan.shard_count) == (1, 12)
    assert [s.rows for s in plan.shards()][:3] == [(0, 12), (12, 19), (0, 12)]


def test_ten_million_samples_are_planned_without_a_list_of_shards():
    plan = prepare(torch.nn.Linear(1, 1), torch.zeros(8, 1), make_request(method="reverse")).plan
    plan = replace(plan, samples=10_000_000, shard_size=3)
    shards = plan.shards()
    assert next(shards).stop == 3
    assert plan.shard(plan.shard_count - 1).stop == 10_000_000
    assert plan.shard_count == 3_333_334

from __future__ import annotations

import math

import pytest
import torch
from jacray_workers.shard import NonFinite
from jacray_workers.trust import finite
from jacray_workers.trust.finite import locate
from torch import nn

from tests.door import compute


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_finite_numbers_give_nothing(dtype):
    assert locate("j", torch.ones(7, 3, 2, dtype=dtype)) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_every_bad_number_is_counted_and_the_first_sample_found(bad, dtype, chunk, monkeypatch):
    monkeypatch.setattr(finite, "CHUNK", chunk)
    x = torch.ones(9, 4, dtype=dtype)
    x[5, 1] = bad
    x[5, 3] = -bad
    x[8, 0] = bad
    assert locate("jacobian", x, 0, 100) == NonFinite("jacobian", 3, 105)


def test_infinities_that_cancel_in_a_sum_are_found():
    x = torch.tensor([[math.inf], [-math.inf]])
    assert locate("j", x) == NonFinite("j", 2, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_sum_that_overflows_is_no_alarm(dtype):
    assert locate("j", torch.full((1000, 3), torch.finfo(dtype).max, dtype=dtype)) is None


def test_samples_along_another_axis():
    x = torch.zeros(2, 6, 3)
    x[1, 4, 2] = math.nan
    x[0, 5, 0] = math.nan
    assert locate("weighted_gradient", x, 1, 10) == NonFinite("weighted_gradient", 2, 14)


def test_an_array_without_samples_has_no_first_one():
    assert locate("gram", torch.tensor([1.0, math.nan]), -1, 7) == NonFinite("gram", 1, -1)
    assert locate("mean", torch.tensor(math.inf), -1) == NonFinite("mean", 1, -1)


def test_numbers_that_cannot_be_bad_are_not_looked_at():
    assert locate("i", torch.ones(3, dtype=torch.int64)) is None
    assert locate("empty", torch.ones(0, 4)) is None
    assert locate("nothing", torch.ones(4, 0)) is None


def test_one_number_per_sample():
    assert locate("norms", torch.tensor([1.0, 2.0, math.nan]), 0, 4) == NonFinite("norms", 1, 6)


def test_a_factored_block_is_dense_only_where_it_is_bad():
    blocks = pytest.importorskip("jacray_workers.blocks.block")
    x = torch.ones(4, 2, 3)
    assert locate("j", blocks.as_block(x, (3,))) is None
    x[2, 1, 0] = math.nan
    x[3, 0, 0] = math.inf
    assert locate("j", blocks.as_block(x, (3,)), 0, 10) == NonFinite("j", 2, 12)


@pytest.mark.parametrize("at", [0, 40, 99])
def test_what_is_looked_at_chunk_by_chunk_is_found_as_in_the_whole(at):
    x = torch.randn(100, 50)
    x[at, 7] = math.nan
    (result,) = compute(nn.Sequential(nn.Linear(50, 20), nn.Tanh()), x, chunk_size=16, method="backward_loop").shards
    assert result.nonfinite == (NonFinite("jacobian", 20 * 50, at),)

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
from jacray_workers.transfer import Landing

CPU = torch.device("cpu")
DEVICES = [CPU] + ([torch.device("cuda", 0)] if torch.cuda.is_available() else [])


@pytest.fixture(params=DEVICES, ids=str)
def device(request):
    return request.param


@pytest.mark.parametrize("slot_bytes", [4, 24, 1 << 20])
def test_everything_arrives_whatever_the_slots_hold(device, slot_bytes):
    values = [torch.randn(n, 3, device=device) for n in (1, 7, 2)]
    target = torch.full((10, 3), torch.nan)
    with contextlib.closing(Landing(device, slot_bytes=slot_bytes)) as landing:
        at = 0
        for value in values:
            landing.put(target[at : at + len(value)], value)
            at += len(value)
            landing.turn()
        landing.wait()
    assert torch.equal(target, torch.cat(values).cpu())


def test_a_copy_returns_before_it_is_done_and_the_next_chunk_waits(device):
    entered, go = threading.Event(), threading.Event()

    class Slow(Landing):
        def _copy(self, target, value, event):
            entered.set()
            assert go.wait(30)
            super()._copy(target, value, event)

    target = torch.zeros(4)
    with contextlib.closing(Slow(device)) as landing:
        landing.put(target[:2], torch.ones(2, device=device))
        landing.turn()
        assert entered.wait(30)
        assert target.tolist() == [0, 0, 0, 0]
        threading.Timer(0.05, go.set).start()
        landing.put(target[2:], torch.full((2,), 2.0, device=device))
        assert target[:2].tolist() == [1, 1]
        landing.wait()
    assert target.tolist() == [1, 1, 2, 2]


def test_a_value_put_again_wins(device):
    # A chunk that ran out of memory halfway comes again.
    target = torch.zeros(1000)
    with contextlib.closing(Landing(device, slot_bytes=64)) as landing:
        landing.put(target, torch.ones(1000, device=device))
        landing.put(target, torch.full((1000,), 5.0, device=device))
        landing.wait()
    assert (target == 5).all()


def test_types_and_strides_are_the_targets(device):
    value = torch.randn(5, 4, device=device, dtype=torch.bfloat16).T
    strided = torch.zeros(4, 10)[:, ::2]
    with contextlib.closing(Landing(device, slot_bytes=8)) as landing:
        landing.put(strided, value)
        landing.wait()
    assert torch.equal(strided, value.float().cpu())


def test_what_a_copy_raises_is_raised_once_where_it_is_waited_for(device):
    with contextlib.closing(Landing(device)) as landing:
        landing.put(torch.zeros(3), torch.zeros(4, device=device))
        with pytest.raises(RuntimeError):
            landing.wait()
        landing.wait()
        target = torch.zeros(3)
        landing.put(target, torch.ones(3, device=device))
        landing.wait()
    assert target.tolist() == [1, 1, 1]


def test_closing_ends_the_thread(device):
    before = threading.active_count()
    landing = Landing(device)
    landing.put(torch.zeros(3), torch.ones(3, device=device))
    landing.close()
    assert threading.active_count() == before

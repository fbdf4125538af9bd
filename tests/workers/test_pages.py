"""Memory for results: used again when nobody holds it, and never before."""

from __future__ import annotations

import gc
import threading

import jacray
import numpy as np
import pytest
import torch
from jacray_workers import pages

from benchmarks.nets import mlp

SHAPE = (512, 1024)


@pytest.fixture(autouse=True)
def _nothing_idle():
    gc.collect()
    pages.release()


def made(value: float, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return pages.empty(shape, torch.float32).fill_(value)


def test_a_dropped_result_makes_room_for_the_next():
    first = made(1)
    place = first.data_ptr()
    del first
    assert made(2).data_ptr() == place


HOLDERS = {
    "view": lambda t: t[5:7],
    "numpy": lambda t: t[3].numpy(),
    "detached": torch.Tensor.detach,
    "storage": torch.Tensor.untyped_storage,
    "dlpack": np.from_dlpack,
}


@pytest.mark.parametrize("keep", HOLDERS)
def test_what_is_held_in_any_way_is_not_handed_out(keep):
    first = made(1)
    held = HOLDERS[keep](first)
    place = first.data_ptr()
    del first
    second = made(2)
    assert second.data_ptr() != place
    numbers = torch.tensor([], dtype=torch.float32).set_(held) if keep == "storage" else torch.as_tensor(held)
    assert bool((numbers == 1).all())


def test_results_of_calls_do_not_share_memory():
    model, x = mlp(64, 300, 20), torch.randn(8, 64)
    first = jacray.jacobian(model, x, wrt="params", form="dense")
    copies = {name: block.clone() for name, block in first.items()}
    second = jacray.jacobian(model, 2 * x, wrt="params", form="dense")
    assert all(torch.equal(first[name], copies[name]) for name in first)
    assert not torch.equal(second["0.weight"], copies["0.weight"])


def test_many_threads_get_memory_of_their_own():
    wrong = []

    def work(number: int) -> None:
        for _ in range(30):
            mine = made(number)
            wrong.extend([number] if not bool((mine == number).all()) else [])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_small_result_does_not_sit_on_a_large_mapping():
    large = made(1, (64, *SHAPE))
    place = large.data_ptr()
    del large
    assert made(2).data_ptr() != place


def test_more_than_there_is_is_a_memory_error():
    with pytest.raises(MemoryError):
        pages.empty((1 << 45,), torch.float32)

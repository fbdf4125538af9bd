import threading

import pytest
import torch
from jacray.executors.threads import torch_threads


@pytest.fixture(autouse=True)
def _two_threads_outside():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_the_count_holds_inside_and_not_outside() -> None:
    with torch_threads(1):
        assert torch.get_num_threads() == 1
        with torch_threads(3):
            assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("first_in_leaves_first", [True, False])
def test_overlapping_threads_leave_the_process_as_it_was(first_in_leaves_first: bool) -> None:
    entered, leave, seen = threading.Event(), threading.Event(), []

    def other() -> None:
        with torch_threads(1):
            entered.set()
            leave.wait(10)
            seen.append(torch.get_num_threads())

    thread = threading.Thread(target=other)
    if first_in_leaves_first:
        with torch_threads(1):
            thread.start()
            entered.wait(10)
    else:
        thread.start()
        entered.wait(10)
        with torch_threads(1):
            leave.set()
            thread.join()
            assert torch.get_num_threads() == 1
    leave.set()
    thread.join()
    assert seen == [1]
    assert torch.get_num_threads() == 2
    fresh: list[int] = []
    last = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    last.start()
    last.join()
    assert fresh == [2]

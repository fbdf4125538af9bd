"""Events in memory that does not grow, and what a reader that lags gets."""

from __future__ import annotations

import tracemalloc

from hypothesis import given
from hypothesis import strategies as st
from jacray.events import Event, JobStarted, ShardDone, ShardFailed, ShardRetried, ShardsKept, Totals
from jacray.log import EventLog


def story(length: int) -> list[Event]:
    kinds = [
        lambda i: ShardDone("j", i, i, 10, 0.1, "worker 0"),
        lambda i: ShardRetried("j", i, i, 1, "lost"),
        lambda i: ShardDone("j", i, i, 7, 0.1, "worker 1"),
        lambda i: ShardFailed("j", i, i, 0, 10, 2, "E"),
    ]
    first = [JobStarted("j", 0.0, 1000, 100, 2), ShardsKept("j", 0.5, 3, 30)]
    return [*first, *(kinds[i % 4](float(i)) for i in range(length))][:length]


def totals(events: list[Event]) -> tuple[int, int, int, int]:
    """What a listener comes to."""
    found = Totals("j", 0.0)
    for event in events:
        found = event if isinstance(event, Totals) else found.after(event)
    return found.samples_done, found.shards_done, found.retries, found.shards_failed


@given(length=st.integers(0, 60), most=st.integers(1, 20), reads=st.lists(st.integers(0, 60), max_size=6))
def test_a_reader_comes_to_the_same_totals_whenever_it_reads(length: int, most: int, reads: list[int]) -> None:
    log, events = EventLog("j", most), story(length)
    heard: list[Event] = []
    read = 0
    for i, event in enumerate(events):
        log.append(event)
        if i in reads:
            heard += log.since(read)
            read = len(log)
    heard += log.since(read)
    assert len(log) == length
    assert totals(heard) == totals(events)
    assert not events or heard[0] == events[0]  # the start is never lost
    assert length > most or heard == events
    assert len(log.since(0)) <= most + 2


def test_a_hundred_thousand_events_take_no_more_memory_than_ten_thousand() -> None:
    log = EventLog("j")

    def more(count: int) -> int:
        for i in range(count):
            log.append(ShardDone("j", float(i), i, 10, 0.1, "worker 0"))
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        first = more(10_000)
        assert more(100_000) - first < 100_000
    finally:
        tracemalloc.stop()
    assert log.total.shards_done == 110_000

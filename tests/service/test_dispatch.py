"""The dispatcher against workers that are scripted: which replies come, in which order, and who dies."""

from __future__ import annotations

import collections
import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import jacray
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jacray.executors import dispatch
from jacray.executors.base import Begun, Done, Retried, Task
from jacray.executors.dispatch import ATTEMPTS, DEPTH, Dispatch, Seat, WorkerLostError
from jacray.executors.worker import Reply
from jacray_workers.plan import Plan, Shard
from jacray_workers.shard import ShardResult


@dataclass
class FakePool:
    """Workers that answer in an order drawn from a seed.

    Attributes:
        deaths: by shard index, how often the worker that has it dies.
        late: how many rounds pass before the first worker is there.
        stuck: whether shards in flight never answer.
    """

    workers: int = 2
    seed: int = 0
    deaths: collections.Counter[int] | None = None
    raises: dict[int, Exception] | None = None
    late: int = 0
    stuck: bool = False

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.generation = [0] * self.workers
        self.queues: dict[Seat, list[tuple[int, Shard]]] = collections.defaultdict(list)
        self.answers: dict[int, Reply | WorkerLostError] = {}
        self.tickets = 0
        self.most = 0
        self.replaced: list[tuple[Seat, bool]] = []
        self.cancelled: list[str] = []

    def seats(self) -> Sequence[Seat]:
        self.late -= 1
        return [] if self.late >= 0 else [Seat(i, g) for i, g in enumerate(self.generation)]

    def submit(self, seat: Seat, task: Task, shard: Shard) -> Hashable:
        self.tickets += 1
        self.queues[seat].append((self.tickets, shard))
        self.most = max(self.most, len(self.queues[seat]))
        return self.tickets

    def wait(self, tickets: Sequence[Hashable], seconds: float) -> Sequence[Hashable]:
        busy = [seat for seat, queue in self.queues.items() if queue]
        if busy and not self.stuck:
            self._work(self.random.choice(busy))
        answered = [t for t in tickets if t in self.answers]
        return self.random.sample(answered, len(answered))

    def fetch(self, ticket: Hashable) -> Reply:
        answer = self.answers.pop(ticket)
        if isinstance(answer, WorkerLostError):
            raise answer
        return answer

    def cancel(self, task: Task) -> None:
        self.cancelled.append(task.id)

    def replace(self, seat: Seat, *, blame: bool) -> None:
        if self.generation[seat.place] == seat.generation:
            self.generation[seat.place] += 1
            self.replaced.append((seat, blame))

    def _work(self, seat: Seat) -> None:
        ticket, shard = self.queues[seat][0]
        if self.deaths and self.deaths[shard.index] > 0:
            self.deaths[shard.index] -= 1
            for lost, _ in self.queues.pop(seat):
                self.answers[lost] = WorkerLostError("the worker died")
            return
        self.queues[seat].pop(0)
        error = (self.raises or {}).get(shard.index)
        result = ShardResult(shard, {"y": torch.tensor([float(shard.index)])})
        self.answers[ticket] = Reply(error=error, trace="far away") if error else Reply(result)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return jacray.plan(torch.nn.Identity(), torch.randn(40, 1), method="reverse", chunk_size=1)


def task_of(plan: Plan, shards: int) -> Task:
    return Task("job", replace(plan, samples=shards, shard_size=1), None)


def indices(steps: Sequence[object]) -> list[int]:
    return [step.result.shard.index for step in steps if isinstance(step, Done)]


@given(
    shards=st.integers(1, 30),
    workers=st.integers(1, 5),
    seed=st.integers(0, 10_000),
    late=st.integers(0, 3),
    deaths=st.dictionaries(st.integers(0, 29), st.integers(1, ATTEMPTS - 1), max_size=4),
)
def test_every_shard_comes_exactly_once(
    plan: Plan, shards: int, workers: int, seed: int, late: int, deaths: dict[int, int]
) -> None:
    pool = FakePool(workers, seed, collections.Counter(deaths), late=late)
    steps = list(Dispatch(pool, task_of(plan, shards)).steps())
    assert sorted(indices(steps)) == list(range(shards))
    assert isinstance(steps[0], Begun)
    assert sum(isinstance(step, Begun) for step in steps) == 1
    assert sum(isinstance(step, Retried) for step in steps) >= sum(n for i, n in deaths.items() if i < shards)
    assert pool.most <= DEPTH
    assert pool.cancelled == []


def test_work_is_spread_over_all_workers(plan: Plan) -> None:
    pool = FakePool(workers=3)
    steps = Dispatch(pool, task_of(plan, 3)).steps()
    next(steps)
    assert {seat: len(queue) for seat, queue in pool.queues.items()} == {Seat(i, 0): 1 for i in range(3)}
    assert len(list(steps)) == 3


def test_a_shard_that_takes_its_workers_with_it_is_given_up_by_name(plan: Plan) -> None:
    pool = FakePool(deaths=collections.Counter({5: 99}))
    with pytest.raises(jacray.ShardError, match=f"sample 5 could not be computed: {ATTEMPTS} workers were lost"):
        list(Dispatch(pool, task_of(plan, 10)).steps())


def test_a_shard_queued_behind_a_deadly_one_is_not_blamed(plan: Plan) -> None:
    pool = FakePool(workers=1, deaths=collections.Counter({0: ATTEMPTS - 1, 1: ATTEMPTS - 1}))
    steps = list(Dispatch(pool, task_of(plan, 2)).steps())
    assert sorted(indices(steps)) == [0, 1]


def test_a_workers_error_comes_as_it_is_and_ends_the_rest(plan: Plan) -> None:
    pool = FakePool(raises={3: ZeroDivisionError("by zero")})
    with pytest.raises(ZeroDivisionError, match="by zero") as caught:
        list(Dispatch(pool, task_of(plan, 10)).steps())
    assert "while computing sample 3" in caught.value.__notes__
    assert "far away" in str(caught.value.__cause__)
    assert pool.cancelled == ["job"]


def test_cancelling_replaces_a_worker_that_does_not_hear(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "GRACE", 0.01)
    pool, task = FakePool(stuck=True), task_of(plan, 10)
    steps = Dispatch(pool, task).steps()
    next(steps)
    task.cancelled.set()
    with pytest.raises(jacray.JobError, match="cancelled"):
        list(steps)
    assert sorted(pool.replaced, key=str) == [(Seat(0, 0), False), (Seat(1, 0), False)]


def test_leaving_early_ends_what_is_in_flight(plan: Plan) -> None:
    pool = FakePool()
    steps = Dispatch(pool, task_of(plan, 10)).steps()
    next(steps)
    steps.close()
    assert pool.cancelled == ["job"]


def test_a_hundred_thousand_shards_keep_nothing(plan: Plan) -> None:
    dispatcher = Dispatch(FakePool(workers=4), task_of(plan, 100_000))
    total = 0
    for step in dispatcher.steps():
        total += isinstance(step, Done)
        assert len(dispatcher.flights) <= 4 * DEPTH
        assert len(dispatcher.again) <= 1
    assert total == 100_000

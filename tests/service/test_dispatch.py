"""The dispatcher against workers that are scripted: which replies come, in which order, and who dies."""

from __future__ import annotations

import collections
import random
import threading
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

import jacray
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jacray.executors import dispatch
from jacray.executors.base import Begun, Done, Failed, Retried, Task
from jacray.executors.dispatch import ATTEMPTS, DEPTH, RAISES, Dispatch
from jacray.executors.pool import Seat, WorkerLostError
from jacray.executors.worker import Reply
from jacray_workers.errors import StorageError
from jacray_workers.plan import Plan, Shard
from jacray_workers.shard import ShardResult


@dataclass
class FakePool:
    """Workers that answer in an order drawn from a seed.

    Attributes:
        deaths: by shard index, how often the worker that has it dies.
        oom: whether they die of memory.
        hangs: by shard index, how often the worker that has it never answers.
        raises: by shard index, what it raises.
        raises_times: how often; for ever by default.
        late: how many rounds pass before the first worker is there.
        stuck: whether shards in flight never answer.
    """

    workers: int = 2
    seed: int = 0
    deaths: collections.Counter[int] | None = None
    oom: bool = False
    hangs: collections.Counter[int] | None = None
    raises: dict[int, Exception] | None = None
    raises_times: int = 1_000_000
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
        self.sent: list[tuple[str, Seat, Shard, int]] = []
        self.hung: set[Seat] = set()
        self.clock = 0.0

    def seats(self) -> Sequence[Seat]:
        self.late -= 1
        return [] if self.late >= 0 else [Seat(i, g) for i, g in enumerate(self.generation)]

    def submit(self, seat: Seat, task: Task, shard: Shard, halvings: int) -> Hashable:
        self.tickets += 1
        self.sent.append((task.id, seat, shard, halvings))
        self.queues[seat].append((self.tickets, shard))
        self.most = max(self.most, len(self.queues[seat]))
        return self.tickets

    def wait(self, tickets: Sequence[Hashable], seconds: float) -> Sequence[Hashable]:
        busy = [seat for seat, queue in self.queues.items() if queue and seat not in self.hung]
        if not busy:
            time.sleep(seconds / 10)
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
            for lost, _ in self.queues.pop(seat, []):
                self.answers.setdefault(lost, WorkerLostError("the worker was ended", blame=False))

    def _work(self, seat: Seat) -> None:
        self.clock += 1
        ticket, shard = self.queues[seat][0]
        if self.deaths and self.deaths[shard.index] > 0:
            self.deaths[shard.index] -= 1
            for lost, _ in self.queues.pop(seat):
                self.answers[lost] = WorkerLostError("the worker died", memory=self.oom)
            return
        if self.hangs and self.hangs[shard.index] > 0:
            self.hangs[shard.index] -= 1
            self.hung.add(seat)
            return
        self.queues[seat].pop(0)
        error = (self.raises or {}).get(shard.index) if self.raises_times > 0 else None
        self.raises_times -= error is not None
        result = ShardResult(shard, {"y": torch.tensor([float(shard.index)])})
        self.answers[ticket] = Reply(error=error, trace="far away") if error else Reply(result)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return jacray.plan(torch.nn.Identity(), torch.randn(40, 1), method="reverse", chunk_size=1)


def task_of(plan: Plan, shards: int, name: str = "job", **fields: object) -> Task:
    return Task(name, replace(plan, samples=shards, shard_size=1), None, **fields)


def indices(steps: Sequence[object]) -> list[int]:
    return [step.result.shard.index for step in steps if isinstance(step, Done)]


def failed(steps: Sequence[object]) -> list[Failed]:
    return [step for step in steps if isinstance(step, Failed)]


@given(
    shards=st.integers(1, 30),
    workers=st.integers(1, 5),
    seed=st.integers(0, 10_000),
    late=st.integers(0, 3),
    deaths=st.dictionaries(st.integers(0, 29), st.integers(1, ATTEMPTS - 1), max_size=4),
    kept=st.sets(st.integers(0, 29)),
)
def test_every_shard_comes_exactly_once(
    plan: Plan, shards: int, workers: int, seed: int, late: int, deaths: dict[int, int], kept: set[int]
) -> None:
    pool = FakePool(workers, seed, collections.Counter(deaths), late=late)
    steps = list(Dispatch(pool).steps(task_of(plan, shards, kept=kept)))
    left = sorted(set(range(shards)) - kept)
    assert sorted(indices(steps)) == left
    assert sum(isinstance(step, Begun) for step in steps) == bool(left)
    assert not left or isinstance(steps[0], Begun)
    assert sum(isinstance(step, Retried) for step in steps) >= sum(n for i, n in deaths.items() if i in left)
    assert pool.most <= DEPTH
    assert pool.cancelled == []


@given(
    jobs=st.integers(2, 5), seed=st.integers(0, 10_000), deaths=st.dictionaries(st.integers(0, 9), st.integers(1, 2))
)
def test_jobs_in_threads_of_their_own_get_their_shards_and_no_others(
    plan: Plan, jobs: int, seed: int, deaths: dict[int, int]
) -> None:
    pool = FakePool(3, seed, collections.Counter(deaths))
    dispatcher, found = Dispatch(pool), dict[int, list[object]]()

    def run(job: int) -> None:
        found[job] = list(dispatcher.steps(task_of(plan, 10 + job, f"job {job}")))

    threads = [threading.Thread(target=run, args=(job,)) for job in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert {job: sorted(indices(steps)) for job, steps in found.items()} == {
        job: list(range(10 + job)) for job in range(jobs)
    }
    assert pool.most <= DEPTH  # over all jobs
    assert not dispatcher.lanes
    assert not dispatcher.flights
    assert not dispatcher.heads
    assert not dispatcher.suspects


def test_work_is_spread_over_all_workers(plan: Plan) -> None:
    pool = FakePool(workers=3)
    steps = Dispatch(pool).steps(task_of(plan, 3))
    next(steps)
    assert {seat for _, seat, _, _ in pool.sent} == {Seat(i, 0) for i in range(3)}
    assert len(list(steps)) == 3


def test_the_last_shards_go_to_whoever_is_free_first(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, behind = FakePool(workers=2), {}

    def noted(seat: Seat, task: Task, shard: Shard, halvings: int) -> Hashable:
        behind[shard.index] = len(pool.queues[seat])
        return FakePool.submit(pool, seat, task, shard, halvings)

    monkeypatch.setattr(pool, "submit", noted)
    assert len(list(Dispatch(pool).steps(task_of(plan, 12)))) == 13
    assert [behind[shard] for shard in (10, 11)] == [0, 0]
    assert 1 in behind.values()


def shares(pool: FakePool, first: int) -> collections.Counter[str]:
    """How many of the first shards handed out went to whom."""
    return collections.Counter(name for name, *_ in pool.sent[:first])


def together(pool: FakePool, tasks: Sequence[Task], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run tasks side by side in this thread, each reading as fast as it can, by the pool's own clock."""
    monkeypatch.setattr(dispatch, "time", SimpleNamespace(monotonic=lambda: pool.clock))
    dispatcher = Dispatch(pool)
    running = {task.id: dispatcher.steps(task) for task in tasks}
    for steps in running.values():
        next(steps)
    while running:
        ready = [lane.task.id for lane in dispatcher.lanes if lane.steps]
        for name in ready or [*running][:1]:
            if next(running[name], None) is None:
                del running[name]


def test_jobs_share_the_workers_evenly(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = FakePool(workers=2)
    together(pool, [task_of(plan, 200, "long"), task_of(plan, 20, "short")], monkeypatch)
    # The long one was there first; from then on both get the same until the short one is done.
    assert shares(pool, 44)["short"] >= 17
    assert len(pool.sent) == 220


def test_users_share_the_workers_evenly_whatever_number_of_jobs_they_have(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = FakePool(workers=2)
    many = [task_of(plan, 100, f"many {i}", user="many") for i in range(4)]
    together(pool, [*many, task_of(plan, 50, "one", user="one")], monkeypatch)
    found = shares(pool, 110)
    assert found["one"] >= 45
    assert all(10 <= found[f"many {i}"] <= 22 for i in range(4))  # 16 each, but which worker is next is chance


def test_a_job_that_nobody_reads_takes_no_more_than_a_few_shards(plan: Plan) -> None:
    pool = FakePool(workers=2)
    dispatcher = Dispatch(pool)
    idle = dispatcher.steps(task_of(plan, 1000, "idle"))
    next(idle)
    assert sorted(indices(list(dispatcher.steps(task_of(plan, 100, "busy"))))) == list(range(100))
    assert shares(pool, 2000)["idle"] <= 12
    idle.close()


def test_a_shard_that_takes_its_workers_with_it_is_given_up_by_name_and_the_rest_goes_on(plan: Plan) -> None:
    pool = FakePool(deaths=collections.Counter({5: 99}))
    steps = list(Dispatch(pool).steps(task_of(plan, 10)))
    (given_up,) = failed(steps)
    assert (given_up.shard.index, given_up.attempt) == (5, ATTEMPTS)
    assert f"sample 5 could not be computed: {ATTEMPTS} workers were lost" in str(given_up.error)
    assert sorted(indices(steps)) == [0, 1, 2, 3, 4, 6, 7, 8, 9]


def test_a_shard_queued_behind_a_deadly_one_is_not_blamed(plan: Plan) -> None:
    pool = FakePool(workers=1, deaths=collections.Counter({0: ATTEMPTS - 1, 1: ATTEMPTS - 1}))
    steps = list(Dispatch(pool).steps(task_of(plan, 2)))
    assert sorted(indices(steps)) == [0, 1]


def test_a_shard_that_ran_out_of_memory_comes_again_in_smaller_chunks(plan: Plan) -> None:
    pool = FakePool(deaths=collections.Counter({3: 2}), oom=True)
    steps = list(Dispatch(pool).steps(task_of(plan, 10)))
    assert sorted(indices(steps)) == list(range(10))
    assert [halvings for _, _, shard, halvings in pool.sent if shard.index == 3] == [0, 1, 2]
    assert {halvings for _, _, shard, halvings in pool.sent if shard.index != 3} == {0}


def test_a_shard_that_hangs_is_computed_elsewhere(plan: Plan) -> None:
    pool = FakePool(hangs=collections.Counter({4: 2}))
    steps = list(Dispatch(pool).steps(task_of(plan, 10, timeout=0.05)))
    assert sorted(indices(steps)) == list(range(10))
    reasons = [step.reason for step in steps if isinstance(step, Retried) and step.shard.index == 4]
    assert reasons == ["no answer within 0.05 s"] * 2
    places = [seat.place for _, seat, shard, _ in pool.sent if shard.index == 4]
    assert places[0] != places[1] != places[2]


def test_a_shard_that_always_hangs_is_given_up(plan: Plan) -> None:
    pool = FakePool(hangs=collections.Counter({4: 99}))
    (given_up,) = failed(list(Dispatch(pool).steps(task_of(plan, 10, timeout=0.02))))
    assert given_up.shard.index == 4
    assert "no answer within 0.02 s" in str(given_up.error)


def test_an_error_is_tried_once_more_on_another_worker(plan: Plan) -> None:
    pool = FakePool(raises={3: OSError("a hiccup")}, raises_times=1)
    steps = list(Dispatch(pool).steps(task_of(plan, 10)))
    assert sorted(indices(steps)) == list(range(10))
    (retried,) = [step for step in steps if isinstance(step, Retried)]
    assert (retried.shard.index, retried.reason) == (3, "OSError: a hiccup")
    places = [seat.place for _, seat, shard, _ in pool.sent if shard.index == 3]
    assert places[0] != places[1]


def test_a_poisoned_shard_is_given_up_with_its_error_and_the_rest_goes_on(plan: Plan) -> None:
    pool = FakePool(raises={3: ZeroDivisionError("by zero")})
    steps = list(Dispatch(pool).steps(task_of(plan, 10)))
    (given_up,) = failed(steps)
    assert isinstance(given_up.error, ZeroDivisionError)
    assert given_up.attempt == RAISES
    assert "while computing sample 3" in given_up.error.__notes__
    assert "far away" in str(given_up.error.__cause__)
    assert sorted(indices(steps)) == [0, 1, 2, 4, 5, 6, 7, 8, 9]


def test_a_mistake_of_the_users_is_not_tried_again(plan: Plan) -> None:
    pool = FakePool(raises={3: jacray.NonFiniteError("nan_policy", "raise forbids NaN")})
    (given_up,) = failed(list(Dispatch(pool).steps(task_of(plan, 10))))
    assert given_up.attempt == 1


def test_a_full_disk_is_no_fault_of_the_shard(plan: Plan) -> None:
    pool = FakePool(raises={3: OSError(28, "No space left on device", "/there")})
    (given_up,) = failed(list(Dispatch(pool).steps(task_of(plan, 10))))
    assert isinstance(given_up.error, StorageError)
    assert "No space left on device; got /there" in str(given_up.error)
    assert given_up.attempt == 1


def test_cancelling_replaces_a_worker_that_does_not_hear(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "GRACE", 0.01)
    pool, task = FakePool(stuck=True), task_of(plan, 10)
    steps = Dispatch(pool).steps(task)
    next(steps)
    task.cancelled.set()
    with pytest.raises(jacray.CancelledError, match="cancelled"):
        list(steps)
    assert sorted(pool.replaced, key=str) == [(Seat(0, 0), False), (Seat(1, 0), False)]


def test_cancelling_one_job_leaves_the_other_alone(plan: Plan) -> None:
    pool = FakePool(workers=2)
    dispatcher, one = Dispatch(pool), task_of(plan, 100, "one")
    first, second = dispatcher.steps(one), dispatcher.steps(task_of(plan, 50, "two"))
    next(first)
    heard: list[object] = [next(second)]
    one.cancelled.set()
    with pytest.raises(jacray.CancelledError):
        list(first)
    heard += list(second)
    assert sorted(indices(heard)) == list(range(50))
    assert pool.cancelled == ["one"]
    assert pool.replaced == []


def test_leaving_early_ends_what_is_in_flight(plan: Plan) -> None:
    pool = FakePool()
    steps = Dispatch(pool).steps(task_of(plan, 10))
    next(steps)
    steps.close()
    assert pool.cancelled == ["job"]


def test_a_pool_that_is_gone_ends_every_job(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(self: FakePool) -> Sequence[Seat]:
        raise jacray.ShardError("Ray was shut down")

    dispatcher = Dispatch(FakePool(workers=2))
    lanes = [dispatcher.steps(task_of(plan, 100, f"{i}")) for i in range(2)]
    for lane in lanes:
        next(lane)
    monkeypatch.setattr(FakePool, "seats", gone)
    for lane in lanes:
        with pytest.raises(jacray.ShardError, match="shut down"):
            list(lane)
    assert not dispatcher.lanes


def test_a_hundred_thousand_shards_keep_nothing(plan: Plan) -> None:
    dispatcher = Dispatch(FakePool(workers=4))
    pool = dispatcher.pool
    total = 0
    for step in dispatcher.steps(task_of(plan, 100_000)):
        total += isinstance(step, Done)
        pool.sent.clear()
        assert len(dispatcher.flights) <= 4 * DEPTH
        assert sum(len(lane.again) + len(lane.steps) for lane in dispatcher.lanes) <= 4 * 2 * DEPTH
    assert total == 100_000

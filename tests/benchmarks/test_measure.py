from __future__ import annotations

import pytest
import torch

from benchmarks import checks, memory
from benchmarks.measure import measure
from benchmarks.sides import everybody
from benchmarks.sides.ours import ENGINE, OURS
from benchmarks.sides.torch_func import SIDES as TORCH_SIDES
from benchmarks.task import CannotError, Ready, Side, make_task
from benchmarks.timing import interleaved
from benchmarks.works import Target, Work
from tests.benchmarks.small import BY_KEY, CASES

# The harness switches torch's fused attention off for its process, which is this one.
FLAGS = ("flash", "mem_efficient", "cudnn")


@pytest.fixture(autouse=True)
def _fused_attention_as_it_was():
    before = {name: getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in FLAGS}
    fast = torch.backends.mha.get_fastpath_enabled()
    yield
    for name, on in before.items():
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(on)
    torch.backends.mha.set_fastpath_enabled(fast)


def row(key, peers, ours=ENGINE):
    work = Work(BY_KEY[key], Target(), (1e3, 1e3))
    return measure(work, ours, peers, budget=0.02, rates=0, rounds=(2, 3))


def spoiled(name, spoil):
    """A peer that does the work by vmap(jacrev) and then spoils the answer; counts its calls."""
    calls = []

    def make(task):
        right = TORCH_SIDES[0].make(task)

        def call():
            calls.append(1)
            return right.call()

        return Ready(call, lambda found: spoil(right.read(found)))

    return Side(name, make), calls


def one_entry(arrays):
    found = {name: a.clone() for name, a in arrays.items()}
    block = next(iter(found.values()))
    block.view(-1)[block.numel() // 2] += 1e-2 * block.abs().max()
    return found


def test_a_wrong_answer_is_caught_and_not_timed():
    wrong, wrong_calls = spoiled("wrong", one_entry)
    short, short_calls = spoiled("short", lambda arrays: {name: a[:-1] for name, a in arrays.items()})
    nan, _ = spoiled("nan", lambda arrays: {name: a * torch.nan for name, a in arrays.items()})
    right, right_calls = spoiled("right", lambda arrays: arrays)

    def cannot(task):
        raise CannotError("no rule for this")

    def breaks(task):
        raise ValueError("a fault of the peer's")

    peers = [wrong, short, nan, right, Side("cannot", cannot), Side("breaks", breaks)]
    sides = row("inputs", peers)["sides"]
    assert "differs by" in sides["wrong"]["wrong"]
    assert "median" not in sides["wrong"]
    assert len(wrong_calls) == 1
    assert "has shape" in sides["short"]["wrong"]
    assert len(short_calls) == 1
    assert "wrong" in sides["nan"]
    assert sides["cannot"] == {"cannot": "no rule for this"}
    assert "a fault of the peer's" in sides["breaks"]["failed"]
    assert sides["right"]["median"] > 0
    assert sides["right"]["calls"] >= 2
    assert len(right_calls) >= 4
    assert sides["jacray"]["median"] > 0
    assert sides["jacray"]["error"] < checks.TOLERANCE


@pytest.mark.parametrize("key", ["inputs", "mlp-params"])
def test_one_wrong_entry_of_ours_anywhere_stops_the_row(key):
    ours, calls = spoiled("jacray", one_entry)
    with pytest.raises(checks.WrongError, match="off by"):
        row(key, [], ours)
    assert len(calls) == 1


def test_a_wrong_tangent_kernel_of_ours_stops_the_row():
    ours, _ = spoiled("jacray", lambda arrays: {"ntk": arrays["ntk"] * 1.01})
    with pytest.raises(checks.WrongError, match="off by"):
        row("ntk", [], ours)


# Each of these has its own way through every side; the rest is as the first.
OFTEN = ("mlp-params", "language", "ntk", "last-layer")


@pytest.mark.parametrize(
    "case",
    [case if case.key in OFTEN else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
    ids=lambda case: case.key,
)
def test_every_peer_that_is_installed_gives_the_right_answer_or_says_why_not(case):
    found = row(case.key, [side for side in everybody() if "JAX" not in side.name])
    for name, side in found["sides"].items():
        assert not {"wrong", "failed"} & side.keys(), (name, side)
    assert "median" in found["sides"]["vmap(jacrev)"]
    assert found["sides"]["jacray"]["bytes_out"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.key)
def test_jax_has_the_same_nets(case):
    pytest.importorskip("jax")
    found = row(case.key, [side for side in everybody() if "JAX" in side.name])
    for name, side in found["sides"].items():
        assert not {"wrong", "failed"} & side.keys(), (name, side)
    assert "median" in found["sides"]["JAX jit(vmap(jacrev))"]


def test_the_users_call_and_the_engine_alone_give_the_same():
    task = make_task(BY_KEY["mlp-params"])
    one, other = (side.make(task.own_copy()) for side in (OURS, ENGINE))
    a, b = one.read(one.call()), other.read(other.call())
    assert a.keys() == b.keys() == set(task.names)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_everybody_by_name():
    assert [side.name for side in everybody("backpack, JACREV")] == [
        "vmap(jacrev)", "BackPACK", "JAX jit(vmap(jacrev))"
    ]  # fmt: skip
    assert everybody("") == ()
    assert len(everybody()) > 10


def test_a_peer_that_would_not_fit_is_not_tried(monkeypatch):
    monkeypatch.setattr("benchmarks.sides.torch_func.available", lambda: 1000)
    with pytest.raises(CannotError, match="would need about"):
        TORCH_SIDES[0].make(make_task(BY_KEY["mlp-params"]))


def test_turns_are_taken_and_slow_ways_take_few():
    order = []

    def way(name, turns):
        def call():
            order.append(name)
            return sum(range(turns))

        return call

    ways = {"a": way("a", 10), "b": way("b", 10), "slow": way("slow", 3_000_000)}
    firsts = dict.fromkeys(ways, 1.0)
    found = interleaved(ways, 0.0, firsts, rounds=(4, 4))
    assert order[-8:] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert [len(found[name].calls) for name in ways] == [4, 4, 1]
    assert found["a"].first == 1.0
    low, high = found["a"].quartiles
    assert found["a"].minimum <= low <= found["a"].median <= high


def test_peak_memory_is_the_calls_own():
    peak = memory.peak_of(lambda: torch.ones(1 << 24))
    assert peak is None or (1 << 26) * 0.95 <= peak < (1 << 26) * 1.5


def test_bytes_count_memory_once_and_factors_as_factors():
    whole = torch.ones(10, 10)
    assert memory.nbytes({"a": whole, "b": [whole[:5], whole]}) == 400
    assert memory.nbytes(torch.ones(1).expand(100)) == 4
    task = make_task(BY_KEY["mlp-factors"])
    ready = ENGINE.make(task)
    assert memory.nbytes(ready.call()) < task.dense_bytes() / 2

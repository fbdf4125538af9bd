"""Running out of memory in the middle: the chunk is halved, and what was done of it stands."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from jacray_workers.engine import Prepared, assemble, combine, prepare, run_shard
from jacray_workers.errors import BudgetError
from jacray_workers.kernels import backward_loop
from jacray_workers.plan import Plan
from jacray_workers.planning.memory import out_of_memory
from jacray_workers.request import make_request
from torch import Tensor, nn

from tests import reference
from tests.toys import Scarce

ROWS, SAMPLES = 10, 12


@pytest.fixture(autouse=True)
def one_backward_per_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nets as small as these would have all rows in one backward."""
    monkeypatch.setattr(backward_loop, "FOLDED", 0)


class Counted(torch.autograd.Function):
    """The cube of every number. Its derivatives count how often they are taken, and some of those run out of memory."""

    generate_vmap_rule = True
    calls = 0
    fails: frozenset[int] = frozenset()

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ARG004  # torch hands it over
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        Counted.count()
        return g * 3 * ctx.saved_tensors[0] ** 2

    @staticmethod
    def jvp(ctx: Any, v: Tensor) -> Tensor:
        Counted.count()
        return v * 3 * ctx.saved_tensors[0] ** 2

    @staticmethod
    def count() -> None:
        Counted.calls += 1
        if Counted.calls in Counted.fails:
            raise torch.OutOfMemoryError("injected")

    @classmethod
    def arm(cls, *fails: int) -> None:
        cls.calls, cls.fails = 0, frozenset(fails)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, ROWS)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(Counted.apply(self.first(x)))
        return found


def net() -> Net:
    Counted.arm()
    return Net().double()


def inputs() -> Tensor:
    return torch.randn(SAMPLES, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def planned(method: str, **changes: Any) -> Prepared:
    fields = {name: changes.pop(name) for name in ("wrt", "returns", "weights", "outputs") if name in changes}
    request = make_request(method=method, form="dense", chunk_size=SAMPLES, **fields)
    prepared = prepare(changes.pop("model", None) or net(), inputs(), request)
    return dataclasses.replace(prepared, plan=dataclasses.replace(prepared.plan, **changes))


def ran(prepared: Prepared, *fails: int) -> tuple[dict[str, Tensor], dict[str, Any], int]:
    """The arrays, the facts, and how many derivatives were taken."""
    Counted.arm(*fails)
    result = run_shard(prepared, prepared.plan.shard(0))
    calls = Counted.calls
    Counted.arm()
    return dict(combine(prepared.plan, [result])), dict(result.facts), calls


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-12, atol=1e-12)


def test_rows_that_were_done_are_not_done_again() -> None:
    prepared = planned("backward_loop")
    quiet, facts, calls = ran(prepared)
    assert (calls, facts.get("backoffs")) == (ROWS, None)
    # The seventh row fails: six stand for all samples, and each half makes the other four.
    found, facts, calls = ran(prepared, 7)
    assert calls == 7 + 2 * (ROWS - 6)
    assert (facts["backoffs"], facts["resumed"]) == (1, SAMPLES)
    same(found, quiet)


def test_a_second_failure_keeps_what_both_attempts_have_done() -> None:
    prepared = planned("backward_loop")
    quiet = ran(prepared)[0]
    # Six rows of all twelve, two more of the first six; then threes, of which the last two have four rows before them.
    found, facts, calls = ran(prepared, 7, 10)
    assert calls == 7 + 3 + 2 * 2 + 2 * 4
    assert facts["backoffs"] == 2
    same(found, quiet)


def test_samples_that_were_done_are_not_done_again_where_they_go_one_by_one() -> None:
    prepared = planned("backward_loop", wrt="params")
    quiet, _, calls = ran(prepared)
    assert calls == ROWS * SAMPLES
    # In the third sample: the two before stand whole, and of this one four rows.
    found, facts, calls = ran(prepared, 25)
    assert calls == ROWS * SAMPLES + 1
    assert (facts["backoffs"], facts["resumed"]) == (1, 3)
    same(found, quiet)


@pytest.mark.parametrize("method", ["layerwise", "reverse"])
@pytest.mark.parametrize("wrt", ["inputs", "params"])
def test_bands_of_rows_are_kept(method: str, wrt: str) -> None:
    prepared = planned(method, wrt=wrt, row_chunk=3)
    quiet = ran(prepared)[0]
    # The second time, for the first one also finds out how cotangents go back through this model.
    calls = ran(prepared)[2]
    last = ran(prepared, calls)
    assert (last[1]["backoffs"], last[1]["resumed"]) == (1, SAMPLES)
    # One band was left, which both halves made: the three before it took as many passes as ever.
    assert last[2] <= calls + 2 * calls // 4 + 4
    same(last[0], quiet)


def test_columns_are_kept_by_forward() -> None:
    prepared = planned("forward", row_chunk=2)
    quiet, _, calls = ran(prepared)
    found, facts, again = ran(prepared, calls)
    assert (facts["backoffs"], facts["resumed"]) == (1, SAMPLES)
    assert again == calls + 2
    same(found, quiet)


class Pair(Net):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return {"a": y[:, :3].reshape(-1, 3, 1), "b": y[:, 3:]}


@pytest.mark.parametrize("returns", [["jacobian"], ["jacobian", "gram", "norms", "weighted_gradient"]])
def test_rows_are_kept_where_blocks_are_not_the_result_itself(returns: list[str]) -> None:
    """Two outputs: blocks are made beside the result, and put there; products need them whole."""
    weights = {"a": torch.ones(3, 1).double(), "b": torch.ones(ROWS - 3).double()}
    Counted.arm()
    fields: dict[str, Any] = {"weights": weights} if "weighted_gradient" in returns else {}
    prepared = planned("backward_loop", model=Pair().double(), returns=returns, **fields)
    quiet, _, calls = ran(prepared)
    found, facts, again = ran(prepared, calls - 3)
    assert (facts["backoffs"], facts["resumed"]) == (1, SAMPLES)
    assert again < calls + ROWS
    same(found, quiet)


def test_one_sample_takes_fewer_rows_at_a_time() -> None:
    prepared = planned("reverse", row_chunk=8, chunk_size=1)
    quiet = ran(prepared)[0]
    found, facts, _ = ran(prepared, 1, 2)
    assert facts["backoffs"] == 2
    same(found, quiet)


def test_what_never_fits_is_told() -> None:
    with pytest.raises(BudgetError, match="one sample at a time must fit"):
        ran(planned("backward_loop"), *range(1, 1000))


def test_rows_of_a_shard_that_is_cut_by_rows() -> None:
    whole = planned("backward_loop")
    wanted = ran(whole)[0]["jacobian"]
    plan: Plan = dataclasses.replace(whole.plan, row_cuts=(0, 6, ROWS), shard_size=1, chunk_size=1)
    cut = dataclasses.replace(whole, plan=plan)
    Counted.arm(3, 9)
    results = [run_shard(cut, shard) for shard in cut.plan.shards()]
    Counted.arm()
    assert sum(r.facts.get("backoffs", 0) for r in results) == 2
    found = assemble(cut, combine(cut.plan, results))["jacobian"]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_a_cause_tells_that_memory_ran_out() -> None:
    inner = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")
    outer = ValueError("backward failed")
    outer.__cause__ = inner
    assert out_of_memory(inner)
    assert out_of_memory(outer)
    assert not out_of_memory(ValueError("backward failed"))


@pytest.mark.parametrize("method", ["backward_loop", "layerwise"])
def test_each_sample_is_computed_once_where_it_was_complete(method: str) -> None:
    on_a_cpu = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
    model, x = Scarce(4, on_a_cpu, copies=20), torch.randn(11, 3, dtype=torch.float64)
    prepared = prepare(model, x, make_request(method=method, chunk_size=11))
    model.armed[0] = True
    result = run_shard(prepared, prepared.plan.shard(0))
    model.armed[0] = False
    # Eleven fail, then five; twos are within what it takes.
    assert (result.facts["backoffs"], result.chunk_size) == (2, 2)
    assert sum(model.seen) == 11
    found = assemble(prepared, combine(prepared.plan, [result]))["jacobian"]
    assert reference.worst(found, reference.jacobian(model, x)) < 1e-10


LIMITED = """
import json, resource, sys, torch
from torch import nn
from jacray_workers.engine import prepare, run_shard
from jacray_workers.request import make_request

torch.set_num_threads(1)
torch.manual_seed(0)
method, room = sys.argv[1], int(sys.argv[2]) << 20
net = nn.Sequential(nn.Linear(300, 2000), nn.Tanh(), nn.Linear(2000, 60), nn.Tanh(), nn.Linear(60, 20))
x = torch.randn(256, 300)
prepared = prepare(net, x, make_request(method=method, chunk_size=256, memory_budget="8GiB"))
shard = prepared.plan.shard(0)
quiet = run_shard(prepared, shard)
into = {key: torch.empty_like(block) for key, block in quiet.blocks.items()}
from jacray_workers.planning import memory
memory.trim()
size = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + room, resource.RLIM_INFINITY))
result = run_shard(prepared, shard, into=into)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
gap = max(float((result.blocks[k] - b).abs().max() / b.abs().max()) for k, b in quiet.blocks.items())
print(json.dumps({"gap": gap, "chunk": result.chunk_size, **result.facts}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit on a process's memory is Linux's")
@pytest.mark.parametrize(
    ("method", "room"), [("backward_loop", 4), ("layerwise", 30), ("reverse", 30), ("forward", 30)]
)
def test_a_process_that_may_take_no_more_memory_goes_on(method: str, room: int) -> None:
    # Every large tensor in a mapping of its own: what the C library has left over would otherwise be room that varies.
    apart = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}
    command = [sys.executable, "-c", LIMITED, method, str(room)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200, env=apart)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["backoffs"] >= 1
    assert found["chunk"] < 256
    assert found["gap"] < 1e-5

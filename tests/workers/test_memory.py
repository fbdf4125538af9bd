"""Memory: lines through measurements, chunks within a budget, running out and going on, and the process's own peak."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import jacray
import pytest
import torch
from jacray_workers.engine import prepare, run_shard
from jacray_workers.errors import BudgetError
from jacray_workers.plan import Shard
from jacray_workers.planning import heap, memory, sizing
from jacray_workers.planning.memory import Line, fit
from jacray_workers.request import budget_bytes, make_request
from torch import Tensor, nn

from tests import reference
from tests.door import compute
from tests.toys import Scarce


def test_a_line_through_two_measurements() -> None:
    line = fit([(1, 300), (3, 500)])
    assert (line.base, line.slope) == (200, 100)
    assert line.fit_in(int(memory.SLACK * 1200)) == 10
    assert line.at(line.fit_in(10_000)) <= 10_000 < line.at(line.fit_in(10_000) + 1)


def test_a_line_never_falls_and_refuses_what_cannot_fit() -> None:
    assert fit([(1, 500), (2, 400)]).slope == 0
    assert Line(1000, 1).fit_in(900) == 0


def test_measure_sees_what_is_alive_at_once() -> None:
    def work() -> None:
        for _ in range(5):
            torch.empty(1000, dtype=torch.float32).add_(1)
        a = torch.empty(1000)
        b = torch.empty(500)
        del a, b

    assert memory.measure(work, torch.device("cpu")) == 6000


def test_measure_does_not_count_what_stood_before() -> None:
    given = torch.zeros(1_000_000)

    def work() -> None:
        torch.empty(100).copy_(given[:100].detach())

    assert memory.measure(work, torch.device("cpu"), [given]) == 400


def test_samples_out_of_a_large_batch_go_in_chunks_as_large_as_their_own_work_allows() -> None:
    x = torch.randn(4000, 1000)
    few = jacray.plan(Squares(), x, method="backward_loop")
    assert few.chunk_size > sizing.SEVERAL
    assert few.peak_bytes < 4 * x.nbytes
    assert torch.equal(jacray.jacobian(Squares(), x, method="backward_loop")[:, 0], 2 * x)


class Squares(nn.Module):
    """The sum of the squares of a row, `(B, n)` to `(B, 1)`."""

    def forward(self, x: Tensor) -> Tensor:
        return (x**2).sum(dim=1, keepdim=True)


# Blocks of 16 MiB, some at a time, written and freed; then how many pages had to be mapped to do it again.
FAULTS = """
import resource, sys
import torch
from jacray_workers.planning import heap

def work():
    blocks = [torch.empty(1 << 22).fill_(1.0) for _ in range(10)]

heap.settle(int(sys.argv[1]))
for _ in range(3):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(heap._libc("mallopt") is None, reason="the C library is not glibc")
@pytest.mark.parametrize("variables", [{}, {"MALLOC_TRIM_THRESHOLD_": "131072"}], ids=["ours", "as-the-user-set-it"])
def test_memory_stays_for_the_next_chunk_unless_the_user_has_bounded_it(variables: dict[str, str]) -> None:
    command = [sys.executable, "-c", FAULTS, str(1 << 33)]
    own = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE")}
    done = subprocess.run(command, env={**own, **variables}, capture_output=True, text=True, check=True, timeout=100)
    # Ten blocks have 40,960 pages of 4 KiB, and are written five times.
    assert int(done.stdout) > 100_000 if variables else int(done.stdout) < 1000


def test_a_small_budget_leaves_the_library_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(heap, "_told", [])
    monkeypatch.setattr(heap, "_libc", lambda _: lambda *asked: told.append(asked))
    heap.settle(1 << 27)
    assert not told
    for budget in (1 << 40, 1 << 27, 1 << 27):
        heap.settle(budget)
    # Once told it is told of smaller budgets too, and nothing twice.
    assert [size for what, size in told if what == -1] == [heap.KEPT, 1 << 23]


@pytest.mark.parametrize(("budget", "expected"), [(100, 100), ("2KiB", 2048), ("3kB", 3000), ("50%", 500), (0.25, 250)])
def test_budgets_in_bytes(budget: Any, expected: int) -> None:
    assert budget_bytes(budget, free=1000) == expected


@pytest.mark.parametrize("method", ["reverse", "forward", "backward_loop", "layerwise"])
def test_a_smaller_budget_means_smaller_chunks_and_the_same_numbers(method: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 30)).double()
    x = torch.randn(64, 40, dtype=torch.float64)
    roomy = compute(net, x, method=method)
    tight = compute(
        net,
        x,
        method=method,
        memory_budget=int(roomy.plan.bytes_out + (roomy.plan.peak_bytes - roomy.plan.bytes_out) * 0.6),
    )
    assert tight.plan.chunk_size < roomy.plan.chunk_size
    assert tight.plan.peak_bytes <= tight.plan.budget_bytes
    torch.testing.assert_close(tight.jacobian, roomy.jacobian, rtol=1e-11, atol=1e-12)


def test_what_cannot_fit_is_refused_before_running_with_both_figures() -> None:
    net = nn.Linear(100, 100)
    with pytest.raises(BudgetError, match=r"1 sample at a time would take .*KiB.*a budget of 9.8 KiB"):
        compute(net, torch.randn(4, 100), memory_budget=10_000)


def test_running_out_halves_the_chunk_and_goes_on_from_the_rows_done() -> None:
    from jacray_workers.engine import assemble, combine, prepare, run_shard
    from jacray_workers.request import make_request

    # Three rows are folded into the batch, so four samples are twelve to the model.
    model, x = Scarce(12, torch.OutOfMemoryError("injected")), torch.randn(37, 3, dtype=torch.float64)
    prepared = prepare(model, x, make_request(method="backward_loop", chunk_size=16))
    model.armed[0] = True
    done: list[int] = []
    result = run_shard(prepared, prepared.plan.shard(0), on_samples=done.append)
    model.armed[0] = False
    assert done == [4] * 9 + [1]
    assert result.chunk_size == 4
    assert result.facts["backoffs"] == 2
    found = assemble(prepared, combine(prepared.plan, [result]))["jacobian"]
    assert reference.worst(found, reference.jacobian(model, x)) < 1e-10


def test_one_sample_that_does_not_fit_is_told() -> None:
    from jacray_workers.engine import prepare, run_shard
    from jacray_workers.request import make_request

    model, x = Scarce(0, torch.OutOfMemoryError("injected")), torch.randn(5, 3)
    prepared = prepare(model, x, make_request(method="backward_loop", chunk_size=4))
    model.armed[0] = True
    with pytest.raises(BudgetError, match="one sample at a time"):
        run_shard(prepared, prepared.plan.shard(0))


CHILD = """
import sys, torch, jacray
from torch import nn
torch.manual_seed(0)
torch.set_num_threads(1)
method, work, budget = sys.argv[1], sys.argv[2], int(sys.argv[3]) * 2**20

def mlp(*widths):
    layers = [part for a, b in zip(widths, widths[1:]) for part in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])

def cnn():
    convs = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(32 * 24 * 24, 10))

weighted = {"returns": "weighted_gradient", "weights": torch.randn(4, 5000, 10)}
each = {"returns": "weighted_gradient", "weights": torch.randn(10), "wrt": "params", "reduction": "none"}
small, wide = mlp(20, 24, 20), mlp(600, 256, 200)
vectors = {name: torch.randn(p.shape) for name, p in wide.named_parameters()}
several = ["jacobian", "gram", "norms", "singular_values"]
net, x, fields = {
    "inputs": lambda: (mlp(400, 512, 64), torch.randn(512, 400), {}),
    "many_inputs": lambda: (mlp(8000, 64, 8), torch.randn(16, 8000), {}),
    "large_samples": lambda: (mlp(2000, 64, 2000), torch.randn(6, 2000), {}),
    "params": lambda: (mlp(300, 64, 10), torch.randn(150, 300), {"wrt": "params", "form": "dense"}),
    "factors": lambda: (mlp(600, 256, 64), torch.randn(400, 600), {"wrt": "params", "form": "factors"}),
    "bottleneck": lambda: (mlp(600, 256, 16, 256, 600), torch.randn(80, 600), {}),
    "convolutions": lambda: (cnn(), torch.randn(256, 3, 24, 24), {}),
    "ntk": lambda: (mlp(600, 256, 40), torch.randn(60, 600), {"returns": "ntk"}),
    "ntk_params": lambda: (mlp(600, 256, 40), torch.randn(60, 600), {"returns": "ntk", "wrt": "params"}),
    "gram": lambda: (mlp(600, 256, 256, 40), torch.randn(2000, 600), {"returns": "gram"}),
    "wide_gram": lambda: (mlp(2500, 64, 8), torch.randn(400, 2500), {"returns": "gram"}),
    "ggn": lambda: (mlp(600, 256, 256, 40), torch.randn(2000, 600), {"returns": "ggn"}),
    "ggn_times_vectors": lambda: (wide, torch.randn(999, 600), {"returns": "ggn", "wrt": "params", "vectors": vectors}),
    "fisher": lambda: (small, torch.randn(1500, 20), {"returns": "fisher", "wrt": "params"}),
    "norms": lambda: (wide, torch.randn(1000, 600), {"returns": "norms"}),
    "norms_params": lambda: (wide, torch.randn(400, 600), {"returns": "norms", "wrt": "params"}),
    "singular_values": lambda: (wide, torch.randn(300, 600), {"returns": "singular_values"}),
    "top_singular_values": lambda: (wide, torch.randn(300, 600), {"returns": "singular_values", "top_k": 3}),
    "mean_jacobian": lambda: (wide, torch.randn(1000, 600), {"returns": "mean_jacobian"}),
    "mean_params": lambda: (mlp(600, 256, 40), torch.randn(1000, 600), {"returns": "mean_jacobian", "wrt": "params"}),
    "logabsdet": lambda: (mlp(400, 256, 400), torch.randn(300, 400), {"returns": "logabsdet"}),
    "weighted": lambda: (mlp(600, 512, 512, 10), torch.randn(5000, 600), weighted),
    "weighted_each": lambda: (mlp(300, 64, 10), torch.randn(400, 300), each),
    "jvp": lambda: (mlp(600, 512, 512, 10), torch.randn(5000, 600), {"returns": "jvp", "vectors": torch.randn(600)}),
    "several": lambda: (mlp(600, 256, 64), torch.randn(300, 600), {"returns": several}),
}[work]()
fields = {"returns": "jacobian", **fields}
few = {name: value[:, :3] if name == "weights" and value.dim() == 3 else value for name, value in fields.items()}
jacray.compute(net, x[:3], method=method, **few)

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

# From here on the highest mark is this call's own, and nothing is held that it could use again.
from jacray_workers.planning import heap, memory, sizing
memory.trim()
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
result = jacray.compute(net, x, method=method, memory_budget=budget, **fields)
print((status("VmHWM") - before) / budget, result.plan.peak_bytes / budget)
"""
# Each with a budget that holds it only in portions, or only just.
WORKS = [
    *((method, "inputs", 120) for method in ("reverse", "forward", "backward_loop", "layerwise")),
    ("forward", "many_inputs", 60),
    *((method, "large_samples", 180) for method in ("auto", "reverse", "layerwise")),
    *((method, "params", 180) for method in ("reverse", "backward_loop", "layerwise")),
    ("layerwise", "factors", 150),
    *((method, "convolutions", 200) for method in ("reverse", "backward_loop", "layerwise")),
    ("chain", "bottleneck", 140),
    ("auto", "ntk", 100),
    ("auto", "ntk_params", 100),
    *((method, "gram", 200) for method in ("auto", "layerwise", "reverse")),
    ("auto", "wide_gram", 200),
    *((method, "ggn", 100) for method in ("auto", "reverse", "backward_loop")),
    ("auto", "ggn_times_vectors", 100),
    ("auto", "fisher", 60),
    ("auto", "norms", 100),
    ("layerwise", "norms_params", 250),
    ("auto", "singular_values", 200),
    ("auto", "top_singular_values", 100),
    ("auto", "mean_jacobian", 200),
    ("auto", "mean_params", 250),
    ("auto", "logabsdet", 200),
    ("auto", "weighted", 200),
    ("reverse", "weighted_each", 150),
    ("auto", "jvp", 200),
    ("auto", "several", 200),
]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the highest mark of resident memory is read as Linux shows it")
@pytest.mark.parametrize(("method", "work", "budget"), WORKS)
def test_the_budget_is_kept_as_resident_memory(method: str, work: str, budget: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, method, work, str(budget)],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    taken, planned = map(float, done.stdout.split())
    assert taken < 1.0
    assert planned <= 1.0


def test_a_chunk_is_rehearsed_where_it_comes_near_the_budget() -> None:
    """What a few samples do not show: here, a step that takes the square of the number of samples."""
    net, x = Pairs(), torch.randn(256, 8)
    roomy = compute(net, x, method="backward_loop", memory_budget="8GiB").plan
    tight = compute(net, x, method="backward_loop", memory_budget=2 << 20)
    assert tight.plan.chunk_size < roomy.chunk_size
    assert reference.worst(tight.jacobian[:4], reference.jacobian(net, x[:4])) < 1e-4
    with pytest.raises(BudgetError, match=r"256 samples at a time would take"):
        compute(net, x, method="backward_loop", memory_budget=2 << 20, chunk_size=256)


class Pairs(nn.Module):
    """Makes a table over all pairs of samples, and leaves it unused."""

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[0]
        return x.sin() + 0 * torch.ones(size, size, 16).sum(dim=(1, 2)).unsqueeze(1)


def test_forward_takes_no_more_of_a_batch_than_a_chunk() -> None:
    """torch gives a tangent the memory of its primal's storage, which for a slice is the whole batch."""
    net, x = nn.Linear(32, 4), torch.randn(4096, 32)
    prepared = prepare(net, x, make_request(method="forward", chunk_size=8))
    shard = Shard(0, 2048, 2056)
    run_shard(prepared, shard)
    # 32 tangents of 8 samples of 32 numbers, a few times over; the batch's storage for each would be 500 times that.
    assert memory.measure(lambda: run_shard(prepared, shard), torch.device("cpu")) < 64 * 32 * 8 * 32 * 4

"""Memory: lines through measurements, chunks within a budget, running out and going on, and the process's own peak."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from jacray_workers.errors import BudgetError
from jacray_workers.planning import memory
from jacray_workers.planning.memory import Line, fit
from jacray_workers.request import budget_bytes
from torch import Tensor, nn

from tests import reference
from tests.door import compute


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


class Scarce(nn.Module):
    """Runs out of memory for more samples than `most` at a time, once `armed`; counts the samples that it computed."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.seen: list[int] = []
        self.armed = [False]

    def forward(self, x: Tensor) -> Tensor:
        if self.armed[0]:
            if x.shape[0] > self.most:
                raise torch.OutOfMemoryError("injected")
            self.seen.append(x.shape[0])
        return x.pow(3).cumsum(dim=1)


def test_running_out_halves_the_chunk_and_goes_on_from_the_rows_done() -> None:
    from jacray_workers.engine import assemble, combine, prepare, run_shard
    from jacray_workers.request import make_request

    # Three rows are folded into the batch, so four samples are twelve to the model.
    model, x = Scarce(12), torch.randn(37, 3, dtype=torch.float64)
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

    model, x = Scarce(0), torch.randn(5, 3)
    prepared = prepare(model, x, make_request(method="backward_loop", chunk_size=4))
    model.armed[0] = True
    with pytest.raises(BudgetError, match="one sample at a time"):
        run_shard(prepared, prepared.plan.shard(0))


CHILD = """
import resource, sys, torch, jacray
from torch import nn
torch.manual_seed(0)
method, wrt, budget = sys.argv[1], sys.argv[2], 400 * 2**20
if wrt == "inputs":
    net, x = nn.Sequential(nn.Linear(784, 1024), nn.Tanh(), nn.Linear(1024, 160)), torch.randn(512, 784)
else:
    net, x = nn.Sequential(nn.Linear(784, 64), nn.Tanh(), nn.Linear(64, 10)), torch.randn(120, 784)
jacray.jacobian(net, x[:3], wrt=wrt, method=method, form="dense")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
J = jacray.jacobian(net, x, wrt=wrt, method=method, form="dense", memory_budget=budget)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / budget)
"""


@pytest.mark.slow
@pytest.mark.parametrize("wrt", ["inputs", "params"])
@pytest.mark.parametrize("method", ["reverse", "backward_loop", "layerwise"])
def test_the_budget_is_kept_as_resident_memory(method: str, wrt: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, method, wrt], capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.0

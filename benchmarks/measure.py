"""Measure one piece of work in this process: every side checked, then timed turn by turn, then weighed."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks import checks, machine, memory
from benchmarks.task import Arrays, CannotError, Ready, Side, Task, make_task
from benchmarks.timing import Times, interleaved
from benchmarks.works import Work

Settle = Callable[[], Any]
# Seconds: a call that takes longer is not made once more for its peak memory; its first call's stands, which is higher
# by what it prepared.
AGAIN = 1.0


def measure(
    work: Work,
    ours: Side,
    peers: Sequence[Side],
    *,
    budget: float,
    rates: float = 1.0,
    device: str = "cpu",
    rounds: tuple[int, int] = (5, 400),
    log: Callable[[str], Any] = lambda _: None,
) -> dict[str, Any]:
    """Everything that a row of the table says, as plain data.

    Args:
        work: the row.
        ours: our side.
        peers: the others.
        budget: about how many seconds to spend on timing.
        rates: seconds for each measurement of the machine's rates.
        device: where the model and the batch are.
        rounds: the fewest and the most rounds of timing.
        log: told what is being done.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peers' warnings are theirs
        unfused_attention()
        settle = machine.waiter(device)
        task = make_task(work.case, device=device)
        sides, ready = _checked(task, ours, peers, settle, log)
        timable = {name: side.call for name, side in ready.items()}
        times = interleaved(timable, budget, {name: sides[name]["first"] for name in timable}, settle, rounds)
        log("timed")
        for name, found in times.items():
            sides[name].update(_figures(found))
            if found.median < AGAIN and counted(name, device):
                sides[name]["peak_bytes"] = memory.peak_of(timable[name], device)
    return {
        "work": work.name,
        "title": work.shown,
        "target": asdict(work.target),
        "least": {"operations": work.least[0], "bytes": work.least[1]},
        "dense_bytes": task.dense_bytes(),
        "rates": machine.rates(rates, device) if rates else {},
        "machine": machine.describe(),
        "sides": sides,
        "seconds_spent": sum(sum(t.calls) for t in times.values()),
    }


def unfused_attention() -> None:
    """Attention by the plain kernel for the rest of the process: the fused ones have no rules for vmap.

    Peers would meet errors or loops; we switch them off ourselves, whatever the process has set.
    """
    torch.backends.mha.set_fastpath_enabled(False)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def _checked(
    task: Task, ours: Side, peers: Sequence[Side], settle: Settle, log: Callable[[str], Any] = lambda _: None
) -> tuple[dict[str, dict[str, Any]], dict[str, Ready]]:
    """Each side's first call, and whether its answer is right; only right ones are ready to be timed.

    Raises:
        WrongError: ours is wrong, so that nothing here would be worth timing.
    """
    sides: dict[str, dict[str, Any]] = {}
    own, entry, raw = _first(ours, task, settle)
    answer = own.read(raw)
    sides[ours.name] = {**entry, "error": checks.against_float64(answer, task)}
    ready = {ours.name: own}
    log(f"{ours.name} {sides[ours.name]}")
    for peer in peers:
        try:
            side, entry = _peer(peer, task, answer, settle)
        except CannotError as reason:
            sides[peer.name] = {"cannot": str(reason)}
        except checks.WrongError as reason:
            sides[peer.name] = {"wrong": str(reason)}
        except Exception as error:  # noqa: BLE001 - whatever a peer raises is its result
            sides[peer.name] = {"failed": f"{type(error).__name__}: {_line(error)}"}
        else:
            sides[peer.name], ready[peer.name] = entry, side
        memory.trim()
        log(f"{peer.name} {sides[peer.name]}")
    return sides, ready


def _peer(peer: Side, task: Task, answer: Arrays, settle: Settle) -> tuple[Ready, dict[str, Any]]:
    side, entry, raw = _first(peer, task, settle)
    return side, {**entry, "error": checks.against(side.read(raw), answer, task)}


def _first(side: Side, task: Task, settle: Settle) -> tuple[Ready, dict[str, Any], Any]:
    """Get a side ready around its own copy of the model, and call it once: seconds, peak memory, bytes out."""
    own = task.own_copy()

    def both() -> tuple[Ready, Any, float]:
        began = time.perf_counter()
        ready = side.make(own)
        raw = ready.call()
        settle()
        return ready, raw, time.perf_counter() - began

    (ready, raw, seconds), peak = memory.watched(both, task.x.device.type)
    if not counted(side.name, task.x.device.type):
        peak = None
    return ready, {"first": seconds, "peak_bytes": peak, "bytes_out": memory.nbytes(raw)}, raw


def counted(name: str, device: str) -> bool:
    """Whether a side's memory is seen: on a GPU only what torch's allocator gives out is."""
    return device == "cpu" or not name.startswith("JAX")


def _figures(times: Times) -> dict[str, Any]:
    low, high = times.quartiles
    return {
        "median": times.median, "minimum": times.minimum, "low": low, "high": high, "calls": len(times.calls)
    }  # fmt: skip


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:160]

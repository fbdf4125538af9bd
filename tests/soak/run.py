"""The soak itself: many clients for some minutes, then a look at what is left."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from tests.serving import Server
from tests.soak.deeds import DEEDS, Person, known
from tests.soak.watch import Process, Watch

USERS = 4
KEPT = 50
TOLD = 40


@dataclass
class Report:
    """What came of it.

    Attributes:
        done: how often each deed was done.
        errors: what went wrong, the first of them in words.
        left: what should not have been there in the end.
        processes: what was seen of each process that was there from beginning to end.
    """

    seconds: float = 0.0
    done: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    processes: list[Process] = field(default_factory=list)

    @property
    def swollen(self) -> list[str]:
        """The processes that grew."""
        return [process.name for process in self.processes if not process.flat()]

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return bool(self.done) and not (self.errors or self.left or self.swollen)


def soak(folder: Path, *, minutes: float, clients: int, address: str, pause: float, seed: int = 0) -> Report:
    """Start a service, use it, stop it.

    Args:
        folder: a new folder for its state.
        minutes: how long.
        clients: how many at a time, each waiting for its answers.
        address: where its jobs run, `inline` or `local`.
        pause: the mean seconds that a client rests after each deed.
        seed: of what is done when.
    """
    for spec in ("net", "deep", "wide", "handmade"):
        known(spec)
    tokens = {f"user{i}": f"a-token-of-user-{i}-that-is-long" for i in range(USERS)}
    arguments = ("--workers", "2", "--limit", f"kept_jobs={KEPT}", "--ray-address", address)
    server = Server(folder / "state", arguments, ",".join(f"{n}:{t}" for n, t in tokens.items())).start()
    assert server.process is not None
    report = Report()
    watch = Watch(server.process.pid, max(minutes * 60 / 240, 0.5))
    watch.start()
    began = time.monotonic()
    people = [Person(server, list(tokens.values())[i % USERS], random.Random(f"{seed}-{i}")) for i in range(clients)]
    threads = [threading.Thread(target=_live, args=(me, began + 60 * minutes, pause, report)) for me in people]
    before = watch.pids()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report.seconds = time.monotonic() - began
    watch.stop()
    report.processes = [seen for pid, seen in watch.seen.items() if pid in before and len(seen.times) > 20]
    report.left += [f"process {pid} was not there before" for pid in _working(watch) - before]
    report.left += [f"process {pid} is gone" for pid in before - watch.pids()]
    _tidy(server, list(tokens.values()), report)
    _stop(server, watch, report)
    return report


def _live(me: Person, until: float, pause: float, report: Report) -> None:
    """Do one thing after another."""
    torch.set_num_threads(1)
    weights, deeds = zip(*DEEDS, strict=True)
    while time.monotonic() < until:
        (deed,) = me.draw.choices(deeds, weights)
        try:
            deed(me)
            report.done[deed.__name__] += 1
        except Exception as error:  # noqa: BLE001 - counted, told and made to fail the soak
            report.done[f"{deed.__name__} failed"] += 1
            if len(report.errors) < TOLD:
                report.errors.append(f"{deed.__name__}: {type(error).__name__}: {str(error)[:500]}")
        time.sleep(me.draw.random() * 2 * pause)
    me.client.close()


def _working(watch: Watch) -> set[int]:
    """Our own processes; Ray starts and ends some of its own as it likes."""
    found = set()
    for pid in watch.pids():
        try:
            if any(word.startswith("jacray.") for word in psutil.Process(pid).cmdline()):
                found.add(pid)
        except psutil.Error:
            continue
    return found


def _tidy(server: Server, tokens: list[str], report: Report) -> None:
    """Everything that users left is deleted by them; nothing else may lie around then."""
    for token in tokens:
        for kind, name, key in (("jobs", "jobs", "id"), ("models", "models", "digest"), ("inputs", "inputs", "digest")):
            for one in server.ask("GET", f"/v1/{kind}", token=token)[2][name]:
                server.ask("DELETE", f"/v1/{kind}/{one[key]}", token=token)
    report.left += [f"{path}" for name in ("incoming", "uploads", "jobs") for path in (server.state / name).iterdir()]
    report.left += [f"{path}" for path in server.spool.iterdir()]
    text = server.ask("GET", "/metrics", token=tokens[0])[2].decode()
    report.left += [line for line in text.splitlines() if line.startswith("jacray_processes_lost_total")]
    report.left += [line for line in server.said().splitlines() if "Traceback" in line or '"level": "error"' in line][
        :TOLD
    ]


def _stop(server: Server, watch: Watch, report: Report) -> None:
    """Nothing outlives the service."""
    there = [psutil.Process(pid) for pid in watch.pids()]
    spool = server.spool
    code = server.stop()
    if code != 0:
        report.left.append(f"the server ended with code {code}")
    report.left += [f"{process} outlived the service" for process in psutil.wait_procs(there, timeout=30)[1]]
    if spool.exists():
        report.left.append(f"{spool} outlived the service")

"""The faults. Each takes a ground to try it on and, where it needs workers, a client; and gives a verdict."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jacray
import psutil
import torch
from jacray.events import ShardDone

from tests.chaos.ground import FIELDS, Ground, Verdict, judge, ray_workers
from tests.chaos.models import caught, set_trap


def workers_killed(ground: Ground, client: jacray.Client, seed: int) -> Verdict:
    """SIGKILL of random workers at random times, from outside."""
    job = client.submit(ground.model(), ground.inputs, to=ground.run, **FIELDS)
    draw, killed, over, before = random.Random(seed), 0, threading.Event(), -1

    def kill() -> None:
        nonlocal killed, before
        while not over.wait(draw.uniform(0.1, 0.8)):
            victims, status = ray_workers(), job.status()
            # Where no worker lives for as long as a shard takes, that shard is rightly given up.
            if victims and not status.finished and status.shards_done > before:
                before = status.shards_done
                with contextlib.suppress(psutil.Error):
                    draw.choice(victims).kill()
                    killed += 1
            if killed >= 6:
                return

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        job.result(timeout=250)
    finally:
        over.set()
        killer.join()
    return judge(ground, killed)


def workers_die(ground: Ground, client: jacray.Client, seed: int) -> Verdict:
    """SIGKILL of a worker in the middle of chosen shards, one of them three times."""
    draw = random.Random(seed)
    for sample in draw.sample(range(20, ground.samples), 2):
        set_trap(ground.traps, "kill", sample)
    set_trap(ground.traps, "kill", draw.randrange(20, ground.samples), times=3)
    client.submit(ground.model(), ground.inputs, to=ground.run, **FIELDS).result(timeout=250)
    return judge(ground)


def worker_hangs(ground: Ground, client: jacray.Client, seed: int) -> Verdict:
    """A worker that never answers; the client's shard timeout ends it."""
    set_trap(ground.traps, "hang", random.Random(seed).randrange(20, ground.samples))
    client.submit(ground.model(), ground.inputs, to=ground.run, **FIELDS).result(timeout=250)
    return judge(ground)


def memory_runs_out(ground: Ground, client: jacray.Client, seed: int) -> Verdict:
    """An allocation that fails in a worker: the same samples come again in smaller chunks."""
    set_trap(ground.traps, "memory", random.Random(seed).randrange(20, ground.samples))
    client.submit(ground.model(), ground.inputs, to=ground.run, **FIELDS).result(timeout=250)
    return judge(ground)


def poisoned(ground: Ground, client: jacray.Client, seed: int) -> Verdict:
    """A shard that always fails: the rest is kept, the error names it, and mended it is all that is left to do."""
    sample = random.Random(seed).randrange(20, ground.samples)
    set_trap(ground.traps, "raise", sample, times=1000)
    job = client.submit(ground.model(), ground.inputs, to=ground.run, **FIELDS)
    start = sample // 4 * 4
    try:
        job.result(timeout=250)
    except Exception as error:  # noqa: BLE001  (which one is looked at)
        told = f"{error} {getattr(error, '__notes__', '')} {error.__cause__}"
        faults = [
            f"the error does not show {what!r}"
            for what in ("poison", f"{start} to {start + 3}", "Traceback")
            if what not in told
        ]
    else:
        faults = ["the job did not fail"]
    for trap in ground.traps.glob("raise-*"):
        trap.unlink()
    again = client.submit(ground.model(), ground.inputs, to=ground.run, **FIELDS)
    again.result(timeout=250)
    verdict = judge(ground, kept=again.status().shards_kept)
    if verdict.kept != ground.shards - 1:
        faults.append(f"{verdict.kept} shards were kept of {ground.shards - 1}")
    return Verdict(verdict.injected, verdict.retries, verdict.kept, verdict.seconds, (*verdict.faults, *faults))


def cancelled(ground: Ground, client: jacray.Client, seed: int, kind: str = "hang") -> Verdict:
    """Cancel inside a kernel that never ends, or one call into torch that takes half a minute (`compute`).

    The job is over in two seconds, the process gone, the worker's place free, and what is finished is kept.
    """
    set_trap(ground.traps, kind, random.Random(seed).randrange(ground.samples // 2, ground.samples), times=1000)
    job = client.submit(ground.model(), ground.inputs, to=ground.run, **FIELDS)
    until = time.monotonic() + 120
    while not caught(ground.traps) and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(0.2)
    asked = time.monotonic()
    job.cancel()
    ended = job.wait(30)
    took = time.monotonic() - asked
    faults = [] if ended and took < 2.5 else [f"the job ended {took:.1f} s after it was cancelled"]
    faults += [f"process {pid} was not ended" for pid in caught(ground.traps) if not _ends(pid)]
    other = client.submit(torch.nn.Linear(3, 2), torch.randn(8, 3), method="reverse").result(timeout=100)
    faults += [] if other.jacobian.shape == (8, 2, 3) else ["the worker was not freed"]
    for trap in ground.traps.glob(f"{kind}-*"):
        trap.unlink()
    again = client.submit(ground.model(), ground.inputs, to=ground.run, **FIELDS)
    again.result(timeout=250)
    verdict = judge(ground, 1, again.status().shards_kept)
    faults += [] if verdict.kept > 0 else ["nothing was kept"]
    return Verdict(1, verdict.retries, verdict.kept, verdict.seconds, (*verdict.faults, *faults))


def cancelled_in_a_call(ground: Ground, client: jacray.Client, seed: int) -> Verdict:
    """Cancel inside one long call into torch."""
    return cancelled(ground, client, seed, "compute")


def _ends(pid: int) -> bool:
    """Whether a process is gone within some seconds."""
    until = time.monotonic() + 10
    while psutil.pid_exists(pid) and time.monotonic() < until:
        time.sleep(0.05)
    return not psutil.pid_exists(pid)


def store_read_only(ground: Ground, client: jacray.Client, seed: int) -> Verdict:
    """A store that the workers may no longer write to: the job stops with one error, and goes on when they may."""
    job = client.submit(ground.model(), ground.inputs, to=ground.run, **FIELDS)
    stop = random.Random(seed).randrange(1, ground.shards // 2)
    for _ in job.events():
        if job.status().shards_done >= stop:
            break
    with _read_only(ground.run / "results.zarr"):
        try:
            job.result(timeout=100)
        except jacray.StorageError as error:
            faults = [] if "ead-only" in str(error) else [f"the error does not say what is wrong: {error}"]
        else:
            faults = ["the job did not stop"]
    again = client.submit(ground.model(), ground.inputs, to=ground.run, **FIELDS)
    again.result(timeout=250)
    verdict = judge(ground, 1, again.status().shards_kept)
    faults += [] if verdict.kept >= stop else [f"{verdict.kept} shards were kept of {stop} and more"]
    return Verdict(1, verdict.retries, verdict.kept, verdict.seconds, (*verdict.faults, *faults))


def scaled(ground: Ground, client: jacray.Client, seed: int) -> Verdict:
    """Workers added and let go while the job runs."""
    job = client.submit(ground.model(), ground.inputs, to=ground.run, **FIELDS)
    steps = [3, 1, 4, 2]
    for i, _ in enumerate(e for e in job.events() if isinstance(e, ShardDone)):
        if i % (ground.shards // 5) == ground.shards // 10 and steps:
            client.scale(steps.pop(0))
    job.result(timeout=250)
    client.scale(2)
    return judge(ground, 4 - len(steps))


def coordinator_killed(ground: Ground, seed: int, times: int = 3) -> Verdict:
    """SIGKILL of the coordinator's process at random moments, and the same command again until it is through."""
    draw, killed, done = random.Random(seed), 0, 0
    for _ in range(times):
        process = ground.start()
        ground.wait_for(done + draw.randrange(1, max(2, ground.shards // 4)), process)
        time.sleep(draw.uniform(0, 0.1))
        if process.poll() is None:
            process.kill()
            killed += 1
        process.communicate(timeout=60)
        done = ground.done()
    return _goes_on(ground, killed, done)


def block_truncated(ground: Ground, seed: int) -> Verdict:
    """A finished block that lost its end after the coordinator was killed: found by its checksum, computed again."""
    draw = random.Random(seed)
    process = ground.start()
    ground.wait_for(ground.shards // 2, process)
    process.kill()
    process.communicate(timeout=60)
    done = ground.done()
    chunks = sorted(p for p in (ground.run / "results.zarr/jacobian/c").rglob("*") if p.is_file())
    victim = draw.choice(chunks[: max(1, done // 2)])
    os.truncate(victim, victim.stat().st_size * draw.randrange(100) // 100)
    return _goes_on(ground, 1, done - 1)


def interrupted(ground: Ground, seed: int, times: int = 1) -> Verdict:
    """Ctrl-C once: a clean stop that says how to go on; twice: at once."""
    process = ground.start()
    ground.wait_for(random.Random(seed).randrange(1, ground.shards // 2), process)
    began = time.monotonic()
    for i in range(times):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.3 if i + 1 < times else 0)
    _, err = process.communicate(timeout=60)
    took, done, faults = time.monotonic() - began, ground.done(), []
    # The second one may meet an interpreter that is leaving: then it dies of the signal, which a shell calls 130 too.
    if process.returncode not in ((130,) if times == 1 else (130, -signal.SIGINT)):
        faults.append(f"exit code {process.returncode}: {err[-300:]}")
    if times == 1 and f"of {ground.shards} shards are finished and kept" not in err:
        faults.append(f"it did not say how to go on: {err[-300:]}")
    if took > (15 if times == 1 else 5):
        faults.append(f"it took {took:.1f} s")
    verdict = _goes_on(ground, times, done)
    return Verdict(times, verdict.retries, verdict.kept, verdict.seconds, (*verdict.faults, *faults))


def disk_full(ground: Ground, seed: int) -> Verdict:
    """A disk that fills up in the middle: one message, and the same command goes on when there is room."""
    with _small_disk(ground.run):
        process = ground.start()
        ground.wait_for(ground.shards // 4, process)
        ballast = ground.run / "ballast"
        room = shutil.disk_usage(ground.run).free
        # Some pages are left, so that it is full at another file each time.
        with contextlib.suppress(OSError):
            ballast.write_bytes(bytes(max(0, room - random.Random(seed).randrange(16) * 4096)))
        out, err = process.communicate(timeout=100)
        stopped = subprocess.CompletedProcess(process.args, process.returncode, out, err)
        return _after_storage(ground, stopped, ["rm", str(ballast)])


def disk_read_only(ground: Ground, seed: int) -> Verdict:
    """A store gone read-only in the middle."""
    process = ground.start()
    ground.wait_for(ground.shards // 4, process)
    with _read_only(ground.run / "results.zarr"):
        out, err = process.communicate(timeout=100)
    stopped = subprocess.CompletedProcess(process.args, process.returncode, out, err)
    return _after_storage(ground, stopped, ["true"])


@contextlib.contextmanager
def _read_only(folder: Path) -> Iterator[None]:
    # A mount of its own on top: one that has files open for writing cannot be made read-only.
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def can_mount(folder: Path) -> bool:
    """Whether this process may mount a file system of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], check=False, capture_output=True
    ).returncode:
        return False
    subprocess.run(["umount", str(folder)], check=True)
    return True


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def _after_storage(ground: Ground, stopped: subprocess.CompletedProcess[str], mend: list[str]) -> Verdict:
    faults = []
    if stopped.returncode != 1 or "Traceback" in stopped.stderr:
        faults.append(f"exit code {stopped.returncode}: {stopped.stderr[-400:]}")
    subprocess.run(mend, check=True)
    verdict = _goes_on(ground, 1, ground.done())
    return Verdict(1, verdict.retries, verdict.kept, verdict.seconds, (*verdict.faults, *faults))


def _goes_on(ground: Ground, injected: int, done: int) -> Verdict:
    """The same command once more: through, and nothing computed twice."""
    last = ground.finish()
    faults = [] if last.returncode == 0 else [f"exit code {last.returncode}: {last.stderr[-400:]}"]
    if faults:
        return Verdict(injected, 0, 0, 0.0, tuple(faults))
    receipt = jacray.load(ground.run).receipt
    kept = receipt["shards_kept"]
    if kept != done:
        faults.append(f"{kept} shards were kept of {done} that were done")
    verdict = judge(ground, injected, kept)
    return Verdict(injected, verdict.retries, kept, verdict.seconds, (*verdict.faults, *faults))

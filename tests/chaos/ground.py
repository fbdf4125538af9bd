"""Where faults are tried: a folder with inputs, a spec and traps, the command in its own process, and the checks."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jacray
import numpy as np
import psutil
import torch
from jacray import store
from jacray.cli.standing import state_of
from jacray.journal import Journal
from jacray.target import as_target

from tests.chaos.models import Careful, sprung

ROOT = Path(__file__).parents[2]
SHARD = 4
FIELDS: dict[str, Any] = {
    "returns": ["jacobian", "gram", "weighted_gradient"],
    "weights": torch.ones(4),
    "method": "backward_loop",
    "chunk_size": SHARD,
    "verify": 2,
}
SPEC = """\
model: {{kind: import, target: "tests.chaos.models:make", args: {{traps: {traps}, seconds: {seconds}}}}}
inputs: {{kind: npy, path: {inputs}}}
request: {{returns: [jacobian, gram, weighted_gradient], weights: [1.0, 1.0, 1.0, 1.0], method: backward_loop,
  chunk_size: 4, verify: 2}}
cluster: {{address: {address}, workers: 2, shard_size: 4, shard_timeout: 20}}
output: {{path: {run}, report: false}}
"""


@dataclass
class Ground:
    """One try.

    Attributes:
        path: a folder of its own.
        shards: how many shards the job has.
        seconds: how long a shard takes at least.
        address: where the command computes.
        far: the command writes to the run's folder as to an object store, by a URL.
    """

    path: Path
    shards: int = 200
    seconds: float = 0.01
    address: str = "inline"
    far: bool = False
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self.traps.mkdir(exist_ok=True)
        numbers = np.random.default_rng(self.shards).standard_normal((self.samples, 6)).astype(np.float32)
        numbers[:, 0] = np.arange(self.samples)
        np.save(self.path / "inputs.npy", numbers)
        self.spec.write_text(
            SPEC.format(
                traps=self.traps, seconds=self.seconds, inputs=self.path / "inputs.npy", run=self.run,
                address=self.address,
            )
        )  # fmt: skip

    @property
    def samples(self) -> int:
        return self.shards * SHARD

    @property
    def traps(self) -> Path:
        return self.path / "traps"

    @property
    def run(self) -> Path:
        return self.path / "run"

    @property
    def spec(self) -> Path:
        return self.path / "spec.yaml"

    @property
    def inputs(self) -> torch.Tensor:
        return torch.from_numpy(np.load(self.path / "inputs.npy"))

    def model(self) -> Careful:
        torch.manual_seed(0)
        return Careful(str(self.traps), self.seconds)

    def start(self, *overrides: str) -> subprocess.Popen[str]:
        """`jacray run` in a process group of its own, marked so that what it leaves behind can be found."""
        environment = {
            **os.environ, "JACRAY_CHAOS": str(self.path), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "service"), str(ROOT / "workers")]),
            # Each command is on a machine of its own as far as journals go.
            "XDG_CACHE_HOME": tempfile.mkdtemp(prefix="cache-", dir=self.path),
            "FSSPEC_LOCAL": '{"auto_mkdir": true}',
        }  # fmt: skip
        overrides = (*overrides, f"output.path=local://{self.run}") if self.far else overrides
        return subprocess.Popen(
            [sys.executable, "-m", "jacray.cli", "run", str(self.spec), "--progress", "json", *overrides],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
            start_new_session=True,
        )  # fmt: skip

    def finish(self, *overrides: str) -> subprocess.CompletedProcess[str]:
        """Run the command to its end."""
        process = self.start(*overrides)
        out, err = process.communicate(timeout=280)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def done(self) -> int:
        """How many shards the journal has as done."""
        path = self.run / "journal.sqlite"
        if not path.is_file():
            return 0
        with Journal(path, read_only=True) as journal:
            return sum(journal.counts(job.id).done for job in journal.jobs())

    def wait_for(self, done: int, process: subprocess.Popen[str]) -> None:
        """Wait until so many shards are done, or the process has ended."""
        until = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < until:
            try:
                if self.done() >= done:
                    return
            except jacray.JacrayError:  # the journal is being made
                pass
            time.sleep(0.02)


@dataclass(frozen=True)
class Verdict:
    """What a try came to; `faults` lists what is wrong, and must be empty."""

    injected: int
    retries: int
    kept: int
    seconds: float
    faults: tuple[str, ...]


_quiet: dict[Any, dict[str, torch.Tensor]] = {}


def quiet(ground: Ground) -> dict[str, torch.Tensor]:
    """What a job that nothing happens to gives, computed in this process once."""
    if ground.shards not in _quiet:
        calm = Ground(ground.path / "quiet", ground.shards, 0.0)
        with jacray.Client("inline", shard_size=SHARD) as client:
            result = client.submit(calm.model(), calm.inputs, **FIELDS).result(timeout=200)
        _quiet[ground.shards] = {name: torch.as_tensor(value).clone() for name, value in result}
    return _quiet[ground.shards]


def judge(ground: Ground, injected: int | None = None, kept: int = 0) -> Verdict:
    """Look at everything that a try has left behind."""
    faults = [*_numbers(ground), *_shards(ground), *_litter(ground), *_orphans(ground)]
    with Journal(ground.run / "journal.sqlite", read_only=True) as journal:
        retries = journal.counts(journal.jobs()[0].id).retries
    count = sprung(ground.traps) if injected is None else injected
    return Verdict(count, retries, kept, time.monotonic() - ground.began, tuple(faults))


def _numbers(ground: Ground) -> list[str]:
    found = jacray.load(ground.run)
    expected = quiet(ground)
    wrong = [
        name for name, value in expected.items() if not torch.equal(torch.as_tensor(getattr(found, name)[:]), value)
    ]
    return [f"{name} differs from the quiet run" for name in wrong]


def _shards(ground: Ground) -> list[str]:
    """Every shard done once, and every sample in exactly one."""
    with Journal(ground.run / "journal.sqlite", read_only=True) as journal:
        (job,) = journal.jobs()
        rows = list(journal.shards(job.id))
        state = state_of(job, alone=journal.alone)
    faults = [] if state == "done" else [f"the job is {state}"]
    if [row.shard for row in rows] != list(range(ground.shards)) or {row.state for row in rows} != {"done"}:
        faults.append("a shard is lost or not done")
    written = sorted((w["start"], w["stop"]) for row in rows for w in row.detail["written"] if w["key"] == "jacobian")
    if written != [(i * SHARD, (i + 1) * SHARD) for i in range(ground.shards)]:
        faults.append("a sample is lost or doubled")
    return faults


def _litter(ground: Ground) -> list[str]:
    """What a run's folder may not hold: anything half-written or left over."""
    known = {"spec.yaml", "results.zarr", "receipt.json", "journal.sqlite"}
    faults = [f"{path.name} was left behind" for path in ground.run.iterdir() if path.name not in known]
    odd = [p for p in (ground.run / "results.zarr").rglob("*") if p.is_file() and _is_odd(p)]
    faults += [f"{path.relative_to(ground.run)} is half-written" for path in odd]
    faults += [
        f"{damage.key} is damaged at {damage.start}"
        for damage in store.damages(store.open_store(as_target(ground.run)))
    ]
    return faults


def _is_odd(path: Path) -> bool:
    return path.name != "zarr.json" and not path.name.replace("c", "").isdigit()


def _orphans(ground: Ground) -> list[str]:
    return _left(lambda: _marked(f"JACRAY_CHAOS={ground.path}"))


def orphans() -> list[str]:
    """What this process's clients have left behind, once they are closed."""
    return _left(lambda: [" ".join(p.cmdline())[:60] for p in psutil.Process().children(recursive=True) if _runs(p)])


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE
    return False


def _left(look: Callable[[], list[str]]) -> list[str]:
    """What is still there after some seconds."""
    until = time.monotonic() + 10
    while (left := look()) and time.monotonic() < until:
        time.sleep(0.2)
    return [f"{name} still lives" for name in left]


def _marked(mark: str) -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:60] or folder.name)
        except OSError:
            continue
    return found


def ray_workers() -> list[psutil.Process]:
    """The worker processes of this process's Ray."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::Worker"):
                found.append(process)
        except psutil.Error:
            continue
    return found

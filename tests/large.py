"""A large result goes through a local Ray while every process is watched: `python -m tests.large GIGABYTES [FOLDER]`.

Prints one JSON object: seconds, bytes, and for the driver, the workers and Ray's own processes the largest resident
memory seen, without the object store's shared pages, which are counted once and stated beside.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

import psutil
import torch

SIZE = 1024  # outputs and inputs: 4 MiB of Jacobian a sample


def resident(process: psutil.Process) -> tuple[int, int]:
    """Bytes of a process in memory: its own and mapped files, and the pages of shared memory."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    found = {
        name: int(rest.split()[0]) * 1024
        for name, _, rest in (line.partition(":") for line in lines)
        if rest.endswith("kB")
    }
    return found.get("RssAnon", 0) + found.get("RssFile", 0), found.get("RssShmem", 0)


class Watch(threading.Thread):
    """Samples this process and all that descend from it, twenty times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak: dict[str, int] = defaultdict(int)
        self.shared = 0
        self._over = threading.Event()

    def run(self) -> None:
        """Until stopped."""
        me = psutil.Process()
        while not self._over.wait(0.05):
            for process in (me, *me.children(recursive=True)):
                try:
                    own, shared = resident(process)
                    kind = "driver" if process.pid == me.pid else kind_of(process)
                except (psutil.Error, OSError):
                    continue
                self.peak[kind] = max(self.peak[kind], own)
                self.shared = max(self.shared, shared)

    def stop(self) -> None:
        """End, and wait for the end."""
        self._over.set()
        self.join()


def kind_of(process: psutil.Process) -> str:
    """What a descendant is, in a word."""
    line = " ".join(process.cmdline())
    return "worker" if "Worker" in line or "ray::" in line else "ray"


def through(gigabytes: float, folder: Path) -> dict[str, object]:
    """Compute Jacobians of so many gigabytes into a folder and read some of them."""
    import jacray

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(SIZE, 32), torch.nn.Tanh(), torch.nn.Linear(32, SIZE))
    samples = max(int(gigabytes * 1e9 / (4 * SIZE * SIZE)), 8)
    x = torch.randn(samples, SIZE)
    watch = Watch()
    watch.start()
    began = time.perf_counter()
    with jacray.Client("local", workers=2) as client:
        job = client.submit(model, x, to=folder / "run", method="chain", verify=2)
        result = job.result()
        seconds = time.perf_counter() - began
        some = [0, samples // 2, samples - 1]
        expected = jacray.jacobian(model, x[some], method="backward_loop")
        torch.testing.assert_close(result.jacobian[some], expected)
    watch.stop()
    bytes_ = sum(p.stat().st_size for p in (folder / "run").rglob("*") if p.is_file())
    return {
        "gigabytes": bytes_ / 1e9, "samples": samples, "shards": job.plan.shard_count, "seconds": seconds,
        "peak": dict(watch.peak), "shared": watch.shared, "written": result.jacobian.written,
    }  # fmt: skip


def main() -> None:
    """Run and print."""
    folder = Path(tempfile.mkdtemp(dir=sys.argv[2] if len(sys.argv) > 2 else None))
    try:
        sys.stdout.write(json.dumps(through(float(sys.argv[1]), folder)) + "\n")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()

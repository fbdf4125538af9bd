"""`python -m benchmarks.service`: the HTTP service on loopback, beside its peers where they are installed.

Writes `benchmarks/SERVICE.md`. The peers' environment is made by `make bench-service`: what they ask for contradicts
our pins, so they do not live in ours.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe
from benchmarks.service.ours import FULL, QUICK, measure
from benchmarks.service.page import page
from benchmarks.service.peers import PEERS

HERE = Path(__file__).parent
PEERS_PYTHON = Path(sys.prefix) / "service-peers" / "bin" / "python"
PACKAGES = ("torch", "starlette", "uvicorn", "safetensors")


def peer(name: str, python: Path, calls: int) -> dict[str, Any]:
    """One peer's times, or why there are none."""
    if not python.exists():
        print(f"{name} is left out: there is no {python}; `make bench-service` makes it", file=sys.stderr)
        return {"absent": "peers not installed"}
    command = [str(python), "-m", "benchmarks.service.peers", name, str(calls)]
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(  # noqa: S603 - our own module
        command, cwd=HERE.parents[1], env=variables, capture_output=True, text=True, check=False, timeout=300
    )
    if done.returncode:
        print(f"{name} failed:\n{done.stderr.strip()[-2000:]}", file=sys.stderr)
        return {"absent": f"{name} failed"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the page and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="the page; benchmarks/SERVICE.md, with --quick none")
    parser.add_argument("--json", type=Path, help="write every time as JSON as well")
    parser.add_argument("--quick", action="store_true", help="too few calls to believe")
    parser.add_argument("--peers", type=Path, default=PEERS_PYTHON, help="the Python of the peers' environment")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    effort = QUICK if given.quick else FULL
    load = os.getloadavg()[0]
    found = {
        "machine": {**describe(), "versions": {name: importlib.metadata.version(name) for name in PACKAGES}},
        "load": load,
        "peers": {name: peer(name, given.peers, effort.calls) for name in PEERS},
        **measure(effort),
    }
    text = page(found)
    print(text)
    out = given.out or (None if given.quick else HERE.parent / "SERVICE.md")
    if out is not None:
        out.write_text(text, encoding="utf-8")
    if given.json is not None:
        given.json.write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

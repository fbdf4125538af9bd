"""The commands about a service, against a real one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jacray
import torch

from tests.serving import ALICE, Server

SPEC = """
model: {kind: layers, layers: [{kind: Linear, in_features: 64, out_features: 4}, {kind: Tanh}], seed: 2}
inputs: {kind: digits, range: [0, 20], preprocess: [{kind: reshape, shape: [64]}]}
request: {returns: [jacobian, weighted_gradient, gram], weights: [1, 0, 0, 0], method: reverse}
cluster: {address: inline, workers: 1}
output: {report: false}
"""


def jacray_command(server: Server, *arguments: str, code: int = 0) -> str:
    environment = {**os.environ, "JACRAY_URL": server.url, "JACRAY_TOKEN": ALICE}
    command = [sys.executable, "-m", "jacray.cli", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_submit_status_fetch_cancel(server: Server, tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(SPEC)
    job = jacray_command(server, "submit", str(tmp_path / "spec.yaml")).strip()
    jacray_command(server, "fetch", job, "--to", str(tmp_path / "there"))
    assert "done" in jacray_command(server, "status", job)
    assert job in jacray_command(server, "status")
    assert "already ended" in jacray_command(server, "cancel", job)
    jacray_command(server, "run", str(tmp_path / "spec.yaml"), f"output.path={tmp_path / 'here'}")
    here, there = jacray.load(tmp_path / "here"), jacray.load(tmp_path / "there")
    assert here.names == there.names
    for name in here.names:
        assert torch.equal(getattr(here, name), getattr(there, name))
    assert there.receipt["verified"]["passed"]
    again = tmp_path / "again"
    jacray_command(server, "run", str(tmp_path / "there" / "spec.yaml"), f"output.path={again}")
    for name in here.names:
        assert torch.equal(getattr(jacray.load(again), name), getattr(there, name))


def test_mistakes_exit_with_one_line(server: Server, tmp_path: Path) -> None:
    assert "names no job of yours" in jacray_command(server, "status", "0" * 12, code=1)
    (tmp_path / "spec.yaml").write_text(SPEC.replace("[1, 0, 0, 0]", "[1, 0]"))
    assert "must have one of the shapes" in jacray_command(server, "submit", str(tmp_path / "spec.yaml"), code=1)
    refused = jacray_command(server, "status", "--url", "http://127.0.0.1:1", code=2)
    assert "is `jacray serve` running there?" in refused
    assert "Traceback" not in refused


def test_serving_others_needs_tokens_and_encryption(tmp_path: Path) -> None:
    def refused(*arguments: str, tokens: str = "") -> str:
        command = [sys.executable, "-m", "jacray.cli", "serve", "--port", "0", "--state", str(tmp_path), *arguments]
        environment = {**os.environ, "JACRAY_TOKENS": tokens}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1
        return done.stderr

    assert "unless there are tokens" in refused("--host", "0.0.0.0")
    named = "alice:a-token-that-is-long"
    encrypted = refused("--host", "0.0.0.0", tokens=named)
    assert "unless connections are encrypted" in encrypted
    assert "a-token-that-is-long" not in encrypted
    short = refused(tokens="alice:short")
    assert "at least 16" in short
    assert "short" not in short.replace("shorter", "")
    (tmp_path / "tokens").write_text("bob bob-has-a-long-token")
    (tmp_path / "tokens").chmod(0o644)
    assert "readable by its owner alone" in refused("--tokens", str(tmp_path / "tokens"))
    assert "is not a known name" in refused("--limit", "body_byte=3")

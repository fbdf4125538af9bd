from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(tmp_path, *arguments):
    """The command as a stranger's machine has it: the workers' package and this folder, nothing of the service."""
    data = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--json", str(data), *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env={"PYTHONPATH": str(ROOT / "workers"), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(data.read_text()), done.stdout


def test_methods_and_dense_writes_without_a_gpu(tmp_path):
    found, text = run(tmp_path, "--sections", "correctness,dense writes", "--only", "mlp")
    methods = {entry["method"]: entry for entry in found["correctness"]}
    assert set(methods) == {"reverse", "forward", "backward_loop", "layerwise", "chain", "auto"}
    assert all(methods[name]["error"] < 1e-4 for name in ("reverse", "backward_loop", "layerwise", "auto"))
    assert {"jacray, on the device", "jacray, into main memory"} < {entry["side"] for entry in found["dense writes"]}
    assert all(entry["bytes_per_second"] > 0 for entry in found["dense writes"])
    assert "broken" not in found
    assert "## Correctness" in text


@pytest.mark.slow
def test_everything_without_a_gpu(tmp_path):
    found, text = run(tmp_path)
    assert "broken" not in found
    assert not [entry for entry in found["correctness"] if "wrong" in entry]
    assert all("error" in entry for entry in found["correctness"] if entry["method"] == "auto")
    kept = [entry for entry in found["budgets"] if "peak" in entry]
    assert kept
    assert all(entry["peak"] <= entry["budget"] for entry in kept)
    assert all(entry["difference"] < 1e-4 for entry in kept)
    assert [row["work"] for row in found["large"]] == ["resnet-ntk-3", "gpt2-logits"]
    assert all("median" in row["sides"]["vmap(jacrev)"] for row in found["large"])
    assert "## Table" in text


def test_the_service_and_ray_are_not_loaded():
    code = "import sys, benchmarks.gpu; print(sorted(n for n in ('ray', 'jacray', 'fastapi') if n in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={"PYTHONPATH": str(ROOT / "workers"), "PATH": ""},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"

"""Runs whose `output.path` is a URL, through the command: all files there, resumed, refused, replaced, repaired."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import fsspec
import jacray
import numpy as np
import pytest
import torch
from jacray import emit
from jacray.cli import main
from jacray.folders import finished
from jacray.target import Target
from jacray.url_lease import holders

from tests.chaos.models import set_trap

ROOT = Path(__file__).parents[2]
SPEC = {
    "model": {"kind": "layers", "layers": [{"kind": "Linear", "in_features": 2, "out_features": 3}, {"kind": "Tanh"}]},
    "inputs": {"kind": "random", "shape": [16, 2], "seed": 0},
    "request": {"returns": ["jacobian", "gram"], "method": "reverse", "chunk_size": 4, "verify": 2},
    "cluster": {"address": "inline", "shard_size": 4},
    "output": {"report": False},
}
FILES = {"spec.yaml", "results.zarr", "receipt.json", "report.html", "journal.sqlite"}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """A folder to stand in, and a cache of its own; folders as stores make their parents."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(fsspec.config.conf, "local", {"auto_mkdir": True})
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text(emit.dump(SPEC))
    return tmp_path


@pytest.fixture(params=["memory", "local"])
def url(request, tmp_path) -> str:
    return f"memory://jacray-{uuid.uuid4().hex}/run" if request.param == "memory" else f"local://{tmp_path}/there/run"


def run(*arguments: str) -> int:
    return main(["run", "job.yaml", *arguments])


def test_everything_lies_at_the_url_and_the_numbers_are_those_of_a_folder(url, capsys) -> None:
    assert run(f"output.path={url}", "output.report=true") == 0
    assert f"{url}/report.html" in capsys.readouterr().out
    assert set(Target(url).names()) == FILES
    assert run("output.path=here") == 0
    for name in ("jacobian", "gram"):
        assert torch.equal(getattr(jacray.load(url), name), getattr(jacray.load("here"), name))
    receipt = json.loads(Target(url).read("receipt.json") or "")
    assert receipt["spec"]["output"]["path"] == url
    assert "receipt.json" in (Target(url).read("report.html") or "")
    assert not [path for path in Path().iterdir() if ":" in path.name]


def test_a_rerun_keeps_all_and_its_spec_replays_it(url, capsys) -> None:
    assert run(f"output.path={url}/") == 0
    assert run(f"output.path={url}") == 0
    assert "4 of 4 shards were finished before and are kept" in capsys.readouterr().out
    assert main(["run", f"{url}/spec.yaml"]) == 0
    assert "4 of 4 shards were finished before and are kept" in capsys.readouterr().out
    assert main(["run", f"{url}/spec.yaml", "output.path=again"]) == 0
    assert torch.equal(jacray.load("again").jacobian, jacray.load(url).jacobian)


def test_local_paths_in_the_spec_at_a_url_are_whole_ones(url, tmp_path) -> None:
    np.save("x.npy", np.ones((8, 2), np.float32))
    assert run("inputs={kind: npy, path: x.npy}", f"output.path={url}") == 0
    assert f"path: {tmp_path}/x.npy" in (Target(url).read("spec.yaml") or "")
    assert main(["run", f"{url}/spec.yaml"]) == 0


def test_another_spec_is_refused_by_name_and_replaced_where_asked(url, capsys) -> None:
    assert run(f"output.path={url}", "output.report=true") == 0
    assert run("inputs.seed=1", f"output.path={url}") == 1
    told = capsys.readouterr().err
    assert "output.path: holds the run of another spec (inputs.seed was 0 and is 1)" in told
    assert run("inputs.seed=1", f"output.path={url}", "output.overwrite=true") == 0
    assert set(Target(url).names()) == FILES - {"report.html"}
    assert run("inputs.seed=1", "output.path=here") == 0
    assert torch.equal(jacray.load(url).jacobian, jacray.load("here").jacobian)


def test_what_no_run_wrote_stays_untouched(url, capsys) -> None:
    Target(url).write("thesis.txt", "all of it")
    for more in ((), ("output.overwrite=true",)):
        assert run(f"output.path={url}", *more) == 1
        assert "must be a place where nothing is yet, or one that a run wrote" in capsys.readouterr().err
    assert Target(url).names() == ["thesis.txt"]


def test_a_damaged_block_is_found_and_repaired(url, capsys) -> None:
    assert run(f"output.path={url}") == 0
    before = jacray.load(url).jacobian.clone()
    files = fsspec.core.url_to_fs(url)[0]
    victim = next(path for path in files.find(url) if "/jacobian/c/2/" in path)
    files.pipe_file(victim, files.cat_file(victim)[:-3])
    assert main(["verify", url]) == 1
    assert "jacobian, samples 8 to 11: damaged" in capsys.readouterr().out
    assert main(["verify", url, "--repair"]) == 0
    assert torch.equal(jacray.load(url).jacobian, before)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("output.path=http://host/run", "must be a folder, or a URL of file, local, memory, s3, gs"),
        ("output.path=s4://bucket/run", "must be a folder, or a URL of file, local, memory, s3, gs"),
        ("output.path=simplecache::s3://bucket/run", "must be a folder, or a URL of"),
        ("output.path=s3://name:secret@bucket/run", "must hold no password"),
        ("cluster.address=local output.path=memory://a/run", "must be where every worker reaches it"),
    ],
)
def test_urls_that_take_no_run_are_refused(override, told, capsys) -> None:
    assert run(*override.split()) == 1
    found = capsys.readouterr().err
    assert "output.path" in found
    assert told in found


def test_a_store_that_is_not_installed_or_not_there_is_told_in_one_line(capsys, monkeypatch) -> None:
    monkeypatch.setitem(fsspec.config.conf, "local", {"auto_mkdir": False})
    assert run("output.path=local:///proc/none/run") == 1
    assert "/proc/none/run" in capsys.readouterr().err
    assert main(["run", "memory://jacray-none/spec.yaml"]) == 1
    assert "must be a readable YAML file" in capsys.readouterr().err


def test_two_processes_a_killed_one_and_the_rest_of_its_job(tmp_path, capsys) -> None:
    url, traps = f"local://{tmp_path}/there/run", tmp_path / "traps"
    set_trap(traps, "hang", 0)  # once, in the shard of the sample numbered 0, which is the last one
    np.save("x.npy", np.arange(64, dtype=np.float32)[::-1, None].repeat(6, axis=1).copy())
    arguments = [
        "job.yaml", "inputs={kind: npy, path: x.npy}", f"output.path={url}",
        f'model={{kind: import, target: "tests.chaos.models:make", args: {{traps: "{traps}", seconds: 0.0}}}}',
        "request={returns: jacobian, method: backward_loop, chunk_size: 4, verify: false}",
    ]  # fmt: skip
    environment = {
        **os.environ, "FSSPEC_LOCAL": '{"auto_mkdir": true}',
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "service"), str(ROOT / "workers")]),
    }  # fmt: skip
    process = subprocess.Popen([sys.executable, "-m", "jacray.cli", "run", *arguments], env=environment)
    try:
        while process.poll() is None and finished(Target(url)) != (15, 16):  # the last shard hangs
            time.sleep(0.05)
        held = f"is being computed into by process {process.pid} of"
        assert main(["run", *arguments]) == 1
        told = capsys.readouterr().err
        assert f"output.path: {held}" in told
        assert "silent for 30 s is taken over" in told
        assert main(["run", *arguments, "request.seed=1", "output.overwrite=true"]) == 1
        assert held in capsys.readouterr().err
        assert main(["status", url]) == 0
        assert f"held by   process {process.pid} of" in capsys.readouterr().out
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert main(["status", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "interrupted"
    assert main(["run", *arguments]) == 0
    assert jacray.load(url).receipt["shards_kept"] == 15
    assert holders(Target(url)) == []
    assert main(["run", *arguments, "output.path=quiet"]) == 0
    assert torch.equal(jacray.load(url).jacobian, jacray.load("quiet").jacobian)

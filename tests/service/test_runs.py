"""Run folders: whole or not at all, and opened again without reading what is not asked for."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import jacray
import numpy as np
import pytest
import torch
import xarray
from jacray import emit, spec, store
from jacray.cli import main
from jacray.folders import RunFolder, differences, room
from jacray_workers.blocks.block import Block
from jacray_workers.errors import SpecError, StorageError, UserError
from safetensors.torch import save_file

DATA = {
    "model": {
        "kind": "layers",
        "layers": [{"kind": "Linear", "in_features": 2, "out_features": 3, "name": "first"}, {"kind": "Tanh"}],
    },
    "inputs": {"kind": "random", "shape": [6, 2]},
    "request": {"returns": ["outputs", "jacobian"]},
    "cluster": {"address": "inline"},
    "output": {"path": "runs/a", "report": False},
}


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*overrides, **blocks):
    Path("job.yaml").write_text(emit.dump({**DATA, **blocks}))
    assert main(["run", "job.yaml", *overrides]) == 0
    return jacray.load("runs/a")


def in_process(**fields):
    from jacray_workers.models import as_model
    from jacray_workers.sources import load
    from jacray_workers.sources.specs import Random

    x = load(Random(shape=(6, 2)), Path()).inputs
    return jacray.compute(as_model(DATA["model"]), x, **fields)


# Loading --------------------------------------------------------------------------------------------------------


def test_a_loaded_run_equals_the_same_job_in_this_process():
    result = run("request.method=reverse")
    expected = in_process(returns=["outputs", "jacobian"], method="reverse")
    torch.testing.assert_close(result.jacobian, expected.jacobian)
    torch.testing.assert_close(result.outputs, expected.outputs)
    assert result.names == ("outputs", "jacobian")
    assert result.plan.method == "reverse"
    assert result.receipt["spec"]["request"]["method"] == "reverse"
    assert "jacobian: (6, 3, 2) float32" in repr(result)


def test_parameters_come_back_as_a_dict_and_factors_as_blocks():
    result = run("request.wrt=params", "request.form=factors", "request.method=layerwise")
    expected = in_process(wrt="params", form="dense").jacobian
    assert list(result.jacobian) == ["first.weight", "first.bias"]
    assert isinstance(result.jacobian["first.weight"], Block)
    for name, value in expected.items():
        found = result.jacobian[name]
        torch.testing.assert_close(found.dense() if isinstance(found, Block) else found, value)


def test_named_outputs_and_inputs_come_back_in_their_structure():
    model = {"kind": "function", "expression": {"y": "a*b", "z": ["sum(a)", "b[0]"]}, "inputs": ["a", "b"]}
    values = {"a": [[1, 2], [3, 4]], "b": [[5, 6], [7, 8]]}
    result = run(model=model, inputs={"kind": "inline", "values": values})
    assert set(result.jacobian) == {"y", "z"}
    assert set(result.jacobian["y"]) == {"a", "b"}
    assert result.jacobian["y"]["a"].tolist() == [[[5.0, 0.0], [0.0, 6.0]], [[7.0, 0.0], [0.0, 8.0]]]
    assert result.jacobian["z"]["b"].tolist() == [[[0.0, 0.0], [1.0, 0.0]]] * 2
    found = xarray.open_zarr("runs/a/results.zarr", consolidated=False)
    assert {"jacobian.y.inputs.a", "jacobian.z.inputs.b", "outputs.y"} <= set(found.data_vars)


def test_a_target_named_twice_is_stored_once_and_comes_back_twice():
    result = run("request.wrt=[first.weight, 'first.*', params]")
    assert set(result.jacobian) == {"first.weight", "first.bias"}
    many = run("request.wrt=[inputs, {module: first}]", "output.overwrite=true")
    assert set(many.jacobian) == {"inputs", "first:output"}


def test_opening_reads_nothing_and_slices_read_only_their_part(monkeypatch):
    run("request.chunk_size=2")
    reads = []
    real = store.read_block
    monkeypatch.setattr(store, "read_block", lambda *args: reads.append(args[1].key) or real(*args))
    result = jacray.load("runs/a")
    assert (result.names, result.plan.samples, "jacobian" in dict(result.arrays)) == (("outputs", "jacobian"), 6, True)
    assert result.arrays["jacobian"][2:4].shape == (2, 3, 2)
    assert reads == []
    assert result.outputs is result.outputs
    assert reads == ["outputs"]


def test_a_slice_does_not_touch_other_chunks():
    result = run("request.chunk_size=2")
    kept = result.arrays["jacobian"][:2]
    chunks = sorted(p for p in Path("runs/a/results.zarr/jacobian/c").rglob("*") if p.is_file())
    assert len(chunks) > 1
    for chunk in chunks[1:]:
        chunk.write_bytes(b"not a chunk")
    again = jacray.load("runs/a").arrays["jacobian"]
    assert (again[: again.chunks[0]][:2] == kept).all()
    with pytest.raises(StorageError, match="must hold what was written, but a block is damaged"):
        again[4:6]


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_what_is_no_run_is_refused(name):
    Path("empty").mkdir()
    with pytest.raises(UserError) as caught:
        jacray.load(name)
    assert caught.value.argument == "path"
    assert "must be a run's folder" in caught.value.rule
    assert name in str(caught.value)


def test_an_attribute_that_was_not_asked_for_says_so():
    result = run()
    with pytest.raises(AttributeError, match="norms was not asked for"):
        result.norms  # noqa: B018
    with pytest.raises(KeyError, match="there are outputs, jacobian"):
        result.arrays["norms"]


# Replaying ------------------------------------------------------------------------------------------------------


def test_the_spec_replays_from_where_the_folder_lies_with_files_beside_the_yaml():
    Path("configs").mkdir()
    save_file({"first.weight": torch.ones(3, 2), "first.bias": torch.zeros(3)}, "configs/net.safetensors")
    np.save("configs/x.npy", np.ones((6, 2), np.float32))
    np.save("configs/k.npy", np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 1, 2]])
    data = {
        **DATA,
        "model": {**DATA["model"], "weights": "net.safetensors"},
        "inputs": {"kind": "npy", "path": "x.npy"},
        "request": {"returns": ["weighted_gradient"], "weights": {"kind": "npy", "path": "k.npy"}},
    }
    Path("configs/job.yaml").write_text(emit.dump(data))
    assert main(["run", "configs/job.yaml", "output.path=runs/deep/a"]) == 0
    first = jacray.load("runs/deep/a").weighted_gradient
    os.chdir("runs")
    assert main(["run", "deep/a/spec.yaml", "output.path=again"]) == 0
    assert torch.equal(jacray.load("again").weighted_gradient, first)


def test_an_imported_model_beside_the_yaml_replays_too():
    Path("configs").mkdir()
    Path("configs/near.py").write_text("from torch import nn\n\ndef make():\n    return nn.Linear(2, 3)\n")
    Path("configs/job.yaml").write_text(emit.dump({**DATA, "model": {"kind": "import", "target": "near:make"}}))
    assert main(["run", "configs/job.yaml"]) == 0
    first = jacray.load("runs/a").jacobian
    assert main(["run", "runs/a/spec.yaml"]) == 0
    assert torch.equal(jacray.load("runs/a").jacobian, first)


def test_overrides_and_the_plans_decisions_stand_in_the_spec():
    result = run("inputs.seed=3", "request.chunk_size=4")
    written = spec.read_run("runs/a/spec.yaml").spec
    assert written.inputs.seed == 3
    assert written.request.method == result.plan.method
    assert written.request.chunk_size == 4
    assert written.request.memory_budget == result.plan.budget_bytes


# Writing --------------------------------------------------------------------------------------------------------


def everything(folder):
    return {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def test_a_run_that_fails_leaves_the_old_run_and_nothing_else(monkeypatch):
    run()
    before = everything("runs")

    def broken(*_args, **_kwargs):
        raise RuntimeError("no sum")

    monkeypatch.setattr("jacray.store.Collector.finish", broken)
    assert main(["run", "job.yaml", "request.seed=5", "output.overwrite=true"]) == 2
    assert everything("runs") == before


def test_a_report_that_fails_costs_no_numbers(monkeypatch):
    def broken(*_args, **_kwargs):
        raise RuntimeError("no picture")

    monkeypatch.setattr("jacray.report.page", broken)
    Path("job.yaml").write_text(emit.dump(DATA))
    assert main(["run", "job.yaml", "output.report=true"]) == 2
    found = jacray.load("runs/a")
    assert found.complete
    assert found.jacobian.shape == (6, 3, 2)
    assert found.receipt["spec"]["inputs"]["shape"] == [6, 2]


def test_files_of_the_users_own_stay_and_other_folders_are_refused(capsys):
    run()
    Path("runs/a/notes.txt").write_text("mine")
    run("request.seed=5", "output.overwrite=true")
    assert Path("runs/a/notes.txt").read_text() == "mine"
    assert json.loads(Path("runs/a/receipt.json").read_text())["spec"]["request"]["seed"] == 5
    shutil.rmtree("runs/a")
    Path("runs/a").mkdir()
    Path("runs/a/thesis.txt").write_text("mine")
    capsys.readouterr()
    assert main(["run", "job.yaml", "output.overwrite=true"]) == 1
    assert "must be a new folder, an empty one, or one that a run wrote; got runs/a" in capsys.readouterr().err
    assert [p.name for p in Path("runs/a").iterdir()] == ["thesis.txt"]


def test_where_the_job_ran_makes_no_other_spec():
    run()
    run("cluster.workers=1")
    assert jacray.load("runs/a").receipt["spec"]["cluster"]["workers"] == 1


def half_written(error):
    with room(Path("x/y")):
        assert not Path("x/y/spec.yaml").exists()
        Path("x/y/spec.yaml").write_text("half")
        Path("x/y/results.zarr").mkdir()
        raise error


def test_a_new_run_takes_the_place_of_the_old_or_vanishes():
    with pytest.raises(OSError, match="gone"):
        half_written(OSError("gone"))
    assert list(Path("x").iterdir()) == []
    with room(Path("x/y")):
        Path("x/y/spec.yaml").write_text("whole")
    with pytest.raises(KeyboardInterrupt):
        half_written(KeyboardInterrupt())
    assert {p.name: p.read_text() for p in Path("x/y").iterdir()} == {"spec.yaml": "whole"}
    assert RunFolder(Path("x/y")).is_run


def test_a_link_to_a_folder_stays_a_link():
    Path("real").mkdir()
    Path("link").symlink_to("real")
    with room(Path("link")):
        Path("link/spec.yaml").write_text("new")
    assert Path("link").is_symlink()
    assert Path("real/spec.yaml").read_text() == "new"


def test_a_folder_that_cannot_be_written_is_refused_before_computing(monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    Path("job.yaml").write_text(emit.dump(DATA))
    from jacray.folders import check_free

    with pytest.raises(SpecError, match=r"output\.path: must lie where one may write"):
        check_free(spec.read_run("job.yaml"))


def test_differences_name_the_keys_and_count_the_rest():
    old = {"request": {"seed": 0, "method": "reverse", "wrt": "inputs"}, "inputs": {"a": 1, "b": 2, "c": 3}}
    assert differences(old, {"request": {"seed": 0, "wrt": "inputs"}, "inputs": {"a": 1, "b": 2, "c": 3}}) == []
    changed = {"request": {"seed": 1, "method": "forward", "wrt": ["inputs"]}, "inputs": {"a": 1, "b": 2}}
    assert differences(old, changed) == [
        "request.seed was 0 and is 1",
        "request.method was reverse and is forward",
        "request.wrt was inputs and is ['inputs']",
        "and 1 more",
    ]
    assert differences({"output": {"path": "a"}}, {"output": {"path": "b"}, "cluster": {"workers": 3}}) == []

"""The command as users type it: what it computes, what it prints, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jacray
import pytest
import torch
from jacray import emit
from jacray.cli import main
from jacray_workers.errors import ShardError

from tests.known_answers import CASES

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "jacray.cli"]
FORMULAS = {
    "scalar-needs-no-weights": "mean(3*(a+3))",
    "scalar-jacobian": "mean(3*(a+3))",
    "powers": ["2*a[0]**2", "2*a[1]**3"],
    "crossed-11": "2*stack(a[0]**2 + a[1], a[1]**3 + a[0])",
    "crossed-12": "2*stack(a[0]**2 + a[1], a[1]**3 + a[0])",
    "rows-one-by-one": "2*stack(a[0]**2 + a[1], a[1]**3 + 2*a[0])",
    "one-weight-per-sample": "a @ w",
    "samples-by-classes": "m @ a",
}
CONSTANTS = {
    "one-weight-per-sample": {"w": [[1], [1]]},
    "samples-by-classes": {"m": [[1, 2], [3, 4], [5, 6]]},
}
SMALL = """\
model: {kind: layers, layers: [{kind: Linear, in_features: 2, out_features: 3}]}
inputs: {kind: random, shape: [6, 2]}
request: {returns: [outputs, jacobian]}
cluster: {address: inline}
output: {path: out, report: false}
"""


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def small():
    Path("small.yaml").write_text(SMALL)
    return "small.yaml"


def write_case(case, **cluster):
    model = {"kind": "function", "expression": FORMULAS[case.name]}
    if case.name in CONSTANTS:
        model["constants"] = CONSTANTS[case.name]
    data = {
        "model": model,
        "inputs": {"kind": "inline", "values": [list(row) for row in case.x]},
        "request": case.request,
        "cluster": cluster,
        "output": {"path": "out", "report": False},
    }
    Path("case.yaml").write_text(emit.dump(data))
    return "case.yaml"


def failure(capsys, *arguments):
    """The exit code, and the one line on stderr, after checking that it is one."""
    code = main(arguments)
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1, printed.err
    assert lines[0].startswith("jacray: ")
    assert printed.out == ""
    return code, lines[0]


# What it computes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_known_answers_through_yaml(case):
    assert main(["run", write_case(case, address="inline")]) == 0
    result = jacray.load("out")
    case.check(lambda name: getattr(result, name))


@pytest.mark.parametrize("method", ["reverse", "forward", "backward_loop"])
def test_known_answers_hold_for_each_method_by_override(method):
    case = next(c for c in CASES if c.name == "rows-one-by-one")
    assert main(["run", write_case(case, address="inline"), f"request.method={method}"]) == 0
    result = jacray.load("out")
    assert result.plan.method == method
    case.check(lambda name: getattr(result, name))


def test_one_hot_weights_pick_each_samples_class():
    Path("digits.yaml").write_text(
        "model: {kind: layers, layers: [{kind: Flatten}, {kind: Linear, in_features: 64, out_features: 10}]}\n"
        "inputs: {kind: digits, range: [5, 25]}\n"
        "request: {returns: [jacobian, weighted_gradient], weights: {kind: one_hot, of: target}}\n"
        "cluster: {address: inline}\noutput: {path: out, report: false}\n"
    )
    assert main(["run", "digits.yaml"]) == 0
    result = jacray.load("out")
    picked = result.jacobian[torch.arange(20), result.fields["target"]]
    torch.testing.assert_close(result.weighted_gradient, picked)


@pytest.mark.parametrize(
    ("expression", "outputs"), [({"y": "a[0]", "z": "a[1]"}, None), (["a[0]", "a[1]"], [1]), ("a[0]", None)]
)
def test_a_one_hot_asks_for_the_classes_where_the_model_does_not_tell_them(capsys, expression, outputs):
    data = {
        "model": {"kind": "function", "expression": expression},
        "inputs": {"kind": "inline", "values": [[1, 2]], "fields": {"target": [0]}},
        "request": {
            "returns": ["weighted_gradient"],
            "weights": {"kind": "one_hot", "of": "target"},
            "outputs": outputs,
        },
    }
    Path("hot.yaml").write_text(emit.dump(data))
    code, line = failure(capsys, "run", "hot.yaml")
    assert code == 1
    assert "hot.yaml, line" in line
    assert "request.weights.classes: is required where the model's output is not one row of classes" in line


def test_replaying_the_run_folder_gives_the_same_bits(small):
    assert main(["run", small, "output.path=first", "request.verify=2"]) == 0
    assert main(["run", "first/spec.yaml", "output.path=second"]) == 0
    a, b = jacray.load("first"), jacray.load("second")
    assert torch.equal(a.jacobian, b.jacobian)
    assert torch.equal(a.outputs, b.outputs)
    assert (a.plan.method, a.plan.chunk_size) == (b.plan.method, b.plan.chunk_size)


def test_the_summary_names_what_was_computed_and_where_it_lies(small, capsys):
    assert main(["run", small, "output.report=true"]) == 0
    printed = capsys.readouterr()
    rows = {line.split("  ")[0]: line for line in printed.out.splitlines()}
    assert "outputs, jacobian wrt inputs at 6 samples" in rows["computed"]
    assert "(6, 3, 2) float32" in printed.out
    plan = jacray.load("out").plan
    assert f"{plan.method}: {plan.reason}" in rows["method"]
    assert "samples per second" in rows["speed"]
    assert "passed; the largest relative error is" in rows["check"]
    assert "out/results.zarr" in rows["results"]
    assert "out/report.html" in rows["report"]
    assert sorted(p.name for p in Path("out").iterdir()) == [
        "journal.sqlite", "receipt.json", "report.html", "results.zarr", "spec.yaml"
    ]  # fmt: skip
    assert json.loads(printed.err.splitlines()[-1])["samples_done"] == 6


def test_the_receipt_holds_the_spec_the_digests_and_the_check(small):
    assert main(["run", small]) == 0
    receipt = json.loads(Path("out/receipt.json").read_text())
    assert receipt["spec"]["model"]["kind"] == "layers"
    assert set(receipt["digests"]) == {"model", "inputs"}
    assert receipt["verified"]["passed"] is True
    assert receipt["plan_digest"]


def test_a_plan_tells_its_methods_and_writes_nothing(small, capsys):
    assert main(["plan", small, "request.method=forward"]) == 0
    printed = capsys.readouterr().out
    assert "6 samples x 3 output rows" in printed
    assert "method    forward: asked for" in printed
    assert sorted(p.name for p in Path().iterdir()) == ["small.yaml"]


# How it ends ----------------------------------------------------------------------------------------------------

MISTAKES = [
    (["request.metod=x"], "override request.metod=x: request.metod: is not a known name. did you mean method?"),
    (["request.wrt=0.wieght"], "override request.wrt=0.wieght: request.wrt: is neither inputs nor a glob"),
    (["request.wrt={module: a}"], "request.wrt: names no submodule of the model; got 'a'"),
    (["request.weights=[1, 2]", "request.returns=weighted_gradient"], "request.weights: must have one of the shapes"),
    (["request.outputs=[7]"], "request.outputs: must be indices into one sample's flattened output of 3 numbers"),
    (["request.memory_budget=1"], "request.memory_budget: "),
    (["inputs.shape=[6, 5]"], "line 1: model: must accept the inputs, but raised RuntimeError"),
    (["inputs={kind: npy, path: no.npy}"], "inputs.path: names nothing that exists; got no.npy"),
    (["model.weights=no.safetensors"], "model.weights: names nothing that exists; got no.safetensors"),
    (["model.layers.0.in_features=x"], "model.layers.0: Linear refuses its arguments"),
    (["model={kind: import, target: 'os:system', args: {command: touch touched}}"], "model.target: names a module of"),
    (["model={kind: function, expression: a.b}"], "model.expression: may not reach for attributes; got 'a.b'"),
    (["model={kind: function, expression: 'a[9]'}"], "model.expression: cannot be evaluated: index 9 is out of bounds"),
    (["inputs={kind: inline, values: [[.nan, 1]]}", "request.nan_policy=raise"], "raise forbids NaN and infinity"),
    (["output.path=small.yaml"], "output.path: must be a folder; got small.yaml"),
    (["output.path=."], "output.path: must not be the folder one stands in"),
    (["cluster.address=ray://"], "cluster.address: must be inline, local, auto or ray://HOST:PORT"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "told"), MISTAKES, ids=[m[0][0][:40] for m in MISTAKES])
def test_a_mistake_exits_1_with_one_message_and_writes_nothing(small, capsys, overrides, told):
    code, line = failure_after_progress(capsys, "run", small, *overrides)
    assert code == 1
    assert "small.yaml" in line
    assert told in line
    assert sorted(p.name for p in Path().iterdir()) == ["small.yaml"]


def failure_after_progress(capsys, *arguments):
    """Like `failure`, for what may show only once the job runs: its progress stands before the message."""
    code = main(arguments)
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    assert all("event" in json.loads(line) for line in lines[:-1]), printed.err
    assert printed.out == ""
    return code, lines[-1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run"], "Missing argument 'FILE' (see `jacray run --help`)"),
        (["run", "no.yaml"], "no.yaml: must be a readable YAML file, but No such file or directory"),
        (["plan", "no.yaml"], "no.yaml: must be a readable YAML file"),
        (["rnu", "x.yaml"], "No such command 'rnu'"),
        (["run", "small.yaml", "--fast"], "No such option"),
        (["run", "small.yaml", "method"], "override method: must be KEY=VALUE"),
    ],
)
def test_a_wrong_command_line_exits_1(small, capsys, arguments, told):
    code, line = failure(capsys, *arguments)
    assert code == 1
    assert told in line


def test_a_run_folder_of_another_spec_is_refused_unless_told(small, capsys):
    assert main(["run", small]) == 0
    before = Path("out/receipt.json").read_bytes()
    assert main(["run", small]) == 0, "the same spec is written anew"
    assert Path("out/receipt.json").read_bytes() != before
    before = Path("out/receipt.json").read_bytes()
    capsys.readouterr()
    code, line = failure(capsys, "run", small, "inputs.seed=1", "request.chunk_size=2")
    assert code == 1
    assert "inputs.seed was 0 and is 1" in line
    assert "request.chunk_size was" in line
    assert "choose another output.path, or set output.overwrite=true" in line
    assert Path("out/receipt.json").read_bytes() == before
    assert main(["run", small, "inputs.seed=1", "output.overwrite=true"]) == 0
    assert json.loads(Path("out/receipt.json").read_text())["spec"]["inputs"]["seed"] == 1


def test_a_fault_of_ours_exits_2_and_keeps_its_traceback(small, capsys, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("deep inside")

    monkeypatch.setattr("jacray.runs.save", broken)
    code, line = failure_after_progress(capsys, "run", small)
    assert code == 2
    assert "ZeroDivisionError: deep inside; this is a fault" in line
    kept = Path(line.rpartition("traceback in ")[2].rstrip(")"))
    assert "deep inside" in kept.read_text()
    kept.unlink()
    assert main(["run", small, "--debug"]) == 2
    printed = capsys.readouterr().err
    assert "Traceback (most recent call last)" in printed
    assert "traceback in" not in printed


def test_a_failing_shard_exits_2(small, capsys, monkeypatch):
    monkeypatch.setattr(
        "jacray.cli.commands.compute", lambda *_, **__: (_ for _ in ()).throw(ShardError("shard 3 was lost"))
    )
    code, line = failure(capsys, "run", small)
    assert code == 2
    assert "shard 3 was lost" in line


def test_debug_shows_the_traceback_of_a_mistake_too(small, capsys):
    assert main(["run", small, "inputs.shape=[6, 5]", "--debug"]) == 1
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert "mat1 and mat2 shapes cannot be multiplied" in printed


def test_a_full_disk_is_told_and_leaves_nothing_behind(small, capsys, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("zarr.storage._local._put", full)
    code, line = failure_after_progress(capsys, "run", small)
    assert code == 1
    assert "must take what is written there, but: No space left on device" in line
    assert "free there. make room, then run it again" in line
    assert sorted(p.name for p in Path().iterdir()) == ["small.yaml"]


# As a process of its own ----------------------------------------------------------------------------------------


def spawn(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'service'}:{ROOT / 'workers'}"}
    return subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


def test_help_and_version_load_no_torch_and_no_ray():
    code = (
        "import sys; from jacray.cli import main\n"
        "assert main(['--help']) == 0 and main(['run', '--help']) == 0 and main(['--version']) == 0\n"
        "assert {'torch', 'ray', 'zarr', 'pydantic'}.isdisjoint(sys.modules), 'heavy imports'"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'service'}:{ROOT / 'workers'}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "run" in done.stdout
    assert f"jacray {jacray.__version__}" in done.stdout


def test_the_schema_is_printed_as_json(capsys):
    assert main(["schema"]) == 0
    assert set(json.loads(capsys.readouterr().out)["properties"]) == {"model", "inputs", "request", "cluster", "output"}


def test_a_process_computes_prints_and_ends_cleanly(small):
    process = spawn("run", small)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "(6, 3, 2) float32" in out
    assert "Warning" not in err
    assert jacray.load("out").jacobian.shape == (6, 3, 2)


def test_a_mistake_in_a_process_shows_no_traceback(small):
    process = spawn("run", small, "request.method=revers")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (1, "")
    assert err.strip() == (
        "jacray: small.yaml, override request.method=revers: request.method: must be one of auto, reverse, forward, "
        "backward_loop, layerwise or chain; got 'revers'. did you mean reverse?"
    )


def test_ctrl_c_exits_130_with_one_line_and_leaves_nothing_behind(small):
    Path("slow.py").write_text(
        "import pathlib, time\nfrom torch import nn\n\nclass Slow(nn.Linear):\n    calls = 0\n\n"
        "    def forward(self, x):\n        Slow.calls += 1\n"
        "        pathlib.Path('computing').touch()\n        time.sleep(0.02 * (Slow.calls > 40))\n"
        "        return super().forward(x)\n\ndef make():\n    return Slow(2, 3)\n"
    )
    changes = ["model={kind: import, target: 'slow:make'}", "inputs.shape=[20000, 2]", "request.method=backward_loop"]
    process = spawn("run", small, *changes, "request.chunk_size=1", "request.verify=false", start_new_session=True)
    seen = []
    while '"started"' not in "".join(seen):
        line = process.stderr.readline()
        assert line, "".join(seen)
        seen.append(line)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == ""
    told = [line for line in err.splitlines() if line.strip() and not line.startswith("{")]
    assert told == ["jacray: stopping; again to stop at once", "jacray: interrupted; nothing was left half-written"]
    assert sorted(p.name for p in Path().iterdir() if not p.name.startswith("__")) == [
        "computing",
        "slow.py",
        "small.yaml",
    ]


def test_a_reader_that_leaves_early_is_no_failure():
    process = spawn("schema")
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == ""
    process.stderr.close()


@pytest.mark.ray
def test_a_process_of_its_own_starts_ray_computes_and_shuts_it_down(small):
    process = spawn("run", small, "cluster.address=local")
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "(6, 3, 2) float32" in out
    receipt = json.loads(Path("out/receipt.json").read_text())
    assert receipt["executor"]["address"] == "local"
    assert main(["run", small, "output.path=here"]) == 0
    torch.testing.assert_close(jacray.load("out").jacobian, jacray.load("here").jacobian)


@pytest.mark.ray
@pytest.mark.usefixtures("local_client")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_known_answers_through_yaml_on_the_sessions_ray(case):
    assert main(["run", write_case(case, address="local", workers=2)]) == 0
    result = jacray.load("out")
    case.check(lambda name: getattr(result, name))


@pytest.mark.ray
@pytest.mark.usefixtures("local_client")
def test_a_model_from_a_file_beside_the_yaml_reaches_rays_workers(small):
    Path("beside_yaml.py").write_text(
        "import torch\nfrom torch import nn\n\nclass Doubled(nn.Linear):\n"
        "    def forward(self, x):\n        return 2 * super().forward(x)\n\ndef make():\n    return Doubled(2, 3)\n"
    )
    change = "model={kind: import, target: 'beside_yaml:make', seed: 1}"
    assert main(["run", small, change, "cluster.address=local"]) == 0
    torch.manual_seed(1)
    expected = 2 * torch.nn.Linear(2, 3).weight.detach()
    torch.testing.assert_close(jacray.load("out").jacobian, expected.expand(6, 3, 2))

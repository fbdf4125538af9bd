"""Bad specs through the command line and the library: one clear message each, exit 1, nothing run, nothing written."""

from __future__ import annotations

import contextlib
import random
import resource
import time
from pathlib import Path

import jacray
import jsonschema
import pytest
import torch
from jacray import documents, spec
from jacray.emit import dump
from jacray.overrides import override
from jacray.work import make
from jacray_workers.errors import SpecError, UserError

from tests import hostile
from tests.hostile import bad_spec, check_refusal, command, good_spec, write_files
from tests.workers import source_files

MODEL = {"kind": "function", "expression": "sum(a**2)", "inputs": ["a"]}
OUTPUT = {"path": "run", "report": False, "overwrite": True}
PINNED = {"verify": False, "method": "reverse", "chunk_size": 5, "returns": ["jacobian"]}
GOOD = """\
model: {kind: function, expression: "a[0]*2", inputs: [a]}
inputs: {kind: inline, values: [[1, 2], [3, 4]]}
request: {wrt: inputs, returns: [jacobian]}
cluster: {address: inline}
output: {path: run, report: false}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def inputs(folder):
    return write_files(folder)


def snapshot(base):
    """Every file and when it was written, and every folder."""
    return {p: p.stat().st_mtime_ns if p.is_file() else 0 for p in base.rglob("*") if p.name != "s.yaml"}


def ends(base, text, *overrides):
    """How `jacray run` of a text ends; a refusal is checked to be one, and to have written nothing."""
    (base / "s.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    before = snapshot(base)
    code, out, err = command("run", str(base / "s.yaml"), *overrides)
    if code:
        check_refusal(code, out, err)
        assert snapshot(base) == {k: v for k, v in before.items() if k.exists()}
    return code, err


def library(base, text, overrides):
    """What the library says of the same, or nothing where it takes it."""
    try:
        document = override(documents.parse(text, "s.yaml"), overrides)
        run = spec.Run(spec.check(document), document, base, base / "run")
        make(run)
    except UserError as error:
        return str(error)
    return ""


# By the hundred --------------------------------------------------------------------------------------------------


def test_the_specs_that_are_spoilt_are_good_before(folder, inputs):
    for seed in range(0, 60, 5):
        assert not library(folder, dump(good_spec(random.Random(seed), inputs)), [])


@pytest.mark.parametrize(
    "seeds", [range(80), pytest.param(range(80, 600), marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_spoilt_specs_end_in_one_line_at_the_command_line(folder, inputs, monkeypatch, seeds):
    monkeypatch.chdir(folder)
    ended = [ends(folder, text, *overrides) for text, overrides in (bad_spec(seed, inputs) for seed in seeds)]
    assert sum(code == 1 for code, _ in ended) > 0.8 * len(seeds)


@pytest.mark.parametrize(
    "seeds", [range(2000, 2250), pytest.param(range(3000, 5000), marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_spoilt_specs_end_in_one_line_in_the_library(folder, inputs, monkeypatch, seeds):
    monkeypatch.chdir(folder)
    said = [library(folder, *bad_spec(seed, inputs)) for seed in seeds]
    messages = [message for message in said if message]
    assert len(messages) > 0.8 * len(seeds)
    assert [m for m in messages if "\n" in m or len(m) > 1200 or not m.startswith(("s.yaml", "override"))] == []


@pytest.mark.parametrize(
    "seeds", [range(4000, 4250), pytest.param(range(9000, 11000), marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_the_schema_takes_what_the_check_takes(folder, inputs, seeds):
    """And it refuses nothing else than the check refuses; rules between values are beyond a schema."""
    validator = jsonschema.Draft202012Validator(spec.schema())
    wrong, caught = [], []
    for seed in seeds:
        text, overrides = bad_spec(seed, inputs)
        try:
            document = override(documents.parse(text, "s.yaml"), overrides)
        except SpecError:
            continue
        try:
            spec.check(document)
        except SpecError:
            caught.append(not validator.is_valid(document.data))
            continue
        error = next(validator.iter_errors(document.data), None)
        # A request takes the text '2' for the number 2, and 1 for true, which an editor may well underline.
        if error is not None and not isinstance(error.instance, str) and error.validator_value != "boolean":
            wrong.append((seed, error.message[:200]))
    assert wrong == []
    assert sum(caught) > 0.9 * len(caught)


@pytest.fixture(scope="module")
def spoilable(tmp_path_factory):
    """A folder with a file of each kind that a spec may name, and by kind: the spec, and the files with their bytes."""
    base = tmp_path_factory.mktemp("spoilt")
    runs = {write.__name__: (MODEL, write(base)) for write in source_files.FILES}
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh())
    jacray.export(net, torch.ones(2, 2), base / "net.safetensors")
    torch.save(net.state_dict(), base / "net.pt")
    layers = [{"kind": "Linear", "in_features": 2, "out_features": 3}, {"kind": "Tanh"}]
    x = {"kind": "random", "shape": [3, 2]}
    runs["graph"] = ({"kind": "graph", "path": "net.safetensors"}, x)
    runs["weights"] = ({"kind": "layers", "layers": layers, "weights": "net.pt"}, x)
    found = {}
    for kind, (model, inputs) in runs.items():
        named = base / (inputs.get("path") or model.get("path") or model["weights"])
        files = [named] if named.is_file() else sorted(p for p in named.rglob("*") if p.is_file())
        document = {"model": model, "inputs": inputs, "request": PINNED, "cluster": {"address": "inline"}}
        found[kind] = (dump(document | {"output": OUTPUT}), {file: file.read_bytes() for file in files})
    return base, found


@pytest.mark.parametrize(
    "seeds",
    [range(25), *(pytest.param(range(n, n + 160), marks=pytest.mark.slow) for n in (25, 185, 345))],
    ids=["few", "many", "more", "most"],
)
def test_spoilt_files_end_in_one_line_at_the_command_line(spoilable, monkeypatch, seeds):
    base, runs = spoilable
    monkeypatch.chdir(base)
    refused = 0
    for seed in seeds:
        rng = random.Random(f"file {seed}")
        text, files = runs[rng.choice(sorted(runs))]
        file = rng.choice(sorted(files))
        file.write_bytes(hostile.bad_bytes(files[file], rng))
        code, _ = ends(base, text)
        refused += code == 1
        file.write_bytes(files[file])
    assert refused > 0.4 * len(seeds)


# YAML ------------------------------------------------------------------------------------------------------------

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)
TEXTS = {
    "tag": ("inputs: !!python/object/apply:os.system ['touch touched']", "must not use tags"),
    "new tag": ("inputs: !!python/object/new:os.system ['touch touched']", "must not use tags"),
    "name tag": ("inputs: !!python/name:os.system", "must not use tags"),
    "module tag": ("inputs: !!python/module:os", "must not use tags"),
    "local tag": ("inputs: !evil {a: 1}", "must not use tags"),
    "binary tag": ("inputs: !!binary aGVsbG8=", "must not use tags"),
    "verbatim tag": ("inputs: !<tag:yaml.org,2002:python/none> x", "must not use tags"),
    "tag directive": ("%TAG ! tag:evil,2000:\n---\ninputs: !x 1", "must not use tags"),
    "laughs": (LAUGHS, "at most 250,000 values"),
    "merge laughs": ("a: &a {b: 1}\n" + "c:\n  <<: *a\n", "c"),
    "recursion": ("a: &a [*a]", "alias"),
    "recursive mapping": ("a: &a {b: *a}", "alias"),
    "anchors": ("a: [" + ", ".join(f"&x{i} 1" for i in range(3000)) + "]", "is not a known name"),
    "deep": ("a: " + "[" * 5000, "nest at most 64 deep"),
    "deep mappings": ("a: " + "{a: " * 5000, "nest at most 64 deep"),
    "deep blocks": ("".join(" " * i + "a:\n" for i in range(500)), "nest at most 64 deep"),
    "digits": ("a: " + "9" * 100_000, "at most 400 digits"),
    "octal": ("a: 0o" + "7" * 100_000, "at most 400 digits"),
    "documents": ("a: 1\n---\n" * 100, "one document"),
    "twice": ("a: 1\na: 2", "twice"),
    "nul": ("a: \0", "is not YAML"),
    "bell": ("a: \x07", "is not YAML"),
    "surrogate": ('a: "\\ud800"', "whole characters"),
    "keys": ("{[1]: 2}", "texts as keys"),
    "key alias": ("a: &a x\n? *a\n: 1", "must"),
    "list": ("- 1", "must be a mapping of the blocks"),
    "text": ("just words", "must be a mapping of the blocks"),
    "empty": ("", "must be a mapping of the blocks"),
    "long key": ("? " + "x" * 5000 + "\n: 1", "is not a known name"),
    "long line": ("a: '" + "x" * 100_000 + "'", "is not a known name"),
    "template": ("inputs: {{ range(10**9) }}", "must"),
    "percent": ("%YAML 9.9\n---\na: 1", "YAML"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_hostile_yaml_is_refused_and_runs_nothing(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    text, says = TEXTS[name]
    began, peak = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code, err = ends(tmp_path, text)
    assert code == 1
    assert says in err
    assert not Path("touched").exists()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) << 10 < 400 << 20
    assert time.perf_counter() - began < 60  # a bound on what explodes, not a measurement


def test_a_spec_of_100_megabytes_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "s.yaml").open("wb") as stream:
        stream.write(b"a: [")
        stream.truncate(100 << 20)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code, out, err = command("run", "s.yaml")
    check_refusal(code, out, err)
    assert "at most 4,194,304 bytes" in err
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) << 10 < 20 << 20


@pytest.mark.parametrize("path", ["/dev/zero", "pipe", ".", "no.yaml", "a\nb.yaml"])
def test_a_spec_that_is_no_file_is_refused(tmp_path, monkeypatch, path):
    import os

    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("a\nb.yaml").write_text("x: 1")
    check_refusal(*command("run", path))


# Overrides -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "", "=", "==", "a", ".=1", "..=1", "a.=1", ".a=1", " =1", "model", "model.=", "model..kind=layers", "model=",
        "inputs.values.9999999999999999999999.0=1", "inputs.values.-1=1", "inputs.values.0x1=1",
        "inputs.values.\u0661=1",
        "inputs.values.0.0.0.0=1", "inputs.values=!!python/name:os.system", "inputs.values=&a [*a]", "inputs.values=[1",
        "inputs.values=" + "[" * 100, "inputs.values=" + "9" * 500, "a" * 10_000 + "=1", "." .join("a" * 3000) + "=1",
        "inputs.__class__=1", "__class__.__init__=1", "inputs.values=\0", "a\nb=1", "\udcff=1", "inputs.kind=\udcff",
        "inputs.values=.nan\nx", "inputs.range=[0, 9223372036854775808]", "inputs.range=[.nan, 1]",
        "inputs.range=[0, .inf]",
        "request.weights=.nan", "request.weights=[.inf]", "request.vectors=[[.nan, 1]]", "request.memory_budget=.inf",
        "request.memory_budget=.nan", "request.seed=-1", "request.seed=1e300", "request.chunk_size=1.5",
        "request.outputs=[.nan]", "cluster.gpus_per_worker=.inf", "cluster.workers=1e9", "output.path=\"a\\nb\"",
        "output.path=", "output.path=''", "output.path='\0'",
    ],
)  # fmt: skip
def test_hostile_overrides_are_refused(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    code, err = ends(tmp_path, GOOD, text)
    if text != "output.path=":  # null: the default
        assert code == 1, err


# Numbers that are none -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number", [".nan", ".inf", "-.inf", "1e999", "9223372036854775808", "-1", "1e400", "true", "'1'"]
)
@pytest.mark.parametrize(
    "key",
    [
        "inputs.preprocess=[{kind: scale, factor: N}]",
        "inputs.preprocess=[{kind: normalise, std: N}]",
        "inputs.preprocess=[{kind: normalise, mean: [0, N]}]",
        "inputs.preprocess=[{kind: clip, min: 0, max: N}]",
        "inputs.preprocess=[{kind: reshape, shape: [N, 3]}]",
        "inputs.preprocess=[{kind: select, indices: [N]}]",
        "inputs.range=[0, N]",
        "inputs={kind: random, shape: [N, 2]}",
        "inputs={kind: random, shape: [2, 2], seed: N}",
        "inputs={kind: inline, values: [[1, 2]], dtype: int8, fields: {target: [N]}}",
        "model.constants={w: [N]}",
        "request.weights=[N]",
        "request.verify=N",
        "request.top_k=N",
        "cluster.cpus_per_worker=N",
        "model={kind: layers, layers: [{kind: Linear, in_features: 2, out_features: N}]}",
        "model={kind: layers, layers: [{kind: LeakyReLU, negative_slope: N}]}",
    ],
)
def test_numbers_that_matter_are_numbers_or_refused(tmp_path, monkeypatch, key, number):
    """Some of these are good numbers for some keys; none may end in anything but a result or a refusal."""
    monkeypatch.chdir(tmp_path)
    code, _ = ends(tmp_path, GOOD, key.replace("N", number))
    nonfinite = number in (".nan", ".inf", "-.inf", "1e999", "1e400")
    if nonfinite and not key.startswith(("request.verify", "model")):
        assert code == 1


# Through the functions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("odd", hostile.ODD, ids=lambda odd: repr(odd)[:30])
def test_the_functions_refuse_odd_models_inputs_and_fields_as_users_errors(odd):
    x = torch.ones(2, 3)
    for call in (
        lambda: jacray.compute({"kind": "layers", "layers": odd}, x),
        lambda: jacray.compute({"kind": "function", "expression": odd}, x),
        lambda: jacray.compute(torch.nn.Tanh(), x, wrt=odd),
        lambda: jacray.compute(torch.nn.Tanh(), x, returns=odd),
        lambda: jacray.compute(torch.nn.Tanh(), x, returns=["weighted_gradient"], weights=odd),
        lambda: jacray.compute(torch.nn.Tanh(), x, memory_budget=odd),
        lambda: jacray.compute(torch.nn.Tanh(), x, chunk_size=odd, verify=odd),
        lambda: jacray.compute(torch.nn.Tanh(), x, outputs=odd),
        lambda: jacray.compute(torch.nn.Tanh(), x, device=odd),
    ):
        with contextlib.suppress(UserError):
            call()


@pytest.mark.parametrize("path", ["/etc/hostname.json", "../t.json", "http://127.0.0.1:9/t.json", "memory://t.json"])
def test_a_step_sent_to_a_service_names_no_file(path):
    from jacray.http.work import read_inputs

    step = {"kind": "tokenize", "path": path, "length": 4}
    with pytest.raises(UserError, match=r"within the folders that are open|must be one of file"):
        read_inputs({"kind": "inline", "values": ["a"], "preprocess": [step]}, {}, Path("/nonexistent"))


def test_a_run_folder_that_is_a_link_or_a_file_is_not_written_through(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "file").write_text("kept")
    for path in ("link", "file", "file/run", "elsewhere"):
        code, _ = ends(tmp_path, GOOD, f"output.path={path}", "output.overwrite=true")
        assert code == 1
    assert (tmp_path / "elsewhere" / "kept").read_text() == (tmp_path / "file").read_text() == "kept"
    assert source_files.N == 5

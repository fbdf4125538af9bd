"""YAML, overrides and the five blocks: what is read, what is refused, and where the error says it stands."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import re
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jacray import documents, emit, spec
from jacray.documents import parse
from jacray.overrides import override
from jacray_workers.errors import InputError, RequestError, SpecError

ROOT = Path(__file__).parents[2]
GOOD = """\
model:
  kind: layers
  layers:
    - {kind: Linear, in_features: 2, out_features: 3}
inputs: {kind: random, shape: [4, 2]}
request:
  weights: [1, 0, 0]
cluster: {address: inline}
output: {path: out}
"""


def refusal(text, *overrides):
    with pytest.raises(SpecError) as caught:
        spec.check(override(parse(text, "x.yaml"), overrides))
    return caught.value


# YAML -----------------------------------------------------------------------------------------------------------


def test_scalars_follow_yaml_1_2():
    text = "a: [1, -2, 0o17, 0x1F, 1.5, 1e3, .5, 5., .inf, -.inf, true, null, ~, yes, 0777, 1_000, 2020-01-01, '1']"
    expected = [1, -2, 15, 31, 1.5, 1000.0, 0.5, 5.0, math.inf, -math.inf, True, None, None, "yes", 777, "1_000"]
    assert parse(text, "x").data["a"] == [*expected, "2020-01-01", "1"]
    assert math.isnan(parse("a: .nan", "x").data["a"])


def test_lines_are_remembered_for_keys_and_the_items_of_lists():
    document = parse(GOOD, "x.yaml")
    assert document.place("request.weights") == "x.yaml, line 7"
    assert document.place("model.layers.0.in_features") == "x.yaml, line 4"
    assert document.place("request.weights.2.unknown") == "x.yaml, line 7"
    assert document.place("elsewhere") == "x.yaml"


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)
BAD_YAML = {
    "a: 1\na: 2": ("x.yaml, line 2", "must not give a twice"),
    "a: {b: 1, b: 2}": ("x.yaml, line 1", "must not give a.b twice"),
    "\na: !!python/object/apply:os.system [id]": ("x.yaml, line 2", "must not use tags"),
    "a: !mine 1": ("x.yaml, line 1", "must not use tags"),
    "a: !!str 1": ("x.yaml, line 1", "must not use tags"),
    "- 1": ("x.yaml", "must be a mapping of the blocks"),
    "": ("x.yaml", "must be a mapping of the blocks"),
    "a: 1\n---\nb: 1": ("x.yaml, line 2", "must hold one document"),
    "a: [1\nb: 2": ("x.yaml, line 2", "is not YAML: expected ',' or ']'"),
    "a:\n\t- 1": ("x.yaml, line 2", "is not YAML"),
    "a: \x00": ("x.yaml", "is not YAML"),
    "a: *b": ("x.yaml, line 1", "must use an alias only after its anchor's value has ended"),
    "a: &b [*b]": ("x.yaml, line 1", "must use an alias only after its anchor's value has ended"),
    "? [1]\n: 2": ("x.yaml, line 1", "must have texts as keys"),
    "a: " + "[" * 100: ("x.yaml, line 1", "must nest at most 64 deep"),
    "a: " + "9" * 500: ("x.yaml, line 1", "at most 400 digits"),
    BOMB: ("x.yaml, line 6", "must hold at most 250,000 values"),
}


@pytest.mark.parametrize("text", BAD_YAML, ids=lambda text: repr(text[:20]))
def test_bad_yaml_is_refused_with_its_line(text):
    with pytest.raises(SpecError) as caught:
        parse(text, "x.yaml")
    place, rule = BAD_YAML[text]
    assert caught.value.argument == place
    assert rule in caught.value.rule


def test_a_file_that_is_too_large_missing_or_not_text_is_refused(tmp_path):
    large = tmp_path / "large.yaml"
    with large.open("wb") as stream:
        stream.truncate(100 << 20)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path, rule in [
        (large, "at most 4,194,304 bytes"),
        (binary, "not UTF-8"),
        (tmp_path / "no", "No such file"),
        (tmp_path, "directory"),
    ]:
        with pytest.raises(SpecError) as caught:
            documents.read(path)
        assert caught.value.argument == str(path)
        assert rule in caught.value.rule


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab: -[]{},&*!|>'\"#?%\n\t01.~\\", max_size=60))
def test_any_text_is_a_document_or_a_spec_error(text):
    try:
        found = parse(text, "x").data
    except SpecError as error:
        found = {} if error.argument.startswith("x") else error
    assert isinstance(found, dict)


LEAVES = st.none() | st.booleans() | st.integers(-(10**300), 10**300) | st.floats(allow_nan=False) | st.text()
DATA = st.dictionaries(
    st.text(),
    st.recursive(LEAVES, lambda c: st.lists(c, max_size=4) | st.dictionaries(st.text(), c, max_size=4), max_leaves=12),
    max_size=4,
)


@settings(max_examples=300, deadline=None)
@given(DATA)
def test_what_is_written_reads_back_equal(data):
    assert parse(emit.dump(data, "a header"), "x").data == data


def test_what_is_written_is_laid_out_for_people():
    rows = [[float(i), 1.0] for i in range(20)]
    text = emit.dump({"a": {"kind": "x", "l": [1, 2]}, "rows": rows, "s": "yes", "path": "../x.npy", "e": 1e-05})
    assert text.splitlines()[:2] == ["a: {kind: x, l: [1, 2]}", "rows:"]
    assert "  - [3.0, 1.0]" in text
    assert text.splitlines()[-3:] == ['s: "yes"', "path: ../x.npy", "e: 1.0e-05"]


# Overrides ------------------------------------------------------------------------------------------------------


def test_overrides_change_add_and_replace_without_touching_what_aliases_share():
    document = parse("a: &x {b: 1, c: 2}\nd: *x\nl: [1, {m: 2}]\n", "x.yaml")
    changed = override(document, ["a.b=10", "l.1.m=[3, 4]", "n.o.p=text", "a.c=", "d.b=true"])
    assert changed.data == {
        "a": {"b": 10, "c": None},
        "d": {"b": True, "c": 2},
        "l": [1, {"m": [3, 4]}],
        "n": {"o": {"p": "text"}},
    }
    assert document.data == {"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 2}, "l": [1, {"m": 2}]}
    assert changed.place("l.1.m") == "x.yaml, override l.1.m=[3, 4]"
    assert changed.place("d.c") == "x.yaml, line 2"


@pytest.mark.parametrize(
    ("text", "argument", "rule"),
    [
        ("request.method", "override request.method", "must be KEY=VALUE"),
        ("=1", "override =1", "must be KEY=VALUE"),
        ("a..b=1", "override a..b=1", "must be KEY=VALUE"),
        ("inputs.kind.x=1", "override inputs.kind.x=1", "reaches into what is no mapping or list"),
        ("model.layers.7.kind=Tanh", "override model.layers.7.kind=Tanh", "must give a place from 0 to 0 in the list"),
        ("model.layers.x=1", "override model.layers.x=1", "must give a place from 0 to 0"),
        ("a=[1", "override a=[1, line 1", "is not YAML"),
        ("a=!!python/name:os.system", "override a=!!python/name:os.system, line 1", "must not use tags"),
    ],
)
def test_bad_overrides_are_refused(text, argument, rule):
    with pytest.raises(SpecError) as caught:
        override(parse(GOOD, "x.yaml"), [text])
    assert caught.value.argument == argument
    assert rule in caught.value.rule


# The five blocks ------------------------------------------------------------------------------------------------

WRONG = [
    (["request.metod=reverse"], "request.metod", "is not a known name", "did you mean method?"),
    (["reqest.method=reverse"], "reqest", "is not a known name", "did you mean request?"),
    (["request.method=revers"], "request.method", "must be one of auto, reverse", "did you mean reverse?"),
    (["request.wrt={module: a, sid: 1}"], "request.wrt.sid", "is not a known name", "did you mean side?"),
    (["request.wrt=[inputs, 3]"], "request.wrt.1", "must be a text or a mapping", "3"),
    (["request.returns=[jacobian, jpv]"], "request.returns.1", "must be one of outputs", "did you mean jvp?"),
    (["request.chunk_size=0"], "request.chunk_size", "must be at least 1", "0"),
    (["request.weights=[[1], [1, 2]]"], "request.weights.1", "must have 1 entries", "2 entries"),
    (["request.weights={kind: onehot}"], "request.weights.kind", "must be one of one_hot", "did you mean one_hot?"),
    (["request.weights={kind: one_hot, off: t}"], "request.weights.off", "is not a known name", "did you mean of?"),
    (["request.vectors={a: {kind: npy}}"], "request.vectors.a.path", "is required", ""),
    (["request=3"], "request", "must be a mapping", "3"),
    (["model.kind=layer"], "model.kind", "must be one of layers, import, function", "did you mean layers?"),
    (["model.layers.0.kind=Liner"], "model.layers.0.kind", "must be one of", "did you mean Linear?"),
    (["model.layers.0.out_featres=3"], "model.layers.0.out_featres", "known argument of Linear", "out_features?"),
    (["model.weight=x"], "model.weight", "is not a known name", "did you mean weights?"),
    (["inputs.shape=[4, x]"], "inputs.shape.1", "must be a whole number", "x"),
    (["inputs=5"], "inputs", "must be a mapping with a kind", "5"),
    (["cluster.address=locl"], "cluster.address", "must be inline, local, auto or ray://", "did you mean local?"),
    (["cluster.workers=0"], "cluster.workers", "must be at least 1", "0"),
    (["cluster.workers=true"], "cluster.workers", "must be a whole number", "True"),
    (["cluster.gpus_per_worker=.nan"], "cluster.gpus_per_worker", "must be", "nan"),
    (["output.path=3"], "output.path", "must be a text", "3"),
    (["output.report=maybe"], "output.report", "must be true or false", "maybe"),
    (["output.folder=x"], "output.folder", "is not a known name", "known names: compression, overwrite, path, report"),
]


@pytest.mark.parametrize(("overrides", "key", "rule", "shown"), WRONG, ids=[w[0][0] for w in WRONG])
def test_a_wrong_key_is_refused_with_its_place_rule_value_and_nearest(overrides, key, rule, shown):
    error = refusal(GOOD, *overrides)
    assert error.argument == f"x.yaml, override {overrides[0]}: {key}"
    assert rule in error.rule
    assert shown in str(error)


def test_errors_in_the_file_itself_carry_its_line():
    error = refusal(GOOD.replace("weights", "wieghts"))
    assert str(error) == "x.yaml, line 7: request.wieghts: is not a known name. did you mean weights?"
    assert refusal("model: {kind: layers}").argument == "x.yaml, line 1: model.layers"
    assert refusal(GOOD.replace("inputs:", "inpts:")).argument == "x.yaml, line 5: inpts"


def test_defaults_fill_what_is_left_out(tmp_path):
    (tmp_path / "mine.yaml").write_text("model: {kind: function, expression: sum(a)}\ninputs: {kind: digits}\n")
    run = spec.read_run(tmp_path / "mine.yaml")
    assert (run.spec.cluster.address, run.spec.cluster.workers, run.spec.request.method) == ("local", 2, "auto")
    assert run.folder == Path("runs/mine")
    assert run.base == tmp_path


def test_errors_raised_later_are_given_their_place_and_keep_their_class(tmp_path):
    (tmp_path / "x.yaml").write_text(GOOD)
    run = spec.read_run(tmp_path / "x.yaml", ["request.dtype=float64"])
    cause = ValueError("why")
    with pytest.raises(RequestError) as caught, run.naming():
        raise RequestError("weights", "must be smaller", [1], "make it so") from cause
    assert caught.value.argument == f"{tmp_path}/x.yaml, line 7: request.weights"
    assert (caught.value.rule, caught.value.way_out) == ("must be smaller", "make it so")
    assert caught.value.__cause__ is cause
    with pytest.raises(InputError, match=r"x\.yaml, line 5: inputs\.shape: ") as other, run.naming():
        raise InputError("inputs.shape", "is wrong")
    assert type(other.value) is InputError


FULL = {
    "model": {
        "kind": "layers",
        "layers": [
            {"kind": "Linear", "in_features": 2, "out_features": 3},
            {"kind": "residual", "layers": [{"kind": "Tanh"}], "shortcut": []},
            {"kind": "parallel", "branches": [[{"kind": "ReLU"}]], "combine": "cat", "dim": 1},
        ],
        "weights": "x.safetensors",
        "seed": 0,
    },
    "inputs": {
        "kind": "random",
        "shape": [4, 2],
        "range": [0, 2],
        "preprocess": [{"kind": "scale", "factor": 2}, {"kind": "normalise", "mean": [1, 2], "std": 1}],
    },
    "request": {"wrt": ["inputs", {"module": "a"}], "weights": {"kind": "one_hot", "of": "t"}, "vectors": [[1, 2]]},
    "cluster": {"address": "local", "workers": 2, "cpus_per_worker": 1, "gpus_per_worker": 0},
    "output": {"path": "runs/x", "report": True},
}
MODELS = [
    FULL["model"],
    {"kind": "function", "expression": ["a[0]", "a[1]"], "constants": {"w": [[1]]}, "inputs": ["a"]},
    {"kind": "import", "target": "a:b", "args": {"x": 1}},
]
INPUTS = [
    FULL["inputs"],
    {"kind": "inline", "values": {"a": [[1, 2]]}, "fields": {"t": [1]}},
    {"kind": "csv", "path": "x.csv", "columns": ["a"], "fields": {"t": "b"}},
    {"kind": "npz", "path": "x.npz", "arrays": ["a"], "fields": {"t": "b"}},
]
ODD = [
    None,
    True,
    0,
    -1,
    3.5,
    10**30,
    math.nan,
    math.inf,
    "",
    "x",
    "a.b",
    "\n",
    "((((",
    "a" * 3000,
    [],
    [[]],
    [1],
    ["x"],
]
ODD += [{}, {"kind": "x"}, {"kind": 3}, {"kind": []}, {"a": 1}, [None], [{}], [[1], [2, 3]], {"": ""}]


def places(data, path=()):
    parts = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, part in parts:
        yield (*path, key)
        yield from places(part, (*path, key))


def mutated(seed):
    """A good spec with one or two values replaced, keys added or taken away."""
    rng = random.Random(seed)
    data = copy.deepcopy({**FULL, "model": rng.choice(MODELS), "inputs": rng.choice(INPUTS)})
    for _ in range(rng.choice([1, 1, 2])):
        *above, key = rng.choice(list(places(data)))
        inside = data
        for step in above:
            inside = inside[step]
        action = rng.choice(["replace"] * 4 + ["remove", "add"])
        if action == "remove":
            del inside[key]
        elif action == "add" and isinstance(inside, dict):
            inside[rng.choice(["foo", "kind", "seed", "path", "name", "of"])] = copy.deepcopy(rng.choice(ODD))
        else:
            inside[key] = copy.deepcopy(rng.choice(ODD))
    return data


def told(data):
    """What the check says, or an empty text for a good spec."""
    try:
        spec.check(documents.Document(data, "x.yaml"))
    except SpecError as error:
        return str(error)
    return ""


def test_a_thousand_mutated_specs_are_good_or_refused_with_one_line_that_names_a_key():
    messages = [message for message in (told(mutated(seed)) for seed in range(1000)) if message]
    known = r"x\.yaml: (model|inputs|request|cluster|output|foo|kind|seed|path|name|of)\b[^\n]*"
    assert [message for message in messages if not re.fullmatch(known, message)] == []
    assert len(messages) > 500


# Resolved and the schema ----------------------------------------------------------------------------------------


def test_resolved_writes_every_default_and_paths_that_work_from_the_run_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    Path("configs/x.yaml").write_text(GOOD)
    changes = ["model.weights=net.safetensors", "inputs={kind: npy, path: /data/x.npy}", "output.path=runs/deep/a"]
    changes += ["request.weights={kind: npy, path: ../k.npy}"]
    data = spec.resolved(spec.read_run("configs/x.yaml", changes), {"method": "forward", "chunk_size": 7})
    assert data["model"]["weights"] == "../../../configs/net.safetensors"
    assert data["inputs"]["path"] == "/data/x.npy"
    assert os.path.normpath(Path("runs/deep/a", data["request"]["weights"]["path"])) == "k.npy"
    assert (data["request"]["method"], data["request"]["chunk_size"]) == ("forward", 7)
    assert set(data["request"]) == set(spec.Request.model_fields)
    assert data["output"] == {"path": "runs/deep/a", "report": True, "overwrite": False, "compression": None}
    again = spec.check(parse(emit.dump(data), "spec.yaml"))
    assert again.request.method == "forward"


@pytest.mark.parametrize("name", ["digits.yaml", "first.yaml"])
def test_the_shipped_configs_are_good_and_fit_the_schema(name):
    spec.read_run(ROOT / "configs" / name)
    schema = json.loads(json.dumps(spec.schema()))
    jsonschema.Draft202012Validator.check_schema(schema)
    data = documents.read(ROOT / "configs" / name).data
    jsonschema.validate(data, schema)
    for wrong in ({**data, "x": 1}, {**data, "inputs": {"kind": "digit"}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


def test_the_schema_knows_each_layers_arguments():
    schema = spec.schema()
    layers = {"kind": "layers", "layers": [{"kind": "Linear", "in_features": 2, "out_features": 3, "name": "a"}]}
    good = {"model": layers, "inputs": {"kind": "digits"}}
    jsonschema.validate(good, schema)
    del layers["layers"][0]["in_features"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(good, schema)

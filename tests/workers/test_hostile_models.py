"""Hostile model files and specs: refused with one message, and nothing in them was run."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import random
import struct
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from jacray_workers.errors import UserError
from jacray_workers.models import as_model, build, graph
from jacray_workers.models.graph.file import KEY, MAX_HEADER
from jacray_workers.models.specs import ImportModel
from torch import nn

from tests.hostile import bad_bytes, check_refusal, command

ODD = [
    *(None, True, -1, 0, 3, 10**9, 2**31, 2**40, 2**63, 2**64, 1.5, 1e308, "", "x", "..", "__class__", "a\nb"),
    *([], [[]], [1], {}, {"v": 0}, {"v": -1}, {"v": 10**9}, {"v": "x"}, {"state": "0.weight"}, {"state": "gone"}),
    *({"dtype": "object"}, {"float": "nan"}, {"float": "inf"}, {"device": "cuda"}, {"x": 1}, [[[[[[1]]]]]]),
]


class Canary:
    """Unpickled, it leaves a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture(scope="module")
def data():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)).eval()
    return graph.dump(module, torch.randn(2, 3))


def parts(data):
    """The graph, the rest of the header and the bytes of the tensors."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    return json.loads(header["__metadata__"][KEY]), header, data[8 + length :]


def joined(document, header, body, *, text=None):
    text = json.dumps(document) if text is None else text
    head = json.dumps(header | {"__metadata__": {KEY: text}}).encode()
    return struct.pack("<Q", len(head)) + head + body


def changed(data, change):
    document, header, body = parts(data)
    change(document)
    return joined(document, header, body)


def refusal(data):
    with pytest.raises(UserError) as caught:
        graph.load(data)
    told = str(caught.value)
    assert len(told) < 1500
    return told


def node(name, *args, **kwargs):
    return [name, list(args), kwargs]


X = {"v": 0}


# Graph files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "aten.from_file.default",
        "aten.as_strided.default",
        "aten.add.out",
        "aten.nonzero.default",
        "aten.set_.source_Storage",
        "aten._local_scalar_dense.default",
        "prim.device.default",
        "os.system",
        "aten.__class__.default",
        "aten.add.__init__",
        "higher_order.cond",
        "python.eval",
        "aten.add",
        "",
        "enter",
        "quantized.linear.default",
    ],
)
def test_an_operator_outside_the_list_is_refused(data, name):
    told = refusal(changed(data, lambda d: d["nodes"].append(node(name, X))))
    assert "model" in told


def test_a_cycle_is_refused(data):
    def loop(document):
        count = len(document["inputs"]) + len(document["nodes"])
        document["nodes"].append(node("aten.add.Tensor", {"v": count + 1}, X))
        document["nodes"].append(node("aten.add.Tensor", {"v": count}, X))

    assert "before it is made" in refusal(changed(data, loop))


@pytest.mark.parametrize(
    "nodes",
    [
        [node("aten.full.default", [2**30, 2**30], 1.0)],
        [node("aten.full.default", [2**31] * 3, 1.0)],
        [node("aten.full.default", [2**31] * 32, 1.0)],
        [node("aten.zeros.default", [-1])],
        [node("aten.arange.default", 2**31), node("aten.repeat.default", {"v": -1}, [2**20])],
        [node("aten.expand.default", X, [2**30, 2**20, 3])],
        [node("aten.constant_pad_nd.default", X, [2**31, 2**31], 0.0)],
        [node("aten.linspace.default", 0.0, 1.0, 2**31), node("aten.outer.default", {"v": -1}, {"v": -1})],
        [node("aten.eye.default", 2**31)],
        [node("aten.repeat.default", X, [2**15, 2**15])] * 3,
    ],
    ids=str,
)
def test_a_size_that_explodes_is_refused_before_it_is_allocated(data, nodes):
    def grow(document):
        for name, args, kwargs in nodes:
            last = len(document["inputs"]) + len(document["nodes"]) - 1
            document["nodes"].append([name, [{"v": last} if a == {"v": -1} else a for a in args], kwargs])
        document["output"] = {"v": len(document["inputs"]) + len(document["nodes"]) - 1}

    began = time.perf_counter()
    refusal(changed(data, grow))
    assert time.perf_counter() - began < 60


def test_a_size_that_explodes_with_the_batch_is_refused_when_the_batch_is_known(data):
    def grow(document):
        first = len(document["inputs"]) + len(document["nodes"])
        document["nodes"] += [
            node("size", X, 0),
            node("int.sub", {"v": first}, 2),
            node("int.max", {"v": first + 1}, 0),
            node("int.mul", {"v": first + 2}, 2**30),
            node("aten.zeros.default", [{"v": first + 3}, 1000]),
        ]
        document["output"] = {"tuple": [document["output"], {"v": first + 4}]}

    module = graph.load(changed(data, grow))
    module(torch.zeros(2, 3))
    with pytest.raises(UserError, match=r"needs|numbers"):
        module(torch.zeros(3, 3))


def test_more_nodes_than_allowed_are_refused(data):
    assert "200000" in refusal(changed(data, lambda d: d["nodes"].extend([["x", [], {}]] * 200_001)))


@pytest.mark.parametrize(
    "name",
    [
        "a\nb",
        "__class__.x",
        "0.__dict__",
        "forward.x",
        "0.forward",
        "",
        ".",
        "0..weight",
        "a." * 100 + "b",
        "training",
        "_modules",
    ],
)
def test_a_name_that_reaches_for_attributes_or_breaks_lines_is_refused(data, name):
    def rename(document):
        document["modules"].append(name)

    def rename_state(document):
        document["state"][0]["names"].append(name)

    for change in (rename, rename_state):
        assert "\n" not in refusal(changed(data, change))


def test_a_name_that_stands_twice_is_refused(data):
    refusal(changed(data, lambda d: d["state"][1]["names"].append(d["state"][0]["names"][0])))
    document, header, body = parts(data)
    text = json.dumps(document)
    assert "stands twice" in refusal(
        joined(None, header, body, text=text.replace('{"version"', '{"version": 1, "version"'))
    )
    raw = joined(document, header, body)
    length = struct.unpack("<Q", raw[:8])[0]
    head = raw[8 : 8 + length][:-1] + b', "0.bias": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}'
    assert "stands twice" in refusal(struct.pack("<Q", len(head)) + head + body)


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_number_that_is_not_finite_is_refused(data, constant):
    document, header, body = parts(data)
    document["nodes"].append(node("aten.mul.Tensor", X, 123.5))
    refusal(joined(None, header, body, text=json.dumps(document).replace("123.5", constant)))


def test_a_parameter_may_not_be_written_to(data):
    told = refusal(changed(data, lambda d: d["nodes"].append(node("aten.zero_.default", {"state": "0.weight"}))))
    assert "writes into a parameter" in told


def test_a_deep_document_is_refused(data):
    _, header, body = parts(data)
    assert "deep" in refusal(joined(None, header, body, text="[" * 200_000))
    assert "deep" in refusal(changed(data, lambda d: d.update(output=nested(200))))


def nested(depth):
    tree = {"v": 0}
    for _ in range(depth):
        tree = {"list": [tree]}
    return tree


@pytest.mark.parametrize("length", [0, 1, 10**6, 2**63, 2**64 - 1])
def test_a_header_that_lies_about_its_length_is_refused(data, length):
    refusal(struct.pack("<Q", length) + data[8:])


def test_a_header_that_lies_about_its_tensors_is_refused(data):
    document, header, body = parts(data)
    for entry in (
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 2**50]},
        {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]},
        {"dtype": "F32", "shape": [4], "data_offsets": [48, 64]},
        {"dtype": "PICKLE", "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": "4", "data_offsets": [0, 16]},
        {},
        None,
    ):
        refusal(joined(document, header | {"0.bias": entry}, body))
    refusal(joined(document, header, body[:-4]))
    refusal(joined(document, header, body + b"1234"))
    refusal(joined(document, {k: v for k, v in header.items() if k != "0.bias"}, body))


def test_metadata_of_100_mb_is_refused_quickly(tmp_path):
    path = tmp_path / "m.safetensors"
    head = json.dumps({"__metadata__": {KEY: "x" * (100 * 2**20)}}).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head)
    with pytest.raises(UserError, match=f"{MAX_HEADER:,}"):
        graph.read(path)


def test_plain_weights_are_no_graph(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="holds no graph"):
        graph.read(tmp_path / "w.safetensors")


def mutations(document, rng):
    """The document with a few of its values replaced, removed or copied elsewhere."""
    found = copy.deepcopy(document)
    for _ in range(rng.choice([1, 1, 2, 4])):
        path = rng.choice(list(places(found)))
        inside = found
        for step in path[:-1]:
            inside = inside[step]
        match rng.choice(["odd", "odd", "odd", "remove", "swap", "repeat"]):
            case "odd":
                inside[path[-1]] = copy.deepcopy(rng.choice(ODD))
            case "remove":
                del inside[path[-1]]
            case "swap":
                other = found
                for step in rng.choice(list(places(found))):
                    other = other[step]
                inside[path[-1]] = copy.deepcopy(other)
            case _:
                if isinstance(inside, list):
                    inside.insert(path[-1], copy.deepcopy(inside[path[-1]]))
    return found


def places(value, path=()):
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(part, (*path, key))


@pytest.mark.parametrize("block", range(10))
def test_mutated_graphs_are_refused_or_compute(data, block):
    document, header, body = parts(data)
    refused = 0
    for seed in range(block * 30, block * 30 + 30):
        spoiled = mutations(document, random.Random(seed))
        try:
            module = graph.load(joined(spoiled, header, body))
            module(torch.zeros(2, 3))
        except UserError as error:
            refused += 1
            assert len(str(error)) < 1500  # noqa: PT017 - most raise, a few still compute
    assert refused > 15


@pytest.mark.parametrize("block", range(4))
def test_garbled_graph_files_end_in_one_message_on_the_command_line(data, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = (
        "model: {kind: graph, path: m.safetensors}\ninputs: {kind: random, shape: [2, 3]}\ncluster: {address: inline}\n"
    )
    (tmp_path / "s.yaml").write_text(spec)
    refused = 0
    for seed in range(block * 30, block * 30 + 30):
        rng = random.Random(seed)
        document, header, body = parts(data)
        spoiled = joined(mutations(document, rng), header, body) if seed % 2 else bad_bytes(data, rng)
        (tmp_path / "m.safetensors").write_bytes(spoiled)
        code, out, err = command("plan", "s.yaml")
        if code:
            refused += 1
            check_refusal(code, out, err)
    assert refused > 10
    assert {p.name for p in tmp_path.iterdir()} == {"s.yaml", "m.safetensors"}


# Pickles ------------------------------------------------------------------------------------------------------------

LAYERS = {"kind": "layers", "layers": [{"kind": "Linear", "in_features": 2, "out_features": 1}]}


def state(tmp_path, value, name="w.pt"):
    torch.save(value, tmp_path / name)
    return {**LAYERS, "weights": name}


def test_a_state_dict_of_torch_save_is_read(tmp_path):
    expected = nn.Linear(2, 1)
    tensors = {f"0.{k}": v.detach() for k, v in expected.state_dict().items()}
    for spec in (state(tmp_path, tensors), state(tmp_path, {"epoch": 3, "state_dict": tensors}, "c.ckpt")):
        made = as_model(spec, tmp_path)
        assert torch.equal(made(torch.ones(1, 2)), expected(torch.ones(1, 2)))


@pytest.mark.parametrize(
    "wrap", [lambda c: c, lambda c: {"0.weight": c}, lambda c: {"state_dict": [c]}, lambda _: nn.Linear(2, 1)]
)
def test_a_pickle_in_a_pt_is_refused_and_not_run(tmp_path, wrap):
    canary = tmp_path / "canary"
    spec = state(tmp_path, wrap(Canary(canary)))
    with pytest.raises(UserError, match=r"run code|mapping"):
        as_model(spec, tmp_path)
    assert not canary.exists()


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.bin", "w.ckpt", "w.safetensors"])
def test_a_bare_pickle_is_refused_under_every_ending(tmp_path, name):
    canary = tmp_path / "canary"
    (tmp_path / name).write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(UserError):
        as_model({**LAYERS, "weights": name}, tmp_path)
    assert not canary.exists()


def test_a_compressed_archive_is_refused(tmp_path):
    torch.save({"0.weight": torch.zeros(1, 2), "0.bias": torch.zeros(1)}, tmp_path / "w.pt")
    with (
        zipfile.ZipFile(tmp_path / "w.pt") as given,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in given.infolist():
            bomb.writestr(entry.filename, given.read(entry))
    with pytest.raises(UserError, match="compressed"):
        as_model({**LAYERS, "weights": "b.pt"}, tmp_path)


@pytest.mark.parametrize("seed", range(40))
def test_garbled_state_dicts_are_refused_or_read(tmp_path, seed):
    stream = io.BytesIO()
    torch.save({"0.weight": torch.zeros(1, 2), "0.bias": torch.zeros(1)}, stream)
    (tmp_path / "w.pt").write_bytes(bad_bytes(stream.getvalue(), random.Random(seed)))
    try:
        as_model({**LAYERS, "weights": "w.pt"}, tmp_path)
    except UserError as error:
        assert len(str(error)) < 1500  # noqa: PT017 - some damage does not matter


def program(tmp_path):
    module = nn.Linear(2, 1).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.export.save(
        torch.export.export(module, (torch.randn(2, 2),), dynamic_shapes=({0: batch},)), tmp_path / "m.pt2"
    )
    return module


def test_a_pt2_of_ones_own_is_converted_by_wish_alone(tmp_path):
    module = program(tmp_path)
    target = tmp_path / "m.safetensors"
    code, out, err = command("export", str(tmp_path / "m.pt2"), "--to", str(target))
    check_refusal(code, out, err)
    assert "--trust-pt2" in err
    assert not target.exists()
    code, out, err = command("export", str(tmp_path / "m.pt2"), "--to", str(target), "--trust-pt2")
    assert (code, err) == (0, "")
    assert torch.equal(graph.read(target)(torch.ones(3, 2)), module(torch.ones(3, 2)))


def test_a_pickle_in_every_place_of_a_pt2_stays_unread(tmp_path):
    program(tmp_path)
    canary = tmp_path / "canary"
    with zipfile.ZipFile(tmp_path / "m.pt2") as given:
        entries = {entry.filename: given.read(entry) for entry in given.infolist()}
    code = f"__import__('os').mkdir({str(canary)!r})"
    replaced = [{name: pickle.dumps(Canary(canary))} for name in entries]
    replaced += [
        {n: b.replace(b'"batch"', json.dumps(code).encode())}
        for n, b in entries.items()
        if n.endswith(".json") and b'"' in b
    ]
    for change in replaced:
        with zipfile.ZipFile(tmp_path / "evil.pt2", "w", zipfile.ZIP_STORED) as evil:
            for name, content in (entries | change).items():
                evil.writestr(name, content)
        check_refusal(*command("export", str(tmp_path / "evil.pt2"), "--to", str(tmp_path / "o.safetensors")))
        for spec in ({"kind": "graph", "path": "evil.pt2"}, {**LAYERS, "weights": "evil.pt2"}):
            with pytest.raises(UserError, match="must end in"):
                as_model(spec, tmp_path)
        (tmp_path / "evil.safetensors").write_bytes((tmp_path / "evil.pt2").read_bytes())
        with pytest.raises(UserError):
            as_model({"kind": "graph", "path": "evil.safetensors"}, tmp_path)
        (tmp_path / "evil.pt").write_bytes((tmp_path / "evil.pt2").read_bytes())
        with pytest.raises(UserError):
            as_model({**LAYERS, "weights": "evil.pt"}, tmp_path)
    assert not canary.exists()
    assert len(replaced) > 5


# Import -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target", ["os:system", "subprocess:run", "builtins:eval", "posix:system", "importlib:import_module"]
)
def test_the_standard_library_makes_no_models(target):
    with pytest.raises(UserError, match=r"standard library|may not be imported"):
        as_model({"kind": "import", "target": target, "args": {}})


@pytest.mark.parametrize("prefixes", [(), ("torch",), ("side",)])
def test_a_module_outside_the_allowed_prefixes_is_never_imported(tmp_path, prefixes):
    (tmp_path / "side_effects.py").write_text("import os\nos.mkdir('canary')\nclass Model: pass\n")
    with pytest.raises(UserError, match="may not be imported"):
        build(ImportModel(target="side_effects:Model"), tmp_path, prefixes)
    assert "side_effects" not in sys.modules
    assert not (tmp_path / "canary").exists()


def test_an_allowed_prefix_is_a_whole_package_name():
    made = build(
        ImportModel(target="torch.nn:Linear", args={"in_features": 2, "out_features": 1}), Path.cwd(), ("torch",)
    )
    assert isinstance(made, nn.Linear)
    with pytest.raises(UserError, match="may not be imported"):
        build(ImportModel(target="torch.nn:Linear"), Path.cwd(), ("tor", "torch.n"))


# Sizes in specs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer",
    [
        {"kind": "Linear", "in_features": 10**12, "out_features": 1},
        {"kind": "Linear", "in_features": 10**6, "out_features": 10**6},
        {"kind": "Linear", "in_features": 2**62, "out_features": 2**62},
        {"kind": "Conv2d", "in_channels": 2**31, "out_channels": 2**31, "kernel_size": 3},
        {"kind": "Embedding", "num_embeddings": 2**40, "embedding_dim": 64},
        {"kind": "BatchNorm1d", "num_features": 2**48},
        {"kind": "LayerNorm", "normalized_shape": [2**20, 2**20]},
        {"kind": "Linear", "in_features": -1, "out_features": 1},
        {"kind": "Linear", "in_features": 1.5, "out_features": 1},
    ],
    ids=str,
)
def test_layers_too_large_are_refused_before_they_are_allocated(layer):
    with pytest.raises(UserError):
        as_model({"kind": "layers", "layers": [layer]})


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ({"kind": "timm", "name": "hf-hub:a/b"}, "name"),
        ({"kind": "timm", "name": "../x"}, "name"),
        ({"kind": "timm", "name": "resnet18", "args": {"pretrained": True}}, "weights come from"),
        ({"kind": "timm", "name": "resnet18", "args": {"checkpoint_path": "x"}}, "weights come from"),
        ({"kind": "torchvision", "name": "resnet18", "args": {"weights": "DEFAULT"}}, "weights come from"),
        ({"kind": "torchvision", "name": "resnet18", "args": {"norm_layer": {"a": 1}}}, "number"),
    ],
    ids=str,
)
def test_architectures_may_not_fetch(spec, word):
    with pytest.raises(UserError, match=word):
        as_model(spec)

"""Input specs: what they load, and that files cannot run anything or lie about what they hold."""

from __future__ import annotations

import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
import zarr
from jacray_workers import sources
from jacray_workers.errors import InputError, SpecError, UserError
from jacray_workers.sources import ranged
from jacray_workers.sources.loader import load
from jacray_workers.sources.specs import InputSpec
from jacray_workers.sources.weighting import check_directions, directions
from jacray_workers.validation import explain
from numcodecs import Delta
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file

ADAPTER = TypeAdapter(InputSpec)
ROWS = np.arange(10, dtype=np.float32).reshape(5, 2)


def loaded(base, **spec):
    try:
        checked = ADAPTER.validate_python(spec)
    except ValidationError as error:
        raise InputError(*explain(error, InputSpec, "inputs")) from None
    return load(checked, base)


class Touches:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# What is loaded -------------------------------------------------------------------------------------------------


def test_random_follows_its_seed_and_leaves_the_callers_alone(tmp_path):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a, b, c = (loaded(tmp_path, kind="random", shape=[4, 2], seed=seed).inputs for seed in (3, 3, 4))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a, torch.randn(4, 2, generator=torch.Generator().manual_seed(3)))


def test_random_draws_named_inputs_in_any_precision_and_distribution(tmp_path):
    found = loaded(
        tmp_path, kind="random", shape={"a": [3, 2], "b": [3]}, dtype="float64", distribution="uniform"
    ).inputs
    assert {name: (tuple(t.shape), t.dtype) for name, t in found.items()} == {
        "a": ((3, 2), torch.float64),
        "b": ((3,), torch.float64),
    }
    assert 0 <= float(found["a"].min()) <= float(found["a"].max()) < 1


def test_digits_are_scikit_learns_scaled_with_their_classes(tmp_path):
    from sklearn.datasets import load_digits

    raw = load_digits()
    found = loaded(tmp_path, kind="digits")
    assert found.inputs.shape == (1797, 1, 8, 8)
    assert found.inputs.dtype == torch.float32
    assert np.array_equal(found.inputs[:, 0].numpy() * 16, raw.images)
    assert found.fields["target"].tolist() == raw.target.tolist()
    part = loaded(tmp_path, kind="digits", range=[10, 13])
    assert torch.equal(part.inputs, found.inputs[10:13])
    assert torch.equal(part.fields["target"], found.fields["target"][10:13])
    assert part.start == 10


def test_inline_values_are_floats_unless_asked(tmp_path):
    assert torch.equal(loaded(tmp_path, kind="inline", values=[[2, 3]]).inputs, torch.tensor([[2.0, 3.0]]))
    found = loaded(tmp_path, kind="inline", values={"t": [[1, 2]]}, dtype="int64", fields={"target": [1]})
    assert torch.equal(found.inputs["t"], torch.tensor([[1, 2]]))
    assert found.fields["target"].dtype == torch.int64


def write_npy(base):
    np.save(base / "x.npy", ROWS)
    return {"kind": "npy", "path": "x.npy"}


def write_npz(base):
    np.savez_compressed(base / "x.npz", x=ROWS, y=np.arange(5))
    return {"kind": "npz", "path": "x.npz", "fields": {"target": "y"}}


def write_safetensors(base):
    save_file({"x": torch.from_numpy(ROWS), "y": torch.arange(5)}, base / "x.safetensors")
    return {"kind": "safetensors", "path": "x.safetensors", "fields": {"target": "y"}}


def write_zarr(base):
    group = zarr.create_group(base / "x.zarr")
    group.create_array("x", data=ROWS, chunks=(2, 2))
    group.create_array("y", data=np.arange(5))
    return {"kind": "zarr", "path": "x.zarr", "fields": {"target": "y"}}


def write_csv(base):
    lines = ["a,b,label", *(f"{a},{b},{i}" for i, (a, b) in enumerate(ROWS))]
    (base / "x.csv").write_text("\n".join(lines) + "\n")
    return {"kind": "csv", "path": "x.csv", "fields": {"target": "label"}}


WRITERS = [write_npy, write_npz, write_safetensors, write_zarr, write_csv]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("range_", [None, [1, 4]])
def test_every_file_kind_gives_the_rows_of_its_range_and_their_fields(tmp_path, write, range_):
    found = loaded(tmp_path, **write(tmp_path), range=range_)
    start, stop = range_ or (0, 5)
    assert torch.equal(found.inputs, torch.from_numpy(ROWS[start:stop]))
    if write is not write_npy:
        assert found.fields["target"].tolist() == list(range(start, stop))
        assert not found.fields["target"].is_floating_point()


def test_several_arrays_become_named_inputs(tmp_path):
    spec = write_npz(tmp_path)
    del spec["fields"]
    assert set(loaded(tmp_path, **spec, arrays=["x", "y"]).inputs) == {"x", "y"}
    assert torch.equal(loaded(tmp_path, **spec, arrays="x").inputs, torch.from_numpy(ROWS))


def test_a_zarr_array_and_foreign_byte_orders_are_read_too(tmp_path):
    write_zarr(tmp_path)
    assert torch.equal(loaded(tmp_path, kind="zarr", path="x.zarr/x").inputs, torch.from_numpy(ROWS))
    np.save(tmp_path / "big.npy", np.asfortranarray(ROWS.astype(">f8")))
    assert torch.equal(loaded(tmp_path, kind="npy", path="big.npy").inputs, torch.from_numpy(ROWS).double())


def test_an_npy_is_never_written_and_may_be_cut_off_once_it_was_read(tmp_path):
    spec = write_npy(tmp_path)
    before = (tmp_path / "x.npy").read_bytes()
    found = loaded(tmp_path, **spec).inputs
    expected = found.clone()
    found.mul_(2)
    assert (tmp_path / "x.npy").read_bytes() == before
    (tmp_path / "x.npy").write_bytes(b"")  # what is mapped ends the process here
    assert torch.equal(found, expected * 2)


@pytest.mark.parametrize("kind", ["npy", "safetensors"])
def test_a_file_that_is_cut_off_while_it_is_read_is_refused(tmp_path, monkeypatch, kind):
    """Found out by its size before a read; here it is cut off after that look."""
    x = torch.arange(60, dtype=torch.float32).reshape(20, 3)
    if kind == "npy":
        np.save(tmp_path / "x.npy", np.asfortranarray(x))
    else:
        save_file({"x": x}, tmp_path / "x.safetensors")
    found = sources.rows(ADAPTER.validate_python({"kind": kind, "path": f"x.{kind}"}), tmp_path)
    assert torch.equal(found.read(3, 7).inputs, x[3:7])
    path = tmp_path / f"x.{kind}"
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size - 8)
    with pytest.raises(InputError, match="has changed since it was opened"):
        found.read(0, 20)
    monkeypatch.setattr(ranged, "check_unchanged", lambda _: None)
    with pytest.raises(InputError, match="must hold the bytes that its header promises"):
        found.read(0, 20)


def test_an_array_whose_first_axis_varies_fastest_is_read_by_range(tmp_path):
    x = np.arange(2 * 3 * 4 * 5, dtype=np.int32).reshape(5, 4, 3, 2)
    np.save(tmp_path / "x.npy", np.asfortranarray(x))
    found = sources.rows(ADAPTER.validate_python({"kind": "npy", "path": "x.npy"}), tmp_path)
    for start, stop in ((0, 5), (0, 1), (2, 4), (4, 5)):
        assert np.array_equal(found.read(start, stop).inputs, x[start:stop])


def test_preprocessing_steps_run_in_order(tmp_path):
    steps = [
        {"kind": "cast", "dtype": "float64"},
        {"kind": "scale", "factor": 2, "offset": 1},
        {"kind": "normalise", "mean": [1, 3], "std": [1, 2]},
        {"kind": "reshape", "shape": [1, -1]},
    ]
    found = loaded(tmp_path, kind="inline", values=[[1, 2], [3, 4]], preprocess=steps).inputs
    assert torch.equal(found, torch.tensor([[[2.0, 1.0]], [[6.0, 3.0]]], dtype=torch.float64))


def test_a_step_may_apply_to_one_named_input(tmp_path):
    steps = [{"kind": "scale", "factor": 10, "of": "a"}]
    found = loaded(tmp_path, kind="inline", values={"a": [[1]], "b": [[1]]}, preprocess=steps).inputs
    assert (float(found["a"]), float(found["b"])) == (10.0, 1.0)


def test_the_digest_follows_the_numbers(tmp_path):
    one, same, other = (loaded(tmp_path, kind="inline", values=v).digest for v in ([[1]], [[1.0]], [[2]]))
    assert one == same != other


# What is refused ------------------------------------------------------------------------------------------------

WRONG = [
    ({"kind": "digit"}, "inputs.kind", "must be one of random, digits", "did you mean digits?"),
    ({"kind": "random"}, "inputs.shape", "is required", ""),
    ({"kind": "random", "shape": 3}, "inputs.shape", "must be a list or a mapping", "3"),
    ({"kind": "random", "shape": [0, 2]}, "inputs.shape.0", "must be at least 1", "0"),
    ({"kind": "random", "shape": [2.5]}, "inputs.shape.0", "must be a whole number", "2.5"),
    ({"kind": "random", "shape": [2**40, 2**20]}, "inputs.shape", "of memory that are free", "TiB"),
    ({"kind": "random", "shape": [2], "dtype": "int8"}, "inputs.dtype", "must be one of float64", "int8"),
    ({"kind": "random", "shape": [2], "sed": 1}, "inputs.sed", "is not a known name", "did you mean seed?"),
    ({"kind": "random", "shape": [2], "range": [1, 1]}, "inputs.range", "start before stop", "[1, 1]"),
    ({"kind": "random", "shape": [2], "range": [0, 3]}, "inputs.range", "within the 2 samples", "[0, 3]"),
    ({"kind": "random", "shape": [2], "range": [-1, 2]}, "inputs.range.0", "must be at least 0", "-1"),
    ({"kind": "inline", "values": [[1], [1, 2]]}, "inputs.values.1", "must have 1 entries", "2 entries"),
    ({"kind": "inline", "values": [[1], ["x"]]}, "inputs.values.1.0", "must be a number", "'x'"),
    ({"kind": "inline", "values": [1, [1]]}, "inputs.values.1", "must be nested evenly", "[1]"),
    ({"kind": "inline", "values": [10**400]}, "inputs.values", "must hold numbers that fit", "1000"),
    ({"kind": "inline", "values": 3}, "inputs", "must have the batch as its first axis", ""),
    ({"kind": "inline", "values": []}, "inputs", "must hold at least one sample", "(0,)"),
    ({"kind": "inline", "values": {}}, "inputs.values", "at least one named input", "{}"),
    ({"kind": "inline", "values": {"a": [1], "b": [1, 2]}}, "inputs", "the same batch size", "b: 2"),
    ({"kind": "inline", "values": [1, 2], "fields": {"t": [1]}}, "inputs.fields.t", "a row for each of the 2", "(1,)"),
    ({"kind": "npy", "path": "no.npy"}, "inputs.path", "names nothing that exists", "no.npy"),
    ({"kind": "npy", "path": "x.txt"}, "inputs.path", "must end in .npy", "x.txt"),
    ({"kind": "npy", "path": "a\0"}, "inputs.path", "printable", "a"),
    ({"kind": "npy", "path": ""}, "inputs.path", "at least 1 characters", "''"),
    ({"kind": "digits", "preprocess": [{"kind": "resape"}]}, "inputs.preprocess.0.kind", "must be one of", "reshape?"),
    (
        {"kind": "digits", "preprocess": [{"kind": "reshape", "shape": [65]}]},
        "inputs.preprocess.0.shape",
        "as many numbers",
        "[1, 8, 8]",
    ),
    (
        {"kind": "digits", "preprocess": [{"kind": "reshape", "shape": [-1, -1]}]},
        "inputs.preprocess.0.shape",
        "-1 at most once",
        "",
    ),
    (
        {"kind": "digits", "preprocess": [{"kind": "normalise", "mean": [1, 2]}]},
        "inputs.preprocess.0.mean",
        "a number for each place",
        "axis 1",
    ),
    (
        {"kind": "digits", "preprocess": [{"kind": "normalise", "std": 0}]},
        "inputs.preprocess.0.std",
        "must be greater than 0",
        "0",
    ),
    (
        {"kind": "digits", "preprocess": [{"kind": "scale", "factor": float("nan")}]},
        "inputs.preprocess.0.factor",
        "must be a finite number",
        "nan",
    ),
    (
        {"kind": "digits", "preprocess": [{"kind": "cast", "dtype": "uint8"}, {"kind": "scale"}]},
        "inputs.preprocess.1",
        "scale needs floats",
        "uint8",
    ),
    ({"kind": "digits", "preprocess": [{"kind": "scale", "of": "x"}]}, "inputs.preprocess.0.of", "names no input", "x"),
]


@pytest.mark.parametrize(("spec", "argument", "rule", "shown"), WRONG, ids=[w[1] + " " + w[2][:20] for w in WRONG])
def test_a_wrong_spec_is_refused_with_its_key_rule_and_value(tmp_path, spec, argument, rule, shown):
    with pytest.raises(UserError) as caught:
        loaded(tmp_path, **spec)
    assert caught.value.argument == argument
    assert rule in caught.value.rule
    assert shown in str(caught.value)


def hostile_npy(base, evil):
    np.save(base / "x.npy", np.array([evil], dtype=object), allow_pickle=True)
    return {"kind": "npy", "path": "x.npy"}


def bare_pickle(base, evil):
    (base / "x.npy").write_bytes(pickle.dumps(evil))
    return {"kind": "npy", "path": "x.npy"}


def hostile_npz(base, evil):
    np.savez(base / "x.npz", x=np.array([evil], dtype=object))
    return {"kind": "npz", "path": "x.npz"}


def pickle_in_zip(base, evil):
    with zipfile.ZipFile(base / "x.npz", "w") as archive:
        archive.writestr("x.npy", pickle.dumps(evil))
    return {"kind": "npz", "path": "x.npz"}


def pickled_safetensors(base, evil):
    (base / "x.safetensors").write_bytes(pickle.dumps(evil))
    return {"kind": "safetensors", "path": "x.safetensors"}


def unpickling_codec(base, evil):
    array = zarr.create_array(base / "x.zarr", shape=(4,), chunks=(4,), dtype="f4", zarr_format=2, compressors=None)
    array[:] = 1
    meta = base / "x.zarr" / ".zarray"
    meta.write_text(meta.read_text().replace('"compressor": null', '"compressor": {"id": "pickle"}'))
    (base / "x.zarr" / "0").write_bytes(pickle.dumps(evil))
    return {"kind": "zarr", "path": "x.zarr"}


def unpickling_filter(base, evil):
    spec = unpickling_codec(base, evil)
    meta = base / "x.zarr" / ".zarray"
    meta.write_text(meta.read_text().replace('"compressor": {"id": "pickle"}', '"compressor": null'))
    meta.write_text(meta.read_text().replace('"filters": null', '"filters": [{"id": "pickle"}]'))
    return spec


def unlisted_codec(base, evil):
    array = zarr.create_array(
        base / "x.zarr", shape=(4,), chunks=(4,), dtype="f4", zarr_format=2, filters=[Delta("f4")]
    )
    array[:] = 1
    return {"kind": "zarr", "path": "x.zarr"}


def cut_off(base, evil):
    np.save(base / "x.npy", ROWS)
    whole = (base / "x.npy").read_bytes()
    (base / "x.npy").write_bytes(whole[:-4])
    return {"kind": "npy", "path": "x.npy"}


def lying_header(base, evil):
    np.save(base / "x.npy", ROWS)
    whole = (base / "x.npy").read_bytes()
    (base / "x.npy").write_bytes(whole.replace(b"(5, 2)", b"(9**9,)"))
    return {"kind": "npy", "path": "x.npy"}


def lying_safetensors(base, evil):
    header = b'{"x":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,8]}}'
    (base / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    return {"kind": "safetensors", "path": "x.safetensors"}


def zip_bomb(base, evil):
    header = (
        np.lib.format.magic(1, 0)
        + b"v\0"
        + b"{'descr': '|u1', 'fortran_order': False, 'shape': (1099511627776,), }".ljust(117)
        + b"\n"
    )
    with zipfile.ZipFile(base / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", header + bytes(1 << 16))
    return {"kind": "npz", "path": "x.npz"}


def words(base, evil):
    np.save(base / "x.npy", np.array(["a"]))
    return {"kind": "npy", "path": "x.npy"}


def complex_numbers(base, evil):
    np.save(base / "x.npy", np.array([1j]))
    return {"kind": "npy", "path": "x.npy"}


def text_in_csv(base, evil):
    (base / "x.csv").write_text("a,b\n1,2\n3,x\n")
    return {"kind": "csv", "path": "x.csv"}


def ragged_csv(base, evil):
    (base / "x.csv").write_text("a,b\n1,2\n3\n")
    return {"kind": "csv", "path": "x.csv"}


def empty_csv(base, evil):
    (base / "x.csv").write_text("")
    return {"kind": "csv", "path": "x.csv"}


def binary_csv(base, evil):
    (base / "x.csv").write_bytes(b"\xff\xfe\x00")
    return {"kind": "csv", "path": "x.csv"}


HOSTILE = {
    hostile_npy: "must hold real numbers",
    bare_pickle: "must be a readable numpy array",
    hostile_npz: "must hold real numbers",
    pickle_in_zip: "must be a readable numpy array",
    pickled_safetensors: "must be a readable safetensors file",
    unpickling_codec: "must be a readable zarr array",
    unlisted_codec: "codecs that only move or compress bytes",
    unpickling_filter: "must be a readable zarr array",
    cut_off: "holds what its header promises",
    lying_header: "must be a readable numpy array",
    lying_safetensors: "holds what its header promises",
    zip_bomb: "holds what its header promises",
    words: "must hold real numbers",
    complex_numbers: "must hold real numbers",
    text_in_csv: "must hold numbers only",
    ragged_csv: "must have 2 columns in every row",
    empty_csv: "a header line and at least one row",
    binary_csv: "must be a readable csv file",
}


@pytest.mark.parametrize("write", HOSTILE, ids=lambda write: write.__name__)
def test_a_file_that_is_not_what_it_says_is_refused_and_runs_nothing(tmp_path, write):
    spec = write(tmp_path, Touches(tmp_path / "touched"))
    with pytest.raises(InputError) as caught:
        loaded(tmp_path, **spec)
    assert caught.value.argument == "inputs.path"
    assert HOSTILE[write] in caught.value.rule
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("write", WRITERS[1:])
def test_an_unknown_array_or_column_proposes_the_nearest(tmp_path, write):
    spec = write(tmp_path)
    spec["fields"] = {"target": "lable" if spec["kind"] == "csv" else "yy"}
    spec |= {} if spec["kind"] == "csv" else {"arrays": "x"}
    with pytest.raises(InputError, match=r"did you mean (label|y)\?"):
        loaded(tmp_path, **spec)


def test_a_file_of_several_arrays_must_say_which_is_the_input(tmp_path):
    spec = write_npz(tmp_path)
    del spec["fields"]
    with pytest.raises(InputError, match="must say which arrays are inputs") as caught:
        loaded(tmp_path, **spec)
    assert caught.value.argument == "inputs.arrays"
    assert "x, y" in str(caught.value)


# Weights and vectors --------------------------------------------------------------------------------------------


@pytest.fixture
def digits(tmp_path):
    return loaded(tmp_path, kind="digits", range=[0, 20])


def ask(value, digits, base, classes=10):
    return directions(value, digits, base, lambda: classes, "weights")


def test_one_hot_picks_each_samples_class(digits, tmp_path):
    found = ask({"kind": "one_hot", "of": "target"}, digits, tmp_path)
    assert torch.equal(found, torch.eye(10)[digits.fields["target"]])
    assert ask({"kind": "one_hot", "of": "target", "classes": 12}, digits, tmp_path).shape == (20, 12)


def test_numbers_files_and_mappings_of_them_are_read(digits, tmp_path):
    write_npy(tmp_path)
    assert torch.equal(ask([1, 0], digits, tmp_path), torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert ask(None, digits, tmp_path) is None
    found = ask({"y": {"kind": "npy", "path": "x.npy"}, "z": [1]}, digits, tmp_path)
    assert torch.equal(found["y"], torch.from_numpy(ROWS))


@pytest.mark.parametrize(
    ("value", "argument", "rule"),
    [
        ({"kind": "one_hot", "of": "targt"}, "weights.of", "names no field of the inputs"),
        ({"kind": "one_hot", "of": "target", "classes": 3}, "weights.of", "must hold classes from 0 to 2"),
        ({"kind": "one_hot", "off": "target"}, "weights.off", "is not a known name"),
        ({"kind": "onehot"}, "weights.kind", "must be one of one_hot, random"),
        ({"y": {"kind": "npy"}}, "weights.y.path", "is required"),
        ([[1], [1, 2]], "weights.1", "must have 1 entries"),
        ("x", "weights", "must be a number"),
    ],
)
def test_wrong_weights_are_refused(digits, tmp_path, value, argument, rule):
    with pytest.raises((InputError, SpecError)) as caught:
        ask(value, digits, tmp_path)
    assert caught.value.argument == argument
    assert rule in caught.value.rule


def test_weights_are_checked_without_reading_anything():
    check_directions({"y": {"kind": "npy", "path": "no.npy"}, "z": [1]}, "weights")
    with pytest.raises(SpecError, match=r"weights\.y\.pth"):
        check_directions({"y": {"kind": "npy", "pth": "no.npy"}}, "weights")


def test_a_one_hot_needs_whole_numbers(tmp_path):
    found = loaded(tmp_path, kind="inline", values=[[1], [2]], fields={"target": [0.5, 1.5]})
    with pytest.raises(InputError, match="one whole number per sample"):
        ask({"kind": "one_hot", "of": "target"}, found, tmp_path)


def test_the_packages_two_functions_are_not_hidden_by_its_modules(tmp_path):
    spec = ADAPTER.validate_python({"kind": "inline", "values": [[1]]})
    assert sources.load(spec, tmp_path).samples == 1
    assert sources.directions([1], sources.load(spec, tmp_path), tmp_path, lambda: 1, "weights").tolist() == [1.0]

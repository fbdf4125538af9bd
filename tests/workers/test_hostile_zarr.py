"""zarr stores that lie: in their metadata, and in chunks that expand beyond what their array declares."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import pickle
import struct
import zlib

import numcodecs
import numpy as np
import pyarrow as pa
import pytest
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, ZstdCodec

from tests.workers import source_files
from tests.workers.source_files import ROWS
from tests.workers.test_hostile_files import Touches, read, refused

BOMB = 700 << 20  # more than a refusal may take, from less than a megabyte


def set_(meta, path, value):
    *above, last = path
    for key in above:
        meta = meta[key]
    meta[last] = value


ZARR = {
    "shape": (("shape",), [2**62, 2]),
    "shape beyond": (("shape",), [10**30, 2]),
    "shape negative": (("shape",), [-5, 2]),
    "shape text": (("shape",), "five"),
    "chunks": (("chunk_grid", "configuration", "chunk_shape"), [2**40, 2**20]),
    "chunks zero": (("chunk_grid", "configuration", "chunk_shape"), [0, 0]),
    "chunks negative": (("chunk_grid", "configuration", "chunk_shape"), [-1, 2]),
    "chunks axes": (("chunk_grid", "configuration", "chunk_shape"), [2]),
    "grid": (("chunk_grid", "name"), "../../regular"),
    "type": (("data_type",), "object"),
    "type wide": (("data_type",), "r80000000000"),
    "text": (("data_type",), "string"),
    "codec": (("codecs",), [{"name": "numcodecs.pickle", "configuration": {}}]),
    "codec module": (("codecs",), [{"name": "os:system", "configuration": {"command": "id"}}]),
    "codec bytes": (("codecs",), [{"name": "numcodecs.json2", "configuration": {}}]),
    "codecs none": (("codecs",), []),
    "codecs deep": (("codecs",), [[[[[]]]]]),
    "separator": (("chunk_key_encoding", "configuration", "separator"), "/../"),
    "encoding": (("chunk_key_encoding", "name"), "../default"),
    "transformers": (("storage_transformers",), [{"name": "x", "configuration": {}}]),
    "format": (("zarr_format",), 4),
    "node": (("node_type",), "../group"),
    "fill": (("fill_value",), {"a": 1}),
}


@pytest.mark.parametrize("name", ZARR)
def test_zarr_metadata_that_lies(tmp_path, name):
    source_files.zarr_group(tmp_path)
    file = tmp_path / "x.zarr" / "x" / "zarr.json"
    meta = json.loads(file.read_text())
    set_(meta, *ZARR[name])
    file.write_text(json.dumps(meta))
    refused(tmp_path, {"kind": "zarr", "path": "x.zarr", "arrays": "x"})
    refused(tmp_path, {"kind": "zarr", "path": "x.zarr/x"})


@pytest.mark.parametrize("name", ["../secret", "x/../../secret", "/x", "..", "a\\b", "x\n"])
def test_names_that_lead_out_of_a_zarr_are_not_followed(tmp_path, name):
    source_files.zarr_group(tmp_path)
    zarr.create_array(tmp_path / "secret", data=ROWS)
    (tmp_path / "x.zarr" / "zarr.json").write_text(
        json.dumps(
            {
                "zarr_format": 3, "node_type": "group", "attributes": {},
                "consolidated_metadata": {
                    "kind": "inline", "must_understand": False,
                    "metadata": {name: json.loads((tmp_path / "secret" / "zarr.json").read_text())},
                },
            }
        )
    )  # fmt: skip
    refused(tmp_path, {"kind": "zarr", "path": "x.zarr", "arrays": name})


def test_a_zarr_that_unpickles_runs_nothing(tmp_path):
    array = zarr.create_array(tmp_path / "x.zarr", shape=(4,), chunks=(4,), dtype="f4", zarr_format=2, compressors=None)
    array[:] = 1
    meta = tmp_path / "x.zarr" / ".zarray"
    text = meta.read_text()
    (tmp_path / "x.zarr" / "0").write_bytes(pickle.dumps(Touches(tmp_path / "touched")))
    for changed in (
        text.replace('"compressor": null', '"compressor": {"id": "pickle"}'),
        text.replace('"filters": null', '"filters": [{"id": "pickle"}]'),
        text.replace('"dtype": "<f4"', '"dtype": "|O"'),
    ):
        meta.write_text(changed)
        refused(tmp_path, {"kind": "zarr", "path": "x.zarr"})
    assert not (tmp_path / "touched").exists()


# Chunks that expand -----------------------------------------------------------------------------------------------


def pieces(compressor):
    """BOMB zeros, compressed a megabyte at a time."""
    found = bytearray()
    for _ in range(BOMB >> 20):
        found += compressor.compress(bytes(1 << 20))
    return bytes(found + compressor.flush())


def many_members():
    return gzip.compress(bytes(1 << 20)) * (BOMB >> 20)


def zstd_without_a_size(base):
    with pa.OSFile(str(base / "z"), "wb") as file, pa.CompressedOutputStream(file, "zstd") as stream:
        for _ in range(BOMB >> 20):
            stream.write(bytes(1 << 20))
    return (base / "z").read_bytes()


def zstd_that_says_its_size():
    """A frame of one block of zeros, repeated: its header tells the size."""
    return bytes(numcodecs.zstd.compress(bytes(64 << 20), 1))


CHUNKS = {
    "gzip": (GzipCodec(), lambda _: pieces(zlib.compressobj(9, zlib.DEFLATED, 31))),
    "gzip members": (GzipCodec(), lambda _: many_members()),
    "gzip cut": (GzipCodec(), lambda _: gzip.compress(ROWS.tobytes())[:-6]),
    "gzip short": (GzipCodec(), lambda _: gzip.compress(b"1234")),
    "gzip none": (GzipCodec(), lambda _: b"no gzip at all"),
    "zstd sized": (ZstdCodec(), lambda _: zstd_that_says_its_size()),
    "zstd unsized": (ZstdCodec(), zstd_without_a_size),
    "blosc": (BloscCodec(), lambda _: struct.pack("<BBBBIII", 2, 1, 0x21, 4, 2**31 - 1, 2**20, 100) + bytes(84)),
    "v2 zlib": (numcodecs.Zlib(), lambda _: pieces(zlib.compressobj(9))),
    "v2 gzip": (numcodecs.GZip(), lambda _: pieces(zlib.compressobj(9, zlib.DEFLATED, 31))),
    "v2 bz2": (numcodecs.BZ2(), lambda _: pieces(bz2.BZ2Compressor())),
    "v2 lzma": (numcodecs.LZMA(), lambda _: pieces(lzma.LZMACompressor(preset=0))),
    "v2 lz4": (numcodecs.LZ4(), lambda _: struct.pack("<I", 2**31 - 1) + bytes(100)),
    "v2 zstd": (numcodecs.Zstd(), zstd_without_a_size),
}


@pytest.mark.parametrize("name", CHUNKS)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_chunk_that_expands_is_refused_before_it_has(tmp_path, name, sharded):
    compressor, made = CHUNKS[name]
    old = name.startswith("v2")
    if old and sharded:
        pytest.skip("format 2 has no shards")
    array = zarr.create_array(
        tmp_path / "x.zarr", shape=(8, 2), chunks=(4, 2), shards=(8, 2) if sharded else None, dtype="f4",
        compressors=compressor, zarr_format=2 if old else 3,
    )  # fmt: skip
    array[:] = 1
    chunk = made(tmp_path)
    if sharded:
        # An index of two chunks, offset and length each, and its checksum stand at the end.
        index = struct.pack("<QQQQ", 0, len(chunk), 0, len(chunk))
        chunk += index + struct.pack("<I", __import__("google_crc32c").value(index))
    (tmp_path / "x.zarr" / ("0.0" if old else "c/0/0")).write_bytes(chunk)
    said = refused(tmp_path, {"kind": "zarr", "path": "x.zarr"})
    assert "must be a readable zarr array" in said
    if name in ("gzip", "gzip members", "v2 zlib", "v2 bz2", "v2 lzma", "blosc", "v2 lz4"):
        assert "expands beyond the 32 bytes" in said


def test_chunks_that_do_not_expand_are_read(tmp_path):
    for number, compressors in enumerate(
        (
            GzipCodec(),
            [GzipCodec(), Crc32cCodec()],
            [Crc32cCodec(), GzipCodec()],
            ZstdCodec(checksum=True),
            BloscCodec(),
        )
    ):
        for shards in (None, (4, 2)):
            name = f"{number}{shards is None}.zarr"
            zarr.create_array(tmp_path / name, data=ROWS, chunks=(2, 2), shards=shards, compressors=compressors)
            assert np.array_equal(read(tmp_path, {"kind": "zarr", "path": name}).inputs, ROWS)
    old = (
        numcodecs.LZMA(format=3, filters=[{"id": lzma.FILTER_LZMA2}]),
        numcodecs.BZ2(),
        numcodecs.LZ4(),
        numcodecs.Zlib(),
    )
    for number, compressor in enumerate(old):
        name = f"old{number}.zarr"
        zarr.create_array(
            tmp_path / name, data=ROWS.astype(">f8"), chunks=(2, 2), compressors=compressor, zarr_format=2,
            filters=[numcodecs.Shuffle(8)],
        )  # fmt: skip
        assert np.array_equal(read(tmp_path, {"kind": "zarr", "path": name}).inputs, ROWS)


def test_compressing_twice_is_refused(tmp_path):
    zarr.create_array(tmp_path / "x.zarr", data=ROWS, chunks=(2, 2), compressors=[GzipCodec(), ZstdCodec()])
    assert "compressed once" in refused(tmp_path, {"kind": "zarr", "path": "x.zarr"})

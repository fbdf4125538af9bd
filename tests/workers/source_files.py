"""A small file of each kind of input, as the libraries of others write them, with the spec that reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import zarr
from PIL import Image
from pyarrow import ipc, parquet
from safetensors.torch import save_file

N = 5
ROWS = np.arange(2 * N, dtype=np.float32).reshape(N, 2) / 4
LABELS = np.arange(N) * 2
TEXTS = ("a cat", "two black dogs", "rain", "the sea at night", "stone")


def npy(base: Path) -> dict[str, Any]:
    np.save(base / "x.npy", ROWS)
    return {"kind": "npy", "path": "x.npy"}


def npz(base: Path) -> dict[str, Any]:
    np.savez_compressed(base / "x.npz", x=ROWS, y=LABELS)
    return {"kind": "npz", "path": "x.npz", "fields": {"target": "y"}}


def safetensors(base: Path) -> dict[str, Any]:
    save_file({"x": torch.from_numpy(ROWS), "y": torch.from_numpy(LABELS)}, base / "x.safetensors")
    return {"kind": "safetensors", "path": "x.safetensors", "fields": {"target": "y"}}


def zarr_group(base: Path) -> dict[str, Any]:
    group = zarr.create_group(base / "x.zarr")
    group.create_array("x", data=ROWS, chunks=(2, 2))
    group.create_array("y", data=LABELS, chunks=(4,), shards=(8,))
    return {"kind": "zarr", "path": "x.zarr", "arrays": "x", "fields": {"target": "y"}}


def csv(base: Path) -> dict[str, Any]:
    lines = ["a,b,label", *(f"{a},{b},{i}" for (a, b), i in zip(ROWS, LABELS, strict=True))]
    (base / "x.csv").write_text("\n".join(lines) + "\n")
    return {"kind": "csv", "path": "x.csv", "fields": {"target": "label"}}


def table() -> pa.Table:
    lists = pa.FixedSizeListArray.from_arrays(pa.array(ROWS.reshape(-1)), 2)
    return pa.table({"x": lists, "label": LABELS, "text": list(TEXTS), "a": ROWS[:, 0], "b": ROWS[:, 1]})


def parquet_file(base: Path) -> dict[str, Any]:
    parquet.write_table(table(), base / "x.parquet", row_group_size=2)
    return {"kind": "parquet", "path": "x.parquet", "columns": "x", "fields": {"target": "label"}}


def datasets(base: Path) -> dict[str, Any]:
    """As `Dataset.save_to_disk` lays it out: a list of files in state.json, each a stream of record batches."""
    folder = base / "hf"
    folder.mkdir()
    names = []
    for i, part in enumerate((table().slice(0, 3), table().slice(3))):
        names.append(f"data-{i:05}-of-00002.arrow")
        with ipc.new_stream(str(folder / names[-1]), part.schema) as sink:
            sink.write_table(part, max_chunksize=2)
    state = {"_data_files": [{"filename": n} for n in names], "_fingerprint": "0", "_format_type": None, "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return {"kind": "datasets", "path": "hf", "columns": "x", "fields": {"target": "label"}}


def pixels(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (3, 4, 3), np.uint8)


def images(base: Path) -> dict[str, Any]:
    for i, name in enumerate(("cats/1.png", "cats/2.png", "dogs/a\nb.png", "dogs/c.png", "owls/0.png")):
        (base / "pics" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(i)).save(base / "pics" / name)
    return {"kind": "images", "path": "pics"}


FILES = (npy, npz, safetensors, zarr_group, csv, parquet_file, datasets, images)
ROW_FILES = FILES[:-1]  # those that hold ROWS and LABELS

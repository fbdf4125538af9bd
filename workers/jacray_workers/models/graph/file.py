"""Graph files as bytes: a safetensors file whose header is read with care before anything else looks at it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from jacray_workers.errors import ModelError, Plain
from jacray_workers.models.graph.document import Document, parse, strict_json

KEY = "jacray.graph"
MAX_HEADER = 32 * 2**20
"""The longest header that is read, in bytes; the graph stands in it."""


def pack(document: Document, tensors: dict[str, Tensor]) -> bytes:
    """The same bytes for the same graph and weights, whatever happened before."""
    from safetensors.torch import save

    text = json.dumps(document.model_dump(mode="json", exclude_defaults=True), separators=(",", ":"), allow_nan=False)
    data: bytes = save(tensors, {KEY: text})
    _header(data[: 8 + MAX_HEADER], len(data))
    return data


def unpack(data: bytes) -> tuple[Document, dict[str, Tensor]]:
    """The graph and the tensors.

    Raises:
        ModelError: the bytes are no graph file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    document = _document(_header(data[: 8 + MAX_HEADER], len(data)))
    try:
        return document, load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise _unreadable(str(error)) from None


def unpack_file(path: Path) -> tuple[Document, dict[str, Tensor]]:
    """The graph and the tensors of a file; its weights are read once.

    Raises:
        ModelError: the file is no graph file, or larger than free memory.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with path.open("rb") as stream:
            document = _document(_header(stream.read(8 + MAX_HEADER), path.stat().st_size))
        return document, load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        if isinstance(error, ModelError):
            raise
        raise _unreadable(str(error)) from None


def _header(head: bytes, size: int) -> dict[str, Any]:
    """The header of a safetensors file of `size` bytes, from its first bytes."""
    if size > psutil.virtual_memory().available:
        raise ModelError("model", "must be a file that fits into free memory", Plain(f"{size:,} bytes"))
    length = int.from_bytes(head[:8], "little")
    if len(head) < 8 or not head[8:9] == b"{" or length > size - 8:
        raise _unreadable("its header does not hold what it promises")
    if length > MAX_HEADER:
        raise _unreadable(f"its header takes {length:,} bytes, more than the {MAX_HEADER:,} allowed")
    header = strict_json(head[8 : 8 + length], "the header")
    if not isinstance(header, dict):
        raise _unreadable("its header is no mapping")
    return header


def _document(header: dict[str, Any]) -> Document:
    metadata = header.get("__metadata__")
    text = metadata.get(KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        way_out = (
            "jacray.export(module, example, path) makes one; plain weights belong to `weights` of another model kind"
        )
        raise ModelError("model", "must be a graph file, but holds no graph", Plain("a safetensors file"), way_out)
    return parse(text)


def _unreadable(why: str) -> ModelError:
    return ModelError("model", f"must be a readable graph file: {why}", None, "write it with jacray.export")


def stored(tensor: Tensor) -> Tensor:
    """The tensor as files hold it: on the CPU, by itself, a complex one as pairs of real numbers."""
    plain = tensor.detach().cpu()
    plain = torch.view_as_real(plain.resolve_conj()) if plain.is_complex() else plain
    # A copy of its own: safetensors refuses tensors that share memory.
    return plain.resolve_neg().clone(memory_format=torch.contiguous_format)

"""Graph files: any module that `torch.export` captures, as one safetensors file that is read without running code.

The file holds the weights, and in its metadata the graph as JSON: calls of aten operators from an allow-list, with a
symbolic batch. `dump` and `load` work on bytes, `save` and `read` on files.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jacray_workers.models.graph.module import GraphModule


def dump(module: Any, example: Any) -> bytes:
    """A module as the bytes of a graph file.

    Args:
        module: an `nn.Module` or a callable of tensors, in the mode it is to be differentiated in (eval).
        example: a batch of inputs, `(B, ...)` each, as `jacray.jacobian` takes it; only shapes, dtypes and structure
            are kept. The batch stays free; every other axis is fixed.

    Raises:
        ModelError: torch.export cannot capture the module, it calls what graph files do not hold, or the graph does not
            repeat what the module and its gradients compute.
        InputError: the example is no batch of tensors.
    """
    from jacray_workers.models.graph.compare import checked
    from jacray_workers.models.graph.file import pack

    return pack(*checked(module, example))


def load(data: bytes) -> GraphModule:
    """The module that `dump` wrote; nothing in the bytes is run.

    Raises:
        ModelError: the bytes are no graph file, or break one of its rules.
    """
    from jacray_workers.models.graph.file import unpack
    from jacray_workers.models.graph.module import GraphModule

    return GraphModule(*unpack(data))


def save(module: Any, example: Any, path: Path) -> None:
    """Write `dump(module, example)` to a file, whole or not at all."""
    data = dump(module, example)
    beside = path.with_name(f".{path.name}.partial")
    beside.write_bytes(data)
    beside.replace(path)


def read(path: Path) -> GraphModule:
    """The module of a graph file.

    Raises:
        ModelError: the file is no graph file, or breaks one of its rules.
    """
    from jacray_workers.models.graph.file import unpack_file
    from jacray_workers.models.graph.module import GraphModule

    return GraphModule(*unpack_file(path))

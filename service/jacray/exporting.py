"""Write any module that `torch.export` captures to a graph file, which others can read without running its code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jacray_workers.errors import Plain, SpecError


def export(model: Any, example: Any, path: str | Path) -> Path:
    """Write a model to a graph file: one safetensors file with its weights and its graph.

    The file is a model spec's `{kind: graph, path: ...}`. Parameters, submodules and outputs keep their names; the
    batch stays free, every other axis has the size it has in the example.

    Args:
        model: an `nn.Module`, a callable of tensors or a model spec, to be differentiated in eval mode.
        example: a batch of inputs as `jacray.jacobian` takes it; one sample is enough.
        path: where to write; must end in `.safetensors`.

    Returns:
        The path.

    Raises:
        ModelError: torch.export cannot capture the model, or it calls what graph files do not hold.
        SpecError: the path has another ending, or cannot be written.
    """
    from jacray_workers.models import as_model, graph

    target = Path(path)
    if target.suffix != ".safetensors":
        raise SpecError("path", "must end in .safetensors", Plain(str(path)))
    try:
        graph.save(as_model(model), example, target)
    except OSError as error:
        raise SpecError("path", f"could not be written: {error.strerror}", Plain(str(path))) from error
    return target

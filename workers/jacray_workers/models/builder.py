"""From a model spec to a module, and to a digest of everything that decides its numbers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from jacray_workers.errors import ModelError, Plain
from jacray_workers.models import graph
from jacray_workers.models.architectures import build_architecture
from jacray_workers.models.formula import FunctionModel
from jacray_workers.models.function import FormulaModule
from jacray_workers.models.huggingface import build_huggingface
from jacray_workers.models.huggingface import files as huggingface_files
from jacray_workers.models.imported import build_imported
from jacray_workers.models.layers import build_layers
from jacray_workers.models.specs import (
    GraphModel,
    HuggingfaceModel,
    LayersModel,
    ModelSpec,
    TimmModel,
    TorchvisionModel,
)
from jacray_workers.models.weights import SUFFIXES, load_weights
from jacray_workers.planning.explain import size
from jacray_workers.sharing import own_draws
from jacray_workers.spec_parts import file_digest, find
from jacray_workers.validation import explain

_ADAPTER: TypeAdapter[Any] = TypeAdapter(ModelSpec)


def build(spec: Any, base: Path, import_prefixes: Sequence[str] | None = None) -> nn.Module:
    """Make the module that a spec describes.

    Args:
        spec: any model spec.
        base: the folder that relative paths start from.
        import_prefixes: packages that an `import` model may come from; None allows all.

    Raises:
        ModelError: the model cannot be built, or its weights do not fit it.
    """
    if isinstance(spec, FunctionModel):
        return FormulaModule(spec)
    module = _made(spec, base, import_prefixes)
    if not isinstance(module, nn.Module):
        raise ModelError("model.target", "must make an nn.Module", type(module).__name__)
    if getattr(spec, "weights", None) is not None:
        load_weights(module, find(spec.weights, base, "model.weights", ModelError, SUFFIXES))
    return module.eval()


def _made(spec: Any, base: Path, import_prefixes: Sequence[str] | None) -> Any:
    """The model before its weights are loaded."""
    if isinstance(spec, GraphModel):
        return graph.read(find(spec.path, base, "model.path", ModelError, (".safetensors",)))
    if isinstance(spec, LayersModel):
        _check_memory(spec)
        with _seeded(spec.seed):
            return build_layers(spec.layers)
    if isinstance(spec, TimmModel | TorchvisionModel):
        with _seeded(spec.seed):
            return build_architecture(spec.kind, spec.name, spec.args)
    folder = find(spec.path, base, "model.path", ModelError)
    if isinstance(spec, HuggingfaceModel):
        return build_huggingface(spec, folder)
    with _seeded(spec.seed):
        return build_imported(spec.target, spec.args, folder, import_prefixes)


def as_model(model: Any, base: Path | None = None) -> Any:
    """The module that a spec (an object or a mapping) describes; anything else comes back as it is.

    Args:
        model: a spec, a mapping with the keys of one, a module or a callable.
        base: the folder that relative paths start from; the folder one stands in by default.

    Raises:
        ModelError: the spec breaks a rule, or the model cannot be built.
    """
    if isinstance(model, Mapping) and not callable(model):
        try:
            model = _ADAPTER.validate_python(dict(model))
        except ValidationError as error:
            raise ModelError(*explain(error, ModelSpec, "model")) from None
    if isinstance(model, typing.get_args(typing.get_args(ModelSpec)[0])):
        return build(model, base or Path.cwd())
    return model


def digest(spec: Any, base: Path) -> str:
    """A sha256 of the spec and of the bytes of the files that it names; their paths do not matter.

    Raises:
        ModelError: there is no such file.
    """
    content = spec.model_dump(mode="json")
    path = content.pop("path", None)
    if isinstance(spec, GraphModel):
        content["file"] = file_digest(find(path, base, "model.path", ModelError))
    if isinstance(spec, HuggingfaceModel):
        found = huggingface_files(find(path, base, "model.path", ModelError))
        content["files"] = {file.name: file_digest(file) for file in found}
    weights = content.pop("weights", None)
    if weights is not None:
        content["weights"] = file_digest(find(weights, base, "model.weights", ModelError))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_memory(spec: LayersModel) -> None:
    """Refuse layers that cannot fit, before anything is allocated."""
    with torch.device("meta"):
        module = build_layers(spec.layers)
    needed = sum(p.numel() * p.element_size() for p in module.parameters())
    free = psutil.virtual_memory().available
    if needed > free:
        raise ModelError("model.layers", f"must fit into the {size(free)} of memory that are free", Plain(size(needed)))


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draws on the CPU come from this seed inside, and the caller's random state is untouched."""
    with own_draws():
        before = torch.default_generator.get_state()
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            torch.default_generator.set_state(before)

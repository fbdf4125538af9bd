"""Architectures of timm and torchvision by name, with local weights; nothing is downloaded."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from jacray_workers.errors import ModelError, Plain, shorten
from jacray_workers.models.torchvision_operators import with_operators
from jacray_workers.validation import nearest

_FORBIDDEN = ("pretrained", "weights", "checkpoint", "cfg", "cache", "url", "hub")


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that could fetch or read files.

    Raises:
        ModelError: naming the argument.
    """
    for name, value in arguments.items():
        if any(word in name.lower() for word in _FORBIDDEN):
            rule = "must not say where weights come from"
            raise ModelError(f"model.args.{name}", rule, None, "name a local file in model.weights")
        parts = value if isinstance(value, list | tuple) else [value]
        if not all(part is None or isinstance(part, bool | int | float | str) for part in parts):
            raise ModelError(f"model.args.{name}", "must be a number, a text, true or false, or a list of these", value)


def build_architecture(library: str, name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """An architecture with fresh weights.

    Args:
        library: `timm` or `torchvision`.
        name: as the library lists it.
        arguments: of the library's factory.

    Raises:
        ModelError: the library is not installed, or knows no such architecture, or refuses the arguments.
    """
    check_arguments(arguments)
    make, known = _timm() if library == "timm" else _torchvision()
    if name not in known:
        close = nearest(name, known)
        way_out = close if close.startswith("did you mean") else f"{library} lists {len(known)} architectures"
        raise ModelError("model.name", f"names no architecture of {library}", name, way_out)
    try:
        found = make(name, dict(arguments))
    except Exception as error:  # noqa: BLE001 - factories raise whatever their arithmetic raises
        rule = f"{library} refuses its arguments: {type(error).__name__}: {shorten(Plain(str(error)))}"
        raise ModelError("model.args", rule, dict(arguments)) from None
    return found


def _timm() -> tuple[Callable[[str, dict[str, Any]], nn.Module], list[str]]:
    timm = load("timm", "timm")
    return lambda name, given: timm.create_model(name, pretrained=False, **given), timm.list_models()


def _torchvision() -> tuple[Callable[[str, dict[str, Any]], nn.Module], list[str]]:
    models = load("torchvision.models", "torchvision")

    def make(name: str, given: dict[str, Any]) -> nn.Module:
        # Models with a backbone would download its weights by default.
        takes = inspect.signature(models.get_model_builder(name)).parameters
        backbone = {"weights_backbone": None} if "weights_backbone" in takes else {}
        module: nn.Module = models.get_model(name, weights=None, **backbone, **given)
        return module

    return make, models.list_models()


def load(module: str, extra: str) -> Any:
    """A module of an optional package.

    Raises:
        ModelError: it is not installed, or does not work here; says how to install it.
    """
    package = module.partition(".")[0]
    try:
        return with_operators(lambda: importlib.import_module(module))
    except ModuleNotFoundError as error:
        rule = f"needs the package {error.name}, which is not installed"
        way_out = f"pip install 'jacray[{extra}]'"
    except Exception as error:  # noqa: BLE001 - a package built for another torch raises whatever it runs into
        rule = f"needs the package {package}, which does not work here: {shorten(Plain(str(error)))}"
        way_out = f"install the build of {package} that belongs to this torch"
    raise ModelError("model.kind", rule, Plain(package), way_out)

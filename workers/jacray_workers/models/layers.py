"""torch.nn layers by name: their arguments are checked against the constructor before anything is allocated."""

from __future__ import annotations

import inspect
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from jacray_workers.errors import Plain, SpecError, shorten
from jacray_workers.models.specs import Layer, LayerList, Parallel, Residual
from jacray_workers.validation import nearest

MAX_PARAMETERS = 2**31
_DTYPES = ("float64", "float32", "bfloat16", "float16")
_HIDDEN = ("self", "device", "args", "kwargs")


def signature(kind: str) -> dict[str, inspect.Parameter]:
    """The constructor's arguments that a spec may give, by name."""
    parameters = inspect.signature(getattr(nn, kind).__init__).parameters
    return {name: p for name, p in parameters.items() if name not in _HIDDEN}


def check_layer(kind: str, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that the layer's constructor does not take.

    The layer is built once on the meta device, which allocates nothing.

    Raises:
        SpecError: naming the argument, the rule, the value and the nearest known argument.
    """
    known = signature(kind)
    for name, value in arguments.items():
        if name not in known:
            way_out = nearest(name, known) if known else f"{kind} takes no arguments"
            raise SpecError(name, f"is not a known argument of {kind}", None, way_out)
        _check_value(name, value)
    for name, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and name not in arguments:
            raise SpecError(name, f"is required by {kind}")
    if kind == "TransformerEncoderLayer" and arguments.get("batch_first") is not True:
        raise SpecError("batch_first", "must be true, as the batch comes first", arguments.get("batch_first", False))
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer = make_layer(kind, arguments)
    except Exception as error:  # noqa: BLE001 - torch's constructors raise whatever their arithmetic raises
        rule = f"{kind} refuses its arguments: {shorten(Plain(str(error)))}"
        raise SpecError("", rule, Plain(_written(arguments))) from None
    empty = next((name for name, p in layer.named_parameters() if p.numel() == 0), None)
    if empty is not None:
        raise SpecError("", f"a layer must not have an empty parameter, as {empty} is", Plain(_written(arguments)))
    size = sum(p.numel() for p in layer.parameters())
    if size > MAX_PARAMETERS:
        raise SpecError("", f"a layer may have at most {MAX_PARAMETERS:,} parameters", size)


def _written(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def _check_value(name: str, value: Any) -> None:
    if name == "dtype" and value not in _DTYPES:
        raise SpecError(name, f"must be one of {', '.join(_DTYPES)}", value)
    parts = value if isinstance(value, list | tuple) else [value]
    if not all(part is None or isinstance(part, bool | int | float | str) for part in parts):
        raise SpecError(name, "must be a number, a text, true or false, or a list of these", value)


def make_layer(kind: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Call the layer's constructor."""
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
    if isinstance(given.get("dtype"), str):
        given["dtype"] = getattr(torch, given["dtype"])
    layer: nn.Module = getattr(nn, kind)(**given)
    return layer


def layer_schema(kind: str) -> dict[str, Any]:
    """The JSON Schema of one layer."""
    properties: dict[str, Any] = {"kind": {"const": kind}, "name": {"type": "string"}}
    required = ["kind"]
    for name, parameter in signature(kind).items():
        properties[name] = {}
        if parameter.default is inspect.Parameter.empty:
            required.append(name)
        elif isinstance(parameter.default, bool | int | float | str):
            properties[name] = {"default": parameter.default}
    return {
        "title": kind, "type": "object", "properties": properties, "required": required, "additionalProperties": False,
    }  # fmt: skip


def is_taken(name: str) -> bool:
    """Whether a submodule of a `Sequential` cannot bear this name."""
    return hasattr(nn.Sequential, name) or name in nn.Sequential().__dict__


class ResidualBlock(nn.Module):
    """`shortcut(x) + layers(x)`."""

    def __init__(self, layers: nn.Sequential, shortcut: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Add the layers' value to the shortcut's; an empty shortcut passes `x` on."""
        y: Tensor = self.shortcut(x) + self.layers(x)
        return y


class ParallelBlock(nn.Module):
    """Branches of the same input, joined along an axis, summed or averaged."""

    def __init__(self, branches: Sequence[nn.Sequential], combine: str, dim: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.combine = combine
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Every branch's value of `x`, combined."""
        values = [branch(x) for branch in self.branches]
        if self.combine == "cat":
            return torch.cat(values, dim=self.dim)
        total = torch.stack(values)
        return total.mean(dim=0) if self.combine == "mean" else total.sum(dim=0)


def build_layers(layers: LayerList) -> nn.Sequential:
    """The layers as one `nn.Sequential`, children named as the spec names them or by their place."""
    return nn.Sequential(OrderedDict((layer.name or str(i), _build(layer)) for i, layer in enumerate(layers)))


def _build(layer: Any) -> nn.Module:
    if isinstance(layer, Layer):
        return make_layer(layer.kind, layer.arguments)
    if isinstance(layer, Residual):
        return ResidualBlock(build_layers(layer.layers), build_layers(layer.shortcut))
    if isinstance(layer, Parallel):
        return ParallelBlock([build_layers(branch) for branch in layer.branches], layer.combine, layer.dim)
    return build_layers(layer.layers)

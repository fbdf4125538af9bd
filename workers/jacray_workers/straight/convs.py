"""Plain convolutional nets: dense blocks of their parameters by the fewest calls of torch.

A stack of convolutions with functions of one number between them, flattened and followed by a plain net of Linear
layers. The samples go through in portions that stay in the cache. Within one, cotangents lie as `(samples, places,
rows, channels)`: so each sample's block is one product of them and of the unfolded input, and where channels are few a
layer's cotangents are one product and one sum away from the next one's (see `kernels.sweep_convs`).

Source: Rochette, Manoel and Tramel, "Efficient per-example gradient computations in convolutional neural networks"
(2019).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor, nn

from jacray_workers import pages
from jacray_workers.blocks.block import write_terms
from jacray_workers.kernels import matmul
from jacray_workers.kernels.sweep_convs import gather, gathers, library
from jacray_workers.straight import factors, running
from jacray_workers.straight.reading import Bent, Line, conv_tensors, curve_of, head_of, parts_of

_aten: Any = torch.ops.aten
_CONV = F.conv2d
# Bytes of the largest tensor of a portion of the samples.
PORTION = 1 << 24
# Columns up to which a product is faster with its matrix laid out the other way, for the price of a copy.
NARROW = 32


class Layer(NamedTuple):
    """One convolution over two axes, and the function of one number behind it."""

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    bent: Bent | None

    def space(self, before: Sequence[int]) -> tuple[int, ...]:
        """The places of its output, from those of its input."""
        kernel = self.weight.shape[2:]
        sizes = zip(before, kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)


class Stack(NamedTuple):
    """A net as it stands at this moment.

    Attributes:
        layers: its convolutions.
        head: the Linear layers behind them.
        names: of each convolution's weight and bias, then of the head's.
        make: what the way to compute depends on, and no value of a tensor.
    """

    layers: list[Layer]
    head: Line
    names: tuple[tuple[str, str], ...]
    make: tuple[Any, ...]

    def takes(self, x: Tensor) -> bool:
        """Whether these inputs, `(B, C, H, W)`, go through it."""
        weight = self.layers[0].weight
        plain = x.layout is torch.strided and x.dtype is torch.float32 and x.device.type == "cpu"
        if not plain or x.dim() != 4 or x.shape[0] == 0 or x.shape[1] != weight.shape[1]:
            return False
        space: Sequence[int] = x.shape[2:]
        for layer in self.layers:
            space = layer.space(space)
            if min(space) < 1:
                return False
        return self.layers[-1].weight.shape[0] * math.prod(space) == self.head.widths[0]

    def tensors(self) -> Iterator[tuple[str, Tensor | None]]:
        """Its parameters by name."""
        pairs = [(layer.weight, layer.bias) for layer in self.layers]
        pairs += zip(self.head.weights, self.head.biases, strict=True)
        for names, pair in zip(self.names, pairs, strict=True):
            yield from zip(names, pair, strict=True)


def read(module: nn.Module) -> Stack | None:
    """The net that a module is in eval mode; None where it is none that is known in full, or has other parameters."""
    parts = parts_of(module) if type(module) is nn.Sequential and F.conv2d is _CONV else None
    if parts is None:
        return None
    at = next((i for i, (_, part) in enumerate(parts) if type(part) is nn.Flatten), len(parts))
    layers, names = _layers(parts[:at])
    head = head_of(parts[at:]) if layers else None
    if not layers or head is None:
        return None
    made = tuple((tuple(la.weight.shape), la.bias is None, la[2:5], la.bent is None) for la in layers)
    stack = Stack(layers, head, (*names, *head.names), (made, head.make))
    used = [id(t) for _, t in stack.tensors() if t is not None]
    held = {id(p) for _, part in parts for p in part._parameters.values() if p is not None}
    return stack if len(set(used)) == len(used) and held == set(used) else None


def _layers(parts: Sequence[tuple[str, Any]]) -> tuple[list[Layer], list[tuple[str, str]]]:
    """The convolutions of the parts before the flattening; none where there is anything unknown among them."""
    layers: list[Layer] = []
    names: list[tuple[str, str]] = []
    for path, part in parts:
        bent = curve_of(part)
        if type(part) is nn.Conv2d:
            pair = conv_tensors(part, path)
            if pair is None or (layers and layers[-1].weight.shape[0] != pair[0].shape[1]):
                return [], []
            layers.append(Layer(*pair, part.stride, part.padding, part.dilation, None))  # type: ignore[arg-type]
            names.append((f"{path}weight", f"{path}bias"))
        elif bent is not None:
            if not layers or layers[-1].bent is not None:
                return [], []
            layers[-1] = layers[-1]._replace(bent=bent)
        elif type(part) is nn.Linear:
            return [], []
    return layers, names


def blocks(stack: Stack, x: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """The dense block of each parameter, `(B, rows, *param)`; called without gradients.

    Args:
        stack: the net.
        x: what it takes.
        names: of the parameters, in the order of the result.
    """
    samples, rows = len(x), stack.head.widths[-1]
    found = {
        name: pages.empty((samples, rows, *t.shape), x.dtype, x.device) for name, t in stack.tensors() if t is not None
    }
    count = -(-samples * _largest(stack, x) // PORTION)
    step = -(-samples // max(1, min(count, samples)))
    for start in range(0, samples, step):
        part = slice(start, start + step)
        _portion(stack, x[part], {name: block[part] for name, block in found.items()})
    return {name: found[name] for name in names}


def _largest(stack: Stack, x: Tensor) -> int:
    """Bytes of the largest tensor that one sample's cotangents become on their way."""
    space, most, rows = tuple(x.shape[2:]), 0, stack.head.widths[-1]
    for at, layer in enumerate(stack.layers):
        space = layer.space(space)
        out, into, *kernel = layer.weight.shape
        table = into * math.prod(kernel) if at and gathers(layer.weight, layer.stride, math.prod(space) * rows) else 0
        most = max(most, math.prod(space) * max(table, out))
    return most * rows * x.itemsize


def _portion(stack: Stack, x: Tensor, into: Mapping[str, Tensor]) -> None:
    acts, slopes = [x], []
    for layer in stack.layers:
        h = F.conv2d(acts[-1], layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation)
        y = h if layer.bent is None else layer.bent.curve.value(layer.bent.part, h)
        slopes.append(None if layer.bent is None else layer.bent.curve.slope(layer.bent.part, h, y))
        acts.append(y)
    carried = _head(stack.head, acts[-1].flatten(1), into)
    channels = len(stack.layers[-1].weight)
    g = carried.view(*carried.shape[:2], channels, -1).permute(0, 3, 1, 2)
    for at in range(len(stack.layers) - 1, -1, -1):
        layer, (weight, bias) = stack.layers[at], stack.names[at]
        g = _through(layer, g, slopes[at])
        _write(layer, acts[at], g, into[weight])
        if layer.bias is not None:
            torch.sum(g, dim=1, out=into[bias])
        if at:
            g = _back(layer, g, tuple(acts[at].shape[2:]), tuple(acts[at + 1].shape[2:]))


def _head(line: Line, h: Tensor, into: Mapping[str, Tensor]) -> Tensor:
    """The head's blocks, and the cotangents of what it takes: `(B, rows, in)`, perhaps the same for all samples."""
    found = factors.factors(line, running.passed(line, h, whole=True))
    for name, term in factors.terms(line, found).items():
        if name in into:
            write_terms([term], into[name])
    weight, cots = line.weights[0].detach(), found[0].cots
    if cots is None:
        return weight.expand(len(h), -1, -1)
    return matmul.mm(cots.reshape(-1, weight.shape[0]), weight).view(len(h), -1, weight.shape[1])


def _through(layer: Layer, g: Tensor, slope: Tensor | None) -> Tensor:
    """Cotangents `(B, places, rows, channels)` taken through the function behind a convolution; contiguous."""
    if slope is None or layer.bent is None:
        return g.contiguous()
    own = g.is_contiguous()
    out = g if own else pages.like(g, g.shape)
    spread = slope.flatten(2).mT.contiguous().unsqueeze(2)
    if not layer.bent.curve.gate:
        return torch.mul(g, spread, out=out)
    found: Tensor = _aten.threshold_backward.grad_input(g, spread.expand_as(g), 0, grad_input=out)
    return found


def _write(layer: Layer, x: Tensor, g: Tensor, out: Tensor) -> None:
    """Each sample's block: `(rows * out, places)` times `(places, in * kernel)`."""
    kernel = tuple(layer.weight.shape[2:])
    seen = F.unfold(x, kernel, layer.dilation, layer.padding, layer.stride)
    cots, target = g.flatten(2), out.view(len(x), -1, seen.shape[1])
    if seen.shape[1] <= NARROW:
        target.copy_(torch.bmm(seen, cots).mT)
    else:
        torch.bmm(cots.mT, seen.mT, out=target)


def _back(layer: Layer, g: Tensor, space: tuple[int, ...], out: tuple[int, ...]) -> Tensor:
    """Cotangents of a convolution's output as those of its input, `(B, places, rows, channels)`."""
    samples, _, rows, channels = g.shape
    settings = (layer.stride, layer.padding, layer.dilation)
    weight = layer.weight.detach()
    if gathers(weight, layer.stride, math.prod(out) * rows):
        return gather(g.view(-1, channels), weight, samples, rows, space, out, *settings).view(
            samples, -1, rows, weight.shape[1]
        )
    images = g.transpose(1, 2).reshape(samples * rows, *out, channels).permute(0, 3, 1, 2)
    made = library(images, weight, (samples * rows, weight.shape[1], *space), *settings)
    return made.permute(0, 2, 3, 1).reshape(samples, rows, -1, weight.shape[1]).transpose(1, 2).contiguous()

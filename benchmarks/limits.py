"""How few operations and written bytes a piece of work needs, counted by hand; the machine's rates make them a limit.

A multiplication and an addition are two operations. Activations are left out, they are far fewer. Rows of cotangents
start at the last layer, whose first product is a copy of its weights and counts nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

FLOAT = 4  # bytes


def _links(widths: Sequence[int]) -> list[int]:
    """Operations of one vector through each Linear layer."""
    return [2 * a * b for a, b in itertools.pairwise(widths)]


def mlp_inputs(batch: int, widths: Sequence[int]) -> tuple[float, float]:
    """One forward; a row per output through all layers but the last. Writes J."""
    links, outputs = _links(widths), widths[-1]
    return batch * (sum(links) + outputs * sum(links[:-1])), FLOAT * batch * outputs * widths[0]


def mlp_parameters(batch: int, widths: Sequence[int]) -> tuple[float, float]:
    """One forward; rows down to the first layer's output; a product per entry of J. Writes J."""
    links, outputs = _links(widths), widths[-1]
    entries = batch * outputs * sum(a * b + b for a, b in itertools.pairwise(widths))
    return batch * (sum(links) + outputs * sum(links[1:-1])) + entries, FLOAT * entries


def mlp_factors(batch: int, widths: Sequence[int]) -> tuple[float, float]:
    """The same without the products. Writes each layer's activations and cotangents."""
    links, outputs = _links(widths), widths[-1]
    kept = batch * (sum(widths[:-1]) + outputs * sum(widths[1:-1]))
    return batch * (sum(links) + outputs * sum(links[1:-1])), FLOAT * kept


def cnn_parameters(batch: int, channels: Sequence[int], size: int, stride: int, outputs: int) -> tuple[float, float]:
    """One forward; rows through all but the last and the first layer; each kernel's block at a forward's price."""
    convs, parameters = [], 0
    for a, b in itertools.pairwise(channels):
        size = -(-size // stride)
        convs.append(2 * 9 * a * b * size * size)
        parameters += 9 * a * b + b
    features = channels[-1] * size * size
    parameters += features * outputs + outputs
    operations = batch * (sum(convs) + 2 * features * outputs + outputs * (sum(convs[1:]) + sum(convs)))
    return operations, FLOAT * batch * outputs * parameters


def encoder_layer(tokens: int, width: int, hidden: int) -> tuple[float, float]:
    """Operations of a transformer layer's Linear layers, and of its two attention products, for one sample."""
    return 2 * tokens * (4 * width * width + 2 * width * hidden), 4 * tokens * tokens * width


def block_parameters(batch: int, tokens: int, width: int, outputs: int) -> tuple[float, float]:
    """One forward; a row per output back through everything, attention at twice its price; a block per Linear layer."""
    linear, attention = encoder_layer(tokens, width, 4 * width)
    parameters = 4 * width * width + 4 * width + 8 * width * width + 5 * width + 4 * width + (width + 1) * outputs
    operations = batch * (linear + attention + outputs * (2 * linear + 2 * attention))
    return operations, FLOAT * batch * outputs * parameters


def bottleneck(batch: int, encoder: Sequence[int], decoder: Sequence[int]) -> tuple[float, float]:
    """Encoder reversed, decoder pushed forward, one product at the narrow point. Writes J."""
    down, up, narrow = _links(encoder), _links(decoder), encoder[-1]
    product = 2 * decoder[-1] * narrow * encoder[0]
    operations = batch * (sum(down) + sum(up) + narrow * (sum(down[:-1]) + sum(up[1:])) + product)
    return operations, FLOAT * batch * decoder[-1] * encoder[0]


def language_model(batch: int, vocabulary: int, width: int, tokens: int) -> tuple[float, float]:
    """A row per feature of the last position through two layers, then the head's product. Writes J.

    The second layer has cotangents at its last position alone, but for keys and values.
    """
    linear, attention = encoder_layer(tokens, width, 4 * width)
    last = linear / tokens + 2 * tokens * 2 * width * width + 2 * attention / tokens
    rows = width * (linear + 2 * attention + last)
    operations = batch * (2 * linear + 2 * attention + rows + 2 * vocabulary * width * tokens * width)
    return operations, FLOAT * batch * vocabulary * tokens * width


def encoder_inputs(batch: int, layers: int, tokens: int, width: int, hidden: int, outputs: int) -> tuple[float, float]:
    """One forward, then a row per output back through every layer. Writes J."""
    linear, attention = encoder_layer(tokens, width, hidden)
    operations = batch * layers * (linear + attention + outputs * (linear + 2 * attention))
    return operations, FLOAT * batch * outputs * tokens * width


def tangent_kernel(batch: int, widths: Sequence[int]) -> tuple[float, float]:
    """One forward, rows to every layer's output, and per layer two Gram matrices, of activations and of cotangents."""
    links, rows = _links(widths), batch * widths[-1]
    grams = 2 * batch**2 * sum(widths[:-1]) + 2 * rows**2 * sum(widths[1:-1])
    return batch * (sum(links) + widths[-1] * sum(links[1:-1])) + grams, FLOAT * rows**2


def row_sums(rows: int, columns: int) -> tuple[float, float]:
    """A product per entry. Writes J."""
    return rows * columns, FLOAT * rows * columns


def last_layer(features: int, width: int, outputs: int) -> tuple[float, float]:
    """One forward. Writes the activations; the cotangents are rows of the identity."""
    return 2 * (features * width + width * outputs), FLOAT * width

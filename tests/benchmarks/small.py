"""The table's kinds of work, so small that every side is done in milliseconds."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.nets import EMBEDDINGS, Block, Case, LanguageModel, SquareSums, cnn, headed, mlp

CASES = (
    Case("mlp-params", "parameters", lambda: (mlp(6, 5, 4, 3), torch.randn(3, 6)), {"wrt": "params", "form": "dense"}),
    Case("mlp-factors", "factors", lambda: (mlp(6, 5, 4, 3), torch.randn(3, 6)), {"wrt": "params", "form": "factors"}),
    Case("one-output", "one output", lambda: (mlp(6, 5, 1), torch.randn(3, 6)), {"wrt": "params", "form": "dense"}),
    Case("cnn", "convolutions", lambda: (cnn((2, 3, 4), 8, 2, 3), torch.randn(2, 2, 8, 8)), {"wrt": "params"}),
    Case("block", "transformer block", lambda: (Block(8, 2), torch.randn(2, 5, 8)), {"wrt": "params", "form": "dense"}),
    Case("inputs", "inputs", lambda: (mlp(6, 5, 3, activation=nn.Tanh), torch.randn(4, 6))),
    Case("language", "logits", lambda: (LanguageModel(11, 8, 4), torch.randint(0, 11, (2, 4))), {"wrt": EMBEDDINGS}),
    Case("ntk", "tangent kernel", lambda: (mlp(6, 5, 3), torch.randn(4, 6)), {"wrt": "params"}, "ntk"),
    Case("row-sums", "row sums", lambda: (SquareSums(), torch.randn(4, 5))),
    Case("last-layer", "last layer", lambda: (headed(4, 5, 7), torch.randn(1, 4)), {"wrt": "head.*"}),
)
BY_KEY = {case.key: case for case in CASES}

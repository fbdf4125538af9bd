"""Calls that come whole to a mode, and are written out into smaller ones that have rules.

A rewrite takes the function, its arguments and the mode that saw the call. It makes its own calls with the mode
switched on again, so that these are seen, or returns `NotImplemented` where it does not know the form of the call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it

from jacray_workers.rules import attention, recurrent

Rewrite = Callable[..., Any]


@functools.cache
def rewrites() -> dict[Callable[..., Any], Rewrite]:
    """The rewrites by the functions that torch dispatches."""
    aten = torch.ops.aten
    return {
        F.multi_head_attention_forward: attention.multi_head,
        F.scaled_dot_product_attention: attention.dot_product,
        aten.scaled_dot_product_attention.default: attention.dot_product,
        torch.lstm: recurrent.lstm,
        torch.gru: recurrent.gru,
        torch.rnn_tanh: recurrent.rnn_tanh,
        torch.rnn_relu: recurrent.rnn_relu,
        torch.lstm_cell: recurrent.lstm_cell,
        torch.gru_cell: recurrent.gru_cell,
        torch.rnn_tanh_cell: recurrent.rnn_tanh_cell,
        torch.rnn_relu_cell: recurrent.rnn_relu_cell,
        aten.lstm.input: recurrent.lstm,
        aten.gru.input: recurrent.gru,
        aten.rnn_tanh.input: recurrent.rnn_tanh,
        aten.rnn_relu.input: recurrent.rnn_relu,
    }

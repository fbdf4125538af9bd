"""Normalisations followed by a scale and a shift: the normalised input times the cotangent, and the cotangent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jacray_workers.rules.common import Terms, Unfit, Use
from jacray_workers.taps.follow import swap
from jacray_workers.taps.sites import OUT, Path, defeat, split

LAYER = ("input", "normalized_shape", "weight", "bias", "eps", "cudnn_enable")
RMS = ("input", "normalized_shape", "weight", "eps")
GROUP = ("input", "num_groups", "weight", "bias", "eps", "cudnn_enabled")
BATCH = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
BATCH_LOW = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled")
INSTANCE = ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
PRELU = ("input", "weight")
INSTANCE_LOW = (
    "input", "weight", "bias", "running_mean", "running_var", "use_input_stats", "momentum", "eps", "cudnn_enabled",
)  # fmt: skip


def over_last(use: Use) -> Terms:
    """Scales over the last axes: layer norm, RMS norm."""
    return _affine(use, channels=False)


def over_channels(use: Use) -> Terms:
    """Scales over the channels, the second axis: group norm, instance norm."""
    return _affine(use, channels=True)


def batch_norm(use: Use) -> Terms:
    """Batch norm by running statistics.

    Raises:
        MethodError: it uses the statistics of the batch, so samples depend on each other.
    """
    if use.value("training", False) or use.value("running_mean", None) is None:
        raise defeat("a batch norm takes its statistics from the batch", "run in eval mode")
    return _affine(use, channels=True)


def _affine(use: Use, *, channels: bool) -> Terms:
    if use.source("input") is not None or (channels and use.out_axis.dim == 1):
        raise Unfit("input")
    found: Terms = {}
    if (path := use.source("weight")) is not None:
        normal = _normalised(use)
        found[path] = _reduced(use, path, use.cots * normal.unsqueeze(1), channels=channels)
    if "bias" in use.names and (path := use.source("bias")) is not None:
        found[path] = _reduced(use, path, use.cots, channels=channels)
    return found


def prelu(use: Use) -> Terms:
    """`max(0, x) + w min(0, x)` with one weight, or one per channel."""
    path = use.source("weight")
    if path is None or use.source("input") is not None or use.out_axis.dim == 1:
        raise Unfit("weight")
    t = use.cots * use.samples("input").clamp(max=0).unsqueeze(1)
    if use.own(path) in ((), (1,)):
        return {path: use.dense(path, t.flatten(2).sum(dim=2).reshape(*t.shape[:2], *use.own(path)))}
    return {path: _reduced(use, path, t, channels=True)}


def _reduced(use: Use, path: Path, t: Tensor, *, channels: bool) -> Any:
    if not channels:
        return use.summed(path, t)
    # Behind samples, rows and images come the channels.
    return use.dense(path, t.flatten(4).sum(dim=(2, 4)) if t.dim() > 4 else t.sum(dim=2))


def _normalised(use: Use) -> Tensor:
    """The input before scale and shift, `(B, *shape)`: the same call without them."""
    gone = {path: None for name in ("weight", "bias") if name in use.names and (path := use.path(name)) is not None}
    args, kwargs = swap(use.tap.args, use.tap.kwargs, gone)
    with torch.no_grad():
        normal: Tensor = use.tap.site.func(*args, **kwargs)
    axis = use.tap.site.axis(OUT)
    if axis is None:
        raise Unfit("result")
    return split(normal, axis, use.tap.size)

"""Large matrix products, by whichever of torch's two libraries is the faster on this processor.

MKL is tuned for the processors of its maker; on others oneDNN, which torch's CPU builds have as well, took 11 to 17 %
less time for products of a few hundred columns and more. The choice depends on the processor and the shape alone, so
that the same work gives the same bits again.
"""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor

from jacray_workers import pages

# Multiplications from which it is worth choosing, and columns below which it is from far fewer; of a layer's few rows
# with its whole weight, fewer too.
LARGE, LAYER = 1 << 24, 1 << 22
NARROW = 16


def mm(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of two matrices, outside of automatic differentiation."""
    enough = LARGE if b.shape[1] >= NARROW else LARGE >> 6
    linear = _other(a, b) if a.shape[0] * b.numel() >= enough else None
    if linear is not None:
        found: Tensor = linear(a, b.mT, None, "none", [], "")
        return found
    return torch.mm(a, b, out=pages.like(a, (a.shape[0], b.shape[1])))


def layer(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` of rows, outside of automatic differentiation."""
    linear = _other(h, weight) if h.shape[0] * weight.numel() >= LAYER else None
    found: Tensor = F.linear(h, weight, bias) if linear is None else linear(h, weight, bias, "none", [], "")
    return found


def _other(a: Tensor, b: Tensor) -> Any:
    """OneDNN's product with a transposed matrix, where it is the faster one for these, else None."""
    if not a.dtype == b.dtype == torch.float32 or a.device.type != "cpu":
        return None
    exact = torch.get_float32_matmul_precision() == "highest" and torch._C._get_mkldnn_enabled()
    return _linear() if exact else None


@functools.cache
def _linear() -> Any:
    """OneDNN's product with a transposed matrix, as torch's compiler calls it; None where MKL is at home, or alone."""
    if not torch.backends.mkldnn.is_available() or _maker() != "AuthenticAMD":
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def _maker() -> str:
    """Who made the processor; the empty string where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("vendor_id"):
                return line.split(":", 1)[1].strip()
    return ""

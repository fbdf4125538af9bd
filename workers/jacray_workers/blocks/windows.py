"""How a convolution's kernel moves over its input, and the input unfolded accordingly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """A kernel's movement over any number of spatial axes.

    Attributes:
        kernel, stride, dilation: per spatial axis.
        before, after: zeros added in front of and behind each spatial axis.
        groups: channel groups.
        transposed: the kernel spreads each input over the output instead of gathering.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    groups: int = 1
    transposed: bool = False

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Window:
        """The window that `dataclasses.asdict` and JSON made plain."""
        fields: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in data.items()}
        return cls(**fields)

    def flat(self, x: Tensor) -> Tensor:
        """`(B, N, C, *space)` as `(B, G, S, C / G)`: positions of all N images in one axis."""
        grouped = x.unflatten(2, (self.groups, -1)).flatten(4)
        return torch.flatten(grouped.permute(0, 2, 1, 4, 3), 2, 3)

    def unfold(self, x: Tensor) -> Tensor:
        """What the kernel sees at each position: `(B, N, C, *space)` as `(B, G, S, C / G * K)`."""
        batch, images = x.shape[:2]
        merged = self._columns(x.flatten(0, 1))
        split = merged.unflatten(0, (batch, images)).unflatten(2, (self.groups, -1))
        return torch.flatten(split.permute(0, 2, 1, 4, 3), 2, 3)

    def _columns(self, x: Tensor) -> Tensor:
        """`(M, C, *space)` as `(M, C * K, P)`."""
        if self._pointwise():
            return x.flatten(2)
        if len(self.kernel) == 2 and self.before == self.after:
            # The library's own im2col is several times faster than a copy through strides.
            return F.unfold(x, self.kernel, self.dilation, self.before, self.stride)
        padding = [n for pair in zip(reversed(self.before), reversed(self.after), strict=True) for n in pair]
        padded = F.pad(x, padding).contiguous() if any(padding) else x.contiguous()
        axes = len(self.kernel)
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        places = [(n - r) // s + 1 for n, r, s in zip(padded.shape[2:], reach, self.stride, strict=True)]
        steps = padded.stride()[2:]
        windows = padded.as_strided(
            (*padded.shape[:2], *self.kernel, *places),
            (
                *padded.stride()[:2],
                *(n * d for n, d in zip(steps, self.dilation, strict=True)),
                *(n * s for n, s in zip(steps, self.stride, strict=True)),
            ),
        )
        return windows.flatten(2 + axes).flatten(1, 1 + axes)

    def _pointwise(self) -> bool:
        plain = all(k == 1 and s == 1 for k, s in zip(self.kernel, self.stride, strict=True))
        return plain and not any(self.before) and not any(self.after)


def same_padding(kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Zeros in front and behind that keep the size at stride 1; the odd one goes behind, as torch does."""
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    return tuple(n // 2 for n in total), tuple(n - n // 2 for n in total)

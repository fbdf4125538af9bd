"""The terms of a factored Jacobian block: what one use of a parameter adds, kept as the parts of a product.

Axes are written B samples, R output rows, G groups, S positions at which the weight is used, I its input features, O
its output features. `own` is the shape of the tensor that the operator was given; `view` says where that tensor lies
inside the parameter when it is a view of one (a transpose, a slice of a packed projection).

Sources: Goodfellow, "Efficient per-example gradient computations" (2015), for linear layers; Rochette, Manoel and
Tramel, "Efficient per-example gradient computations in convolutional neural networks" (2019), for convolutions.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor
from typing_extensions import override

from jacray_workers.blocks.windows import Window
from jacray_workers.blocks.write import add_or_copy, write_eye, write_outer
from jacray_workers.trust.finite import largest

Index = slice | Tensor


class View(NamedTuple):
    """Where a view lies in its parameter, as `Tensor.as_strided` takes it."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True, eq=False)
class Term(abc.ABC):
    """One addend of a block."""

    own: tuple[int, ...]
    view: View | None

    @property
    @abc.abstractmethod
    def size(self) -> tuple[int, int]:
        """Samples and rows."""

    @abc.abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The parts, by field name, each with the samples first."""

    @abc.abstractmethod
    def pick(self, samples: Index, rows: Index) -> Self:
        """The term of some samples and some rows."""

    @abc.abstractmethod
    def mix(self, k: Tensor) -> Term:
        """The term whose rows are combinations `k`, `(B, K, R)`, of this one's."""

    @abc.abstractmethod
    def write(self, out: Tensor, add: bool) -> None:
        """Write (or add) the dense term into `out`, `(B, R, *own)`."""

    @abc.abstractmethod
    def push(self, v: Tensor) -> Tensor:
        """The product with `v`, `(B or 1, *own)`: `(B, R)`."""

    @abc.abstractmethod
    def bound(self) -> float:
        """No number of the dense term is larger than this; NaN or infinity where that cannot be said."""

    def spec(self) -> dict[str, Any]:
        """What is not a tensor, as plain data."""
        kept = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in self.tensors()}
        return {"kind": KINDS_BY_TYPE[type(self)], **kept}

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same term with every part changed."""
        return self.with_parts({name: change(part) for name, part in self.tensors().items()})

    def with_parts(self, parts: Mapping[str, Any]) -> Self:
        """The same term with some fields replaced."""
        return dataclasses.replace(self, **parts)

    def dense(self) -> Tensor:
        """The dense term `(B, R, *own)`."""
        like = next(iter(self.cast_parts()))
        out = like.new_empty(*self.size, *self.own)
        self.write(out, add=False)
        return out

    def cast_parts(self) -> list[Tensor]:
        """The floating-point parts."""
        return [part for part in self.tensors().values() if part.is_floating_point()]


@dataclass(frozen=True, eq=False)
class Outer(Term):
    """Sums of outer products: `own` is `(O, I)`, or `(I, O)` where `flip`.

    Attributes:
        a: what the weight was multiplied with, `(B, S, I)`.
        g: cotangents of what came out, `(B, R, S, O)`; None where they are rows of the identity, `start` first.
        count: how many rows, needed where `g` is None.
    """

    a: Tensor
    g: Tensor | None
    flip: bool = False
    start: int = 0
    count: int = 0

    @property
    @override
    def size(self) -> tuple[int, int]:
        return self.a.shape[0], self.count if self.g is None else self.g.shape[1]

    @override
    def tensors(self) -> dict[str, Tensor]:
        return {"a": self.a} if self.g is None else {"a": self.a, "g": self.g}

    def acts(self) -> Tensor:
        """`(B, G, S, I)`."""
        return self.a.unsqueeze(1)

    def cots(self) -> Tensor:
        """`(B, R, G, S, O)`."""
        return self.explicit_g().unsqueeze(2)

    def explicit_g(self) -> Tensor:
        """The cotangents, made where they were only known to be rows of the identity."""
        if self.g is not None:
            return self.g
        width = self.own[1 if self.flip else 0]
        eye = torch.zeros(self.count, width, dtype=self.a.dtype, device=self.a.device)
        eye.diagonal(self.start).fill_(1)
        return eye[None, :, None, :].expand(self.a.shape[0], -1, -1, -1)

    @override
    def pick(self, samples: Index, rows: Index) -> Self:
        if self.g is None and isinstance(rows, slice) and rows.step in (None, 1):
            start, stop, _ = rows.indices(self.count)
            return dataclasses.replace(self, a=self.a[samples], start=self.start + start, count=max(stop - start, 0))
        g = self.explicit_g()[samples][:, rows]
        return dataclasses.replace(self, a=self.a[samples], g=g, start=0, count=0)

    @override
    def mix(self, k: Tensor) -> Term:
        if self.g is None:
            g = k.new_zeros(*k.shape[:2], 1, self.own[1 if self.flip else 0])
            g[:, :, 0, self.start : self.start + self.count] = k
        else:
            g = mix_rows(k, self.g)
        return dataclasses.replace(self, g=g, start=0, count=0)

    @override
    def write(self, out: Tensor, add: bool) -> None:
        if self.g is None:
            write_eye(out.mT if self.flip else out, self.a[:, 0], self.start, add)
        else:
            write_outer(out.unsqueeze(2), self.acts(), self.cots(), self.flip, add)

    @override
    def push(self, v: Tensor) -> Tensor:
        u = self.a @ (v if self.flip else v.mT)
        if self.g is None:
            return u[:, 0, self.start : self.start + self.count]
        return dot_rows(self.g, u)

    @override
    def bound(self) -> float:
        return largest(self.a) * (1.0 if self.g is None else self.a.shape[1] * largest(self.g))


@dataclass(frozen=True, eq=False)
class Paired(Term):
    """What a call took of each sample, beside the cotangents `g`, `(B, R, ...)`, of what came out."""

    # The name of the field that holds what was taken, `(B, ...)`.
    taken: ClassVar[str]
    g: Tensor

    @property
    @override
    def size(self) -> tuple[int, int]:
        return self.g.shape[0], self.g.shape[1]

    @override
    def tensors(self) -> dict[str, Tensor]:
        return {self.taken: getattr(self, self.taken), "g": self.g}

    @override
    def pick(self, samples: Index, rows: Index) -> Self:
        return self.with_parts({self.taken: getattr(self, self.taken)[samples], "g": self.g[samples][:, rows]})

    @override
    def mix(self, k: Tensor) -> Term:
        return dataclasses.replace(self, g=mix_rows(k, self.g))


@dataclass(frozen=True, eq=False)
class Conv(Paired):
    """A convolution: an outer product of unfolded inputs (of unfolded cotangents, where transposed) at each position.

    Attributes:
        x: the input, `(B, N, C, *space)`; N images per sample.
        g: cotangents, `(B, R, N, O, *space)`.
        window: how the kernel moves.
    """

    taken = "x"
    x: Tensor
    window: Window

    def acts(self) -> Tensor:
        """`(B, G, S, I)`."""
        return self.window.flat(self.x) if self.window.transposed else self.window.unfold(self.x)

    def cots(self) -> Tensor:
        """`(B, R, G, S, O)`."""
        batch, rows = self.g.shape[:2]
        g = self.g.flatten(0, 1)
        found = self.window.unfold(g) if self.window.transposed else self.window.flat(g)
        return found.view(batch, rows, *found.shape[1:])

    @property
    def flip(self) -> bool:
        """Whether the inputs' channels come first in the weight."""
        return self.window.transposed

    def matrix(self, t: Tensor) -> Tensor:
        """The weight's axes at the end of `t` as `(G, left, right)`."""
        lead, groups = t.shape[: t.dim() - len(self.own)], self.window.groups
        return t.reshape(*lead, groups, self.own[0] // groups, -1)

    @override
    def write(self, out: Tensor, add: bool) -> None:
        groups = self.window.groups
        target = out.flatten(3).unflatten(2, (groups, -1)) if mergeable(out, 3) else None
        if target is None:
            add_or_copy(out, self.dense(), add)
        else:
            write_outer(target, self.acts(), self.cots(), self.flip, add)

    @override
    def push(self, v: Tensor) -> Tensor:
        matrix = self.matrix(v)
        return dot_rows(self.cots(), self.acts() @ (matrix if self.flip else matrix.mT))

    @override
    def bound(self) -> float:
        # A number of the kernel meets each input of an image at most once, and each cotangent.
        places = min(self.x.shape[3:].numel(), self.g.shape[4:].numel())
        return largest(self.x) * largest(self.g) * self.x.shape[1] * places


@dataclass(frozen=True, eq=False)
class Lookup(Paired):
    """Rows of a table chosen by number: `own` is `(V, *features)`.

    Attributes:
        index: which rows, `(B, S)`.
        g: cotangents of what came out, `(B, R, S, D)` with the features flattened.
    """

    taken = "index"
    index: Tensor

    @override
    def write(self, out: Tensor, add: bool) -> None:
        if not add:
            out.zero_()
        g = self.g.to(out.dtype).reshape(*self.g.shape[:3], *self.own[1:])
        for target, index, part in zip(out, self.index, g, strict=True):
            target.index_add_(1, index, part)

    @override
    def push(self, v: Tensor) -> Tensor:
        flat = v.reshape(v.shape[0], self.own[0], -1).expand(self.g.shape[0], -1, -1)
        index = self.index.unsqueeze(2).expand(-1, -1, flat.shape[2])
        return dot_rows(self.g, flat.gather(1, index))

    @override
    def bound(self) -> float:
        return self.index.shape[1] * largest(self.g)


@dataclass(frozen=True, eq=False)
class Dense(Term):
    """The block itself, `(B, R, *own)`."""

    block: Tensor

    @property
    @override
    def size(self) -> tuple[int, int]:
        return self.block.shape[0], self.block.shape[1]

    @override
    def tensors(self) -> dict[str, Tensor]:
        return {"block": self.block}

    @override
    def pick(self, samples: Index, rows: Index) -> Self:
        return dataclasses.replace(self, block=self.block[samples][:, rows])

    @override
    def mix(self, k: Tensor) -> Term:
        return dataclasses.replace(self, block=mix_rows(k, self.block))

    @override
    def write(self, out: Tensor, add: bool) -> None:
        add_or_copy(out, self.block, add)

    @override
    def dense(self) -> Tensor:
        return self.block

    @override
    def push(self, v: Tensor) -> Tensor:
        return dot_rows(self.block, v.expand(self.block.shape[0], *self.own))

    @override
    def bound(self) -> float:
        return largest(self.block)


KINDS: dict[str, type[Term]] = {"outer": Outer, "conv": Conv, "lookup": Lookup, "dense": Dense}
KINDS_BY_TYPE = {kind: name for name, kind in KINDS.items()}


def mix_rows(k: Tensor, t: Tensor) -> Tensor:
    """`(B, K, R)` times `(B, R, ...)` over the rows."""
    flat = t.reshape(*t.shape[:2], -1)
    return (k.to(flat.dtype) @ flat).reshape(*k.shape[:2], *t.shape[2:])


def dot_rows(g: Tensor, u: Tensor) -> Tensor:
    """`(B, R, ...)` times `(B, ...)` over everything behind the rows: `(B, R)`."""
    return (g.reshape(*g.shape[:2], -1) @ u.reshape(g.shape[0], -1, 1)).squeeze(2)


def mergeable(t: Tensor, dim: int) -> bool:
    """Whether the axes from `dim` on lie in memory as one."""
    pairs = zip(range(dim, t.dim() - 1), range(dim + 1, t.dim()), strict=True)
    return all(t.shape[i] == 1 or t.stride(i) == t.shape[j] * t.stride(j) for i, j in pairs)

"""`Block`: the Jacobian of a parameter, kept as factors until somebody asks for the numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from jacray_workers import pages
from jacray_workers.blocks import index as blocks_index
from jacray_workers.blocks import inner as blocks_math
from jacray_workers.blocks.join import cat_terms
from jacray_workers.blocks.terms import KINDS, Conv, Dense, Outer, Term, View
from jacray_workers.blocks.windows import Window

_aten = torch.ops.aten


class Block(torch.Tensor):
    """A tensor `(B, *out, *param)` that is a sum of products, made dense only when that is asked for.

    Every torch function takes it, at the cost of making it dense. What is named here works on the factors. It cannot
    be written to, and carries no gradient.

    Attributes:
        terms: the addends; none for a block of zeros.
        out_shape, param_shape: the axes behind the samples.
        single: whether the samples' axis was taken away by an integer index.
    """

    terms: tuple[Term, ...]
    out_shape: tuple[int, ...]
    param_shape: tuple[int, ...]
    single: bool
    samples: int

    def __new__(
        cls,
        terms: Sequence[Term],
        out_shape: Sequence[int],
        param_shape: Sequence[int],
        dtype: torch.dtype,
        *,
        samples: int | None = None,
        single: bool = False,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Make a block of terms `(B, R, *param)` whose R rows fill `out_shape`.

        Args:
            terms: the addends.
            out_shape: the rows' shape.
            param_shape: the parameter's shape.
            dtype: the precision of the dense block.
            samples: how many samples; needed only without terms.
            single: whether the samples' axis, of size one, is hidden.
            device: where the block is; needed only without terms.
        """
        batch = terms[0].size[0] if terms else int(samples or 0)
        place = terms[0].cast_parts()[0].device if terms else torch.device(device)
        lead = () if single else (batch,)
        # Kernels of some terms refuse axes of size zero, and there is nothing to add up.
        terms = terms if batch and math.prod(out_shape) else ()
        self = torch.Tensor._make_wrapper_subclass(cls, (*lead, *out_shape, *param_shape), dtype=dtype, device=place)
        self.terms, self.single, self.samples = tuple(terms), single, batch
        self.out_shape, self.param_shape = tuple(out_shape), tuple(param_shape)
        return self

    # torch calls this class only below autograd, where the operator is known and its arguments can be made dense.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Any torch function: on the factors where it keeps them, else on the dense block."""
        del types
        kwargs = kwargs or {}
        if func in (_aten.detach.default, _aten.alias.default):
            return args[0]._like(args[0].terms)
        if func in (_aten.clone.default, _aten._to_copy.default):
            return args[0]._copied(func, kwargs)
        if func._schema.is_mutable and any(isinstance(a, Block) for a in _written(func, args, kwargs)):
            raise TypeError(f"{func}: a factored block cannot be written to; change block.dense() instead")
        args, kwargs = pytree.tree_map_only(Block, Block.dense, (args, kwargs))
        return func(*args, **kwargs)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        kinds = " + ".join(type(term).__name__.lower() for term in self.terms) or "zero"
        about = f"shape={tuple(self.shape)}, dtype={self.dtype}, bytes={self.nbytes_factored}"
        return f"{type(self).__name__}({kinds}, {about})"

    def dense(self, out: Tensor | None = None) -> Tensor:
        """The block as a plain tensor.

        Args:
            out: where to write it; made anew by default.
        """
        if out is None:
            if len(self.terms) == 1 and isinstance(self.terms[0], Dense) and self.terms[0].view is None:
                return self.terms[0].block.to(self.dtype).reshape(self.shape)
            out = pages.empty(self.shape, self.dtype, self.device)
        flat = out.view(self.samples, self.rows, *self.param_shape)
        write_terms(self.terms, flat)
        return out

    @property
    def rows(self) -> int:
        """How many output numbers a sample has."""
        return math.prod(self.out_shape)

    @property
    def nbytes_factored(self) -> int:
        """Bytes of the factors as they would be stored."""
        return sum(part.numel() * part.element_size() for part in self.factors().values())

    # Slices and views --------------------------------------------------------------------------------------------

    def __getitem__(self, index: Any) -> Tensor:
        """Slices and integers on samples and output axes stay factored; others make dense what they leave."""
        return blocks_index.take(self, index)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise TypeError("a factored block cannot be written to; change block.dense() instead")

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def unflatten_rows(self, out_shape: Sequence[int]) -> Block:
        """The same block with its rows arranged in this shape."""
        if math.prod(out_shape) != self.rows:
            raise ValueError(f"{self.rows} rows do not fill {tuple(out_shape)}")
        return self._like(self.terms, out_shape=tuple(out_shape))

    # Products ----------------------------------------------------------------------------------------------------

    def vjp(self, k: Tensor) -> Tensor:
        """`sum_r k_r J_r`: `k` is `(B, *out)`, or `(*out)` for all samples alike. Returns `(B, *param)`."""
        k = k.to(device=self.device, dtype=self.dtype)
        whole = (self.samples, *self.out_shape)
        if tuple(k.shape) not in (whole, self.out_shape):
            raise ValueError(f"k must have shape {whole} or {self.out_shape}; got {tuple(k.shape)}")
        mixed = k.expand(whole).reshape(self.samples, 1, self.rows)
        return self._like([term.mix(mixed) for term in self.terms], out_shape=()).dense()

    def jvp(self, v: Tensor) -> Tensor:
        """`J v`: `v` is `(*param)`, or `(B, *param)` for one per sample. Returns `(B, *out)`."""
        v = v.to(device=self.device, dtype=self.dtype)
        whole = (self.samples, *self.param_shape)
        if tuple(v.shape) not in (whole, self.param_shape):
            raise ValueError(f"v must have shape {self.param_shape} or {whole}; got {tuple(v.shape)}")
        v = v.reshape(-1, *self.param_shape).contiguous()
        found = v.new_zeros(self.samples, self.rows)
        for term in self.terms:
            found += term.push(blocks_math.seen_through(v, term.view, 1))
        return found.reshape((*self._lead, *self.out_shape))

    def gram(self, other: Tensor | None = None) -> Tensor:
        """`J J'^T` over the parameter, `(B, *out, B', *out')`; with itself by default."""
        right = self if other is None else as_block(other, self.param_shape)
        found = torch.zeros(self.samples, self.rows, right.samples, right.rows, dtype=self.dtype, device=self.device)
        for t in self.terms:
            for u in right.terms:
                found += blocks_math.gram(t, u, self.param_shape)
        return found.reshape((*self._lead, *self.out_shape, *right._lead, *right.out_shape))

    def bound(self) -> float:
        """No number of the block is larger than this; NaN where that cannot be said."""
        return sum(term.bound() for term in self.terms)

    def norms(self) -> Tensor:
        """The Frobenius norm of each sample's block: `(B,)`."""
        squares = torch.zeros(self.samples, dtype=self.dtype, device=self.device)
        for i, t in enumerate(self.terms):
            squares += blocks_math.inner(t, t, self.param_shape)
            for u in self.terms[:i]:
                squares += 2 * blocks_math.inner(t, u, self.param_shape)
        return squares.clamp(min=0).sqrt().reshape(self._lead)

    def norm(self, p: Any = "fro", dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Tensor:
        """The Frobenius norm of the whole block from its factors; any other norm as `Tensor.norm` computes it."""
        if p in ("fro", 2, 2.0) and dim is None and not keepdim and dtype is None:
            return self.norms().square().sum().sqrt()
        found: Tensor = self.dense().norm(p, dim, keepdim, dtype)
        return found

    # To and from other forms -------------------------------------------------------------------------------------

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        del copy
        array: np.ndarray[Any, Any] = self.dense().cpu().numpy()
        return array if dtype is None else array.astype(dtype)

    def numpy(self, *, force: bool = False) -> np.ndarray[Any, Any]:
        """The dense block as a numpy array."""
        return self.dense().numpy(force=force)

    def tolist(self) -> Any:
        """The dense block as nested lists."""
        return self.dense().tolist()

    def factors(self) -> dict[str, Tensor]:
        """The factors as plain tensors by name, each with the samples first: what a store keeps beside `meta()`."""
        return {f"{i}.{name}": part for i, term in enumerate(self.terms) for name, part in term.tensors().items()}

    def meta(self) -> dict[str, Any]:
        """Everything but the factors, as data for JSON."""
        return {
            "samples": self.samples,
            "out_shape": list(self.out_shape),
            "param_shape": list(self.param_shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "single": self.single,
            "terms": [pytree.tree_map(_plain, term.spec(), is_leaf=_is_record) for term in self.terms],
        }

    @classmethod
    def from_factors(cls, meta: Mapping[str, Any], factors: Mapping[str, Any]) -> Block:
        """The block that `meta()` and `factors()` describe; factors may be numpy arrays."""
        dtype = getattr(torch, meta["dtype"])
        terms = [
            _term(spec, {n.split(".", 1)[1]: v for n, v in factors.items() if n.split(".", 1)[0] == str(i)}, dtype)
            for i, spec in enumerate(meta["terms"])
        ]
        kind = DenseBlock if [type(t) for t in terms] == [Dense] else Block
        return kind(
            terms, meta["out_shape"], meta["param_shape"], dtype, samples=meta["samples"], single=meta["single"]
        )

    @staticmethod
    def cat(blocks: Sequence[Tensor]) -> Block:
        """One block from blocks of consecutive samples; dense where their terms differ in kind."""
        every = [b if isinstance(b, Block) else as_block(b, ()) for b in blocks]
        parts = [b for b in every if b.samples] or every[:1]
        first = parts[0]
        if len(parts) == 1:
            return first
        samples = sum(b.samples for b in parts)
        specs = {tuple((type(t), t.own, t.view, getattr(t, "window", None)) for t in b.terms) for b in parts}
        if len(specs) == 1:
            terms = [cat_terms(same, 0) for same in zip(*(b.terms for b in parts), strict=True)]
            return first._like(terms, samples=samples)
        whole = torch.cat([b.dense() for b in parts])
        return dense_block(whole, first.out_shape, first.param_shape)

    def __reduce_ex__(self, protocol: Any) -> Any:
        del protocol
        return Block.from_factors, (self.meta(), {name: part.contiguous() for name, part in self.factors().items()})

    def __deepcopy__(self, memo: Any) -> Block:
        del memo
        return self._like([term.map(torch.clone) for term in self.terms])

    @property
    def _lead(self) -> tuple[int, ...]:
        return () if self.single else (self.samples,)

    def _like(self, terms: Sequence[Term], **changes: Any) -> Block:
        """A block like this one of other terms."""
        out_shape = changes.get("out_shape", self.out_shape)
        given: dict[str, Any] = {"samples": self.samples, "single": self.single, "device": self.device, **changes}
        kind = DenseBlock if [type(t) for t in terms] == [Dense] else Block
        dtype = given.pop("dtype", self.dtype)
        given.pop("out_shape", None)
        return kind(terms, out_shape, self.param_shape, dtype, **given)

    def _copied(self, func: Any, kwargs: dict[str, Any]) -> Block:
        """A copy, in another precision or on another device; numbers of table rows keep their own precision."""

        def change(part: Tensor) -> Tensor:
            options = kwargs if part.is_floating_point() else {k: v for k, v in kwargs.items() if k != "dtype"}
            copied: Tensor = func(part, **{k: v for k, v in options.items() if k != "memory_format"})
            return copied

        dtype, device = kwargs.get("dtype") or self.dtype, kwargs.get("device") or self.device
        return self._like([term.map(change) for term in self.terms], dtype=dtype, device=device)


class DenseBlock(Block):
    """A block that holds its numbers: the same methods where factors would be larger."""


def dense_block(t: Tensor, out_shape: Sequence[int], param_shape: Sequence[int]) -> DenseBlock:
    """A plain tensor `(B, *out, *param)` as a block."""
    term = Dense(tuple(param_shape), None, t.reshape(t.shape[0], math.prod(out_shape), *param_shape))
    return DenseBlock([term], out_shape, param_shape, t.dtype)


def as_block(t: Tensor, param_shape: Sequence[int]) -> Block:
    """The block, or a plain tensor whose last axes are the parameter's as a block."""
    if isinstance(t, Block):
        return t
    return dense_block(t, t.shape[1 : t.dim() - len(param_shape)], param_shape)


def write_terms(terms: Sequence[Term], out: Tensor) -> None:
    """Write the sum of terms into `out` `(B, R, *param)`; zeros where there are none."""
    if not terms or not _covers(terms[0], out):
        out.zero_()
        add = True
    else:
        add = False
    for term in terms:
        term.write(blocks_math.seen_through(out, term.view, 2), add)
        add = True


def _covers(term: Term, out: Tensor) -> bool:
    return term.view is None or math.prod(term.own) == math.prod(out.shape[2:])


def smaller(terms: Sequence[Term], size: tuple[int, ...], item: int) -> bool:
    """Whether the factors take fewer bytes than the dense block of this size."""
    held = sum(part.numel() * part.element_size() for term in terms for part in term.tensors().values())
    return held < math.prod(size) * item and any(isinstance(term, Outer | Conv) or held == 0 for term in terms)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operator writes to."""
    named = zip(func._schema.arguments, args, strict=False)
    return [a for spec, a in named if spec.alias_info is not None and spec.alias_info.is_write] + [kwargs.get("out")]


def _is_record(value: Any) -> bool:
    return isinstance(value, Window | View | tuple)


def _plain(value: Any) -> Any:
    if isinstance(value, Window):
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(value).items()}
    if isinstance(value, tuple):
        return [list(v) if isinstance(v, tuple) else v for v in value]
    return value


def _term(spec: Mapping[str, Any], parts: Mapping[str, Any], dtype: torch.dtype) -> Term:
    fields = dict(spec)
    kind = KINDS[fields.pop("kind")]
    fields["own"] = tuple(fields["own"])
    if fields["view"] is not None:
        size, stride, offset = fields["view"]
        fields["view"] = View(tuple(size), tuple(stride), offset)
    if "window" in fields:
        fields["window"] = Window.from_dict(fields["window"])
    for name, part in parts.items():
        tensor = part if isinstance(part, Tensor) else torch.from_numpy(np.ascontiguousarray(part))
        fields[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return kind(**fields)

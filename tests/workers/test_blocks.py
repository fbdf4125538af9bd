"""Factored blocks against their own dense form, term by term and in sums."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jacray_workers.blocks.block import Block, DenseBlock, dense_block
from jacray_workers.blocks.terms import Conv, Dense, Lookup, Outer, Term, View
from jacray_workers.blocks.windows import Window
from torch import Tensor

B, R, S, O, I = 3, 4, 2, 5, 6  # noqa: E741 - samples, rows, positions, output and input features


def r(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def outer(flip: bool = False, places: int = S, view: View | None = None) -> Term:
    own = (I, O) if flip else (O, I)
    return Outer(own, view, r(B, places, I), r(B, R, places, O), flip)


def eye(flip: bool = False) -> Term:
    return Outer((I, O) if flip else (O, I), None, r(B, 1, I), None, flip, 1, R)


def lookup(*features: int) -> Term:
    return Lookup((O, *features), None, index=torch.randint(0, O, (B, S)), g=r(B, R, S, int(np.prod(features))))


def conv(groups: int, transposed: bool = False) -> Term:
    window = Window((3, 2), (2, 1), (1, 1), (1, 1), (1, 1), groups, transposed)
    small, large = r(B, 2, 4, 4, 9), r(B, R, 2, 6, 7, 8)
    if transposed:
        return Conv((4, 6 // groups, 3, 2), None, x=small, g=large, window=window)
    return Conv((6, 4 // groups, 3, 2), None, x=r(B, 2, 4, 7, 8), g=r(B, R, 2, 6, 4, 9), window=window)


KINDS: dict[str, tuple[Callable[[], list[Term]], tuple[int, ...]]] = {
    "zero": (list, (2, 3)),
    "one position": (lambda: [outer(places=1)], (O, I)),
    "positions": (lambda: [outer()], (O, I)),
    "inputs first": (lambda: [outer(True)], (I, O)),
    "inputs first, one position": (lambda: [outer(True, 1)], (I, O)),
    "identity": (lambda: [eye()], (O, I)),
    "identity, inputs first": (lambda: [eye(True)], (I, O)),
    "table": (lambda: [lookup(3, 2)], (O, 3, 2)),
    "vector table": (lambda: [lookup()], (O,)),
    "tied": (lambda: [outer(), lookup(I)], (O, I)),
    "tied to an identity": (lambda: [lookup(I), eye()], (O, I)),
    "slices": (lambda: [outer(view=View((O, I), (I, 1), place * O * I)) for place in (0, 1)], (2 * O, I)),
    "overlapping slices": (lambda: [outer(view=View((O, I), (I, 1), place * I)) for place in (0, 1)], (O + 1, I)),
    "turned view": (lambda: [outer(view=View((O, I), (1, O), 0)), outer(True)], (I, O)),
    "column": (lambda: [Outer((O, 1), View((O, 1), (1, 1), 0), r(B, 1, 1), r(B, R, 1, O))], (O,)),
    "convolution": (lambda: [conv(1)], (6, 4, 3, 2)),
    "grouped convolution": (lambda: [conv(2)], (6, 2, 3, 2)),
    "two convolutions": (lambda: [conv(2), conv(2)], (6, 2, 3, 2)),
    "transposed": (lambda: [conv(1, True)], (4, 6, 3, 2)),
    "transposed and grouped": (lambda: [conv(2, True)], (4, 3, 3, 2)),
    "dense": (lambda: [Dense((2, 3), None, r(B, R, 2, 3))], (2, 3)),
    "dense and factors": (lambda: [Dense((O, I), None, r(B, R, O, I)), outer()], (O, I)),
}


def make(kind: str, out: tuple[int, ...] = (2, 2)) -> Block:
    torch.manual_seed(len(kind))
    terms, shape = KINDS[kind]
    return Block(terms(), out, shape, torch.float64, samples=B)


def plain(t: Any) -> Tensor:
    return t.dense() if isinstance(t, Block) else t


each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
def test_is_a_tensor(kind: str) -> None:
    block = make(kind)
    dense = block.dense()
    assert isinstance(block, Tensor)
    assert type(dense) is Tensor
    assert block.shape == dense.shape == (B, 2, 2, *KINDS[kind][1])
    assert (block.dtype, block.device, block.rows) == (dense.dtype, dense.device, 4)
    torch.testing.assert_close(block, dense)
    torch.testing.assert_close(block.flatten(1) * 2 + dense.flatten(1), 3 * dense.flatten(1))
    torch.testing.assert_close(block.sum(dim=0), dense.sum(dim=0))
    assert np.array_equal(np.asarray(block), dense.numpy())
    assert np.array_equal(block.numpy(), dense.numpy())
    assert block.tolist() == dense.tolist()
    out = torch.full_like(dense, 7)
    assert block.dense(out) is out
    torch.testing.assert_close(out, dense)


@each_kind
def test_sums_of_terms_are_sums_of_their_dense_forms(kind: str) -> None:
    block = make(kind)
    total = torch.zeros(block.shape, dtype=torch.float64)
    for term in block.terms:
        total += Block([term], block.out_shape, block.param_shape, torch.float64).dense()
    torch.testing.assert_close(block.dense(), total)


@each_kind
def test_products_without_the_dense_block(kind: str) -> None:
    block, other = make(kind), make(kind)[1:]
    matrix = block.dense().reshape(B, R, -1)
    shape = block.param_shape
    k = r(B, 2, 2)
    torch.testing.assert_close(block.vjp(k), torch.einsum("brp,br->bp", matrix, k.reshape(B, R)).reshape(B, *shape))
    torch.testing.assert_close(block.vjp(k[0]), block.vjp(k[:1].expand(B, -1, -1)))
    v = r(B, *shape)
    torch.testing.assert_close(block.jvp(v), torch.einsum("brp,bp->br", matrix, v.reshape(B, -1)).reshape(B, 2, 2))
    torch.testing.assert_close(block.jvp(v[0]), (matrix @ v[0].flatten()).reshape(B, 2, 2))
    gram = torch.einsum("brp,csp->brcs", matrix, matrix).reshape(B, 2, 2, B, 2, 2)
    torch.testing.assert_close(block.gram(), gram)
    torch.testing.assert_close(block.gram(other), gram[:, :, :, 1:])
    torch.testing.assert_close(block.gram(other.dense()), gram[:, :, :, 1:])
    torch.testing.assert_close(block.norms(), matrix.flatten(1).norm(dim=1))
    torch.testing.assert_close(block.norm(), matrix.norm())
    torch.testing.assert_close(block.norm(1, dim=0), block.dense().norm(1, dim=0))


INDICES: list[Any] = [
    np.s_[1], np.s_[-1], np.s_[:2], np.s_[::2], np.s_[:, 1], np.s_[:, :, 0], np.s_[1:, 0, 1], np.s_[1, 1, 1],
    np.s_[..., 0], np.s_[-1, ..., 0], np.s_[[0, 2]], np.s_[torch.tensor([2, 1])], np.s_[:, [1]], np.s_[None],
    np.s_[:, :, :, 1:], np.s_[0:0], np.s_[:, 1:1], torch.tensor([True, False, True]), np.s_[:, 1, :, 0],
]  # fmt: skip


@each_kind
@pytest.mark.parametrize("index", INDICES, ids=str)
def test_indexing(kind: str, index: Any) -> None:
    block = make(kind)
    found, known = block[index], block.dense()[index]
    assert found.shape == known.shape
    torch.testing.assert_close(plain(found), known)
    if isinstance(found, Block):
        assert found.gram().shape == (*found._lead, *found.out_shape) * 2
        torch.testing.assert_close(found.norm(), known.norm())


@pytest.mark.parametrize("index", [np.s_[1], np.s_[:2], np.s_[:, 1], np.s_[1:, 0, 1], np.s_[[0, 2]]], ids=str)
def test_samples_and_rows_stay_factored(index: Any) -> None:
    found = make("positions")[index]
    assert isinstance(found, Block)
    assert not isinstance(found, DenseBlock)


def test_consecutive_rows_of_the_identity_stay_so() -> None:
    assert make("identity", (4,))[:, 1:3].nbytes_factored == B * I * 8


@each_kind
def test_travels(kind: str) -> None:
    block = make(kind)
    dense = block.dense()
    meta = json.loads(json.dumps(block.meta()))
    arrays = {name: part.numpy() for name, part in block.factors().items()}
    again = Block.from_factors(meta, arrays)
    assert again.meta() == block.meta()
    assert all(len(part) == B for part in arrays.values())
    assert sum(part.nbytes for part in arrays.values()) == block.nbytes_factored
    for copied in (again, pickle.loads(pickle.dumps(block)), cloudpickle.loads(cloudpickle.dumps(block))):
        assert torch.equal(copied.dense(), dense)
    assert torch.equal(copy.deepcopy(block).dense(), dense)
    assert torch.equal(block.clone().dense(), dense)
    assert type(block.float()) in (Block, DenseBlock)
    torch.testing.assert_close(block.float().dense(), dense.float())


@each_kind
def test_joins_samples(kind: str) -> None:
    block = make(kind)
    joined = Block.cat([block[:1], block[1:]])
    torch.testing.assert_close(joined.dense(), block.dense())
    assert [type(t) for t in joined.terms] == [type(t) for t in block.terms]
    mixed = Block.cat([block[:1], dense_block(block.dense()[1:], (2, 2), block.param_shape)])
    torch.testing.assert_close(mixed.dense(), block.dense())


def test_joins_samples_with_different_numbers_of_positions() -> None:
    torch.manual_seed(0)
    parts = [Block([outer(places=n)], (R,), (O, I), torch.float64) for n in (1, 3)]
    torch.testing.assert_close(Block.cat(parts).dense(), torch.cat([p.dense() for p in parts]))


def test_rows_are_rearranged() -> None:
    block = make("positions", (4,))
    torch.testing.assert_close(block.unflatten_rows((2, 2)).dense(), block.dense().view(B, 2, 2, O, I))
    with pytest.raises(ValueError, match="4 rows"):
        block.unflatten_rows((3,))


def test_cannot_be_written_to() -> None:
    block = make("positions")
    with pytest.raises(TypeError, match="dense"):
        block.add_(1)
    with pytest.raises(TypeError):
        block[0] = 0
    with pytest.raises(ValueError, match="k must"):
        block.vjp(r(3))
    with pytest.raises(ValueError, match="v must"):
        block.jvp(r(3))


def test_dense_blocks_hold_their_numbers() -> None:
    t = r(B, 2, 2, 3)
    block = dense_block(t, (2, 2), (3,))
    assert block.dense().data_ptr() == t.data_ptr()
    assert "dense" in repr(block)
    torch.testing.assert_close(block.gram(), torch.einsum("bijp,cklp->bijckl", t, t))


@settings(max_examples=60, deadline=None)
@given(
    batch=st.tuples(st.integers(1, 4), st.integers(1, 4)), rows=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    places=st.tuples(st.integers(1, 5), st.integers(1, 5)), own=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    flip=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_gram_of_any_shapes(
    batch: tuple[int, int], rows: tuple[int, int], places: tuple[int, int], own: tuple[int, int], flip: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    wide = own[::-1] if flip else own
    left, right = (
        Block([Outer(wide, None, r(b, s, own[1]), r(b, n, s, own[0]), flip)], (n,), wide, torch.float64)
        for b, n, s in zip(batch, rows, places, strict=True)
    )
    dense = torch.einsum("brij,csij->brcs", left.dense(), right.dense())
    torch.testing.assert_close(left.gram(right), dense)

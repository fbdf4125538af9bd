"""Products made where the Jacobian is, against the same products of the dense float64 Jacobian."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jacray_workers import kernels, products
from jacray_workers.engine import prepare, run_shard
from jacray_workers.errors import BudgetError, JobError, RequestError
from jacray_workers.planning import memory
from jacray_workers.products import krylov, pairs, spectrum
from jacray_workers.products.band import Band, Unit
from jacray_workers.request import make_request
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests import reference
from tests.door import compute

BY_SAMPLE = ("norms", "singular_values")
SUMMED = ("gram", "ggn", "fisher")
EVERY = ("mean_jacobian", *BY_SAMPLE, *SUMMED, "ntk")
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-4}
DTYPES = [torch.float64, torch.float32]


# The dense computation --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Dense:
    """The whole Jacobian `(N, rows, columns)` in float64, and the shapes that its rows and columns have."""

    jacobian: Tensor
    outputs: Tensor
    outs: list[tuple[int, ...]]
    leaves: list[tuple[int, ...]]

    def expected(self, name: str, *, loss: str = "cross_entropy", trace: bool = False) -> Tensor:
        j = self.jacobian
        if name == "mean_jacobian":
            return j.mean(dim=0)
        if name == "norms":
            return j.square().sum(dim=(1, 2)).sqrt()
        if name == "singular_values":
            return torch.linalg.svdvals(j)
        if name == "logabsdet":
            return torch.linalg.slogdet(j).logabsdet
        if name == "ntk":
            full = torch.einsum("nrc,msc->nmrs", j, j)
            return full.diagonal(dim1=2, dim2=3).sum(dim=2) if trace else full
        h = torch.eye(j.shape[1], dtype=j.dtype).expand(len(j), -1, -1) if name == "gram" else self.hessian(loss)
        return torch.einsum("nrc,nrs,nsd->cd", j, h, j)

    def hessian(self, loss: str) -> Tensor:
        """By autograd, of the loss as torch computes it."""
        classes = self.outs[0][-1] if self.outs[0] else 1

        def value(y: Tensor) -> Tensor:
            if loss == "mse":
                return 0.5 * y.square().sum()
            labels = torch.zeros(y.numel() // classes, dtype=torch.long)
            return nn.functional.cross_entropy(y.reshape(-1, classes), labels, reduction="sum")

        return torch.stack([torch.func.hessian(value)(y) for y in self.outputs])

    def matrix(self, found: Any) -> Tensor:
        """A result over pairs of leaves as one matrix."""
        blocks = iter(pytree.tree_leaves(found))
        return torch.cat(
            [
                torch.cat([_two(next(blocks), a, b) for b in self.leaves], dim=1)
                for a in self.leaves
            ]
        )  # fmt: skip

    def rows(self, found: Any) -> Tensor:
        """A result over outputs and leaves as one matrix."""
        blocks = iter(pytree.tree_leaves(found))
        return torch.cat([torch.cat([_two(next(blocks), o, a) for a in self.leaves], dim=1) for o in self.outs])

    def columns(self, found: Any, lead: int) -> Tensor:
        """A result over leaves with `lead` leading axes."""
        return torch.cat(
            [b.flatten(lead) if b.dim() > lead else b.unsqueeze(-1) for b in pytree.tree_leaves(found)], -1
        )

    def seen(self, name: str, found: Any) -> Tensor:
        if name in SUMMED:
            return self.matrix(found)
        return self.rows(found) if name == "mean_jacobian" else found


def _two(block: Tensor, left: tuple[int, ...], right: tuple[int, ...]) -> Tensor:
    assert block.shape == (*left, *right)
    return block.reshape(math.prod(left), math.prod(right))


def dense(model: Any, inputs: Any, wrt: Any) -> Dense:
    tree = reference.jacobian(model, inputs, wrt)
    many = not isinstance(tree, Tensor)
    y = reference.outputs(model, inputs)
    outs = [part for part in pytree.tree_leaves(y) if part is not None]
    blocks = [b for b in pytree.tree_leaves(tree) if b is not None]
    each = len(blocks) // len(outs)
    leaves = [tuple(b.shape[outs[0].dim() :]) for b in blocks[:each]] if many else [tuple(tree.shape[y.dim() :])]
    samples = outs[0].shape[0]
    rows = [
        torch.cat([b.reshape(samples, o[0].numel(), -1) for b in blocks[i * each : (i + 1) * each]], dim=2)
        for i, o in enumerate(outs)
    ]
    flat = torch.cat([o.reshape(samples, -1) for o in outs], dim=1)
    return Dense(torch.cat(rows, dim=1), flat, [tuple(o.shape[1:]) for o in outs], leaves)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype = torch.float64) -> None:
    assert found.shape == expected.shape
    scale = max(float(expected.abs().max()), 1e-300) if expected.numel() else 1.0
    assert float((found.double() - expected).abs().max() if found.numel() else 0.0) <= LIMITS[dtype] * scale


# Models ------------------------------------------------------------------------------------------------------------


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"a": torch.tanh(self.left(x)), "b": self.right(x).sin().unsqueeze(1)}


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(5, 3)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.mix(torch.cat([x, z.flatten(1)], dim=1)))


class Tied(nn.Module):
    """A weight used twice, another directly, and a bias that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4) / 2)
        self.scale = nn.Parameter(torch.randn(4))
        self.unused = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.tanh(x @ self.weight.T) @ self.weight.T) * self.scale


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3))


def tokens() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 4))


CASES: dict[str, tuple[Any, Any, Any]] = {
    "inputs": (mlp, (4,), "inputs"),
    "params": (mlp, (4,), "params"),
    "one parameter": (mlp, (4,), "2.weight"),
    "both": (mlp, (4,), ["inputs", "0.weight", "2.bias"]),
    "hidden": (mlp, (4,), {"module": "1", "side": "output"}),
    "conv params": (cnn, (2, 4, 4), "params"),
    "conv inputs": (cnn, (2, 4, 4), "inputs"),
    "positions": (tokens, (2, 3), "params"),
    "positions inputs": (tokens, (2, 3), "inputs"),
    "tied": (Tied, (4,), "params"),
    "two inputs": (TwoInputs, [(3,), (2, 1)], "inputs"),
    "two outputs": (TwoOutputs, (4,), "inputs"),
    "two outputs params": (TwoOutputs, (4,), "params"),
}


def case(name: str, dtype: torch.dtype = torch.float64, samples: int = 5) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(3)
    make, shapes, wrt = CASES[name]
    model = make().to(dtype)
    if isinstance(shapes, list):
        return model, tuple(torch.randn(samples, *shape, dtype=dtype) for shape in shapes), wrt
    return model, torch.randn(samples, *shapes, dtype=dtype), wrt


# Exactness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_product_is_that_of_the_dense_jacobian(name: str, dtype: torch.dtype) -> None:
    model, x, wrt = case(name, dtype)
    known = dense(model, x, wrt)
    loss = "mse" if len(known.outs) > 1 else "cross_entropy"
    together = compute(model, x, wrt=wrt, returns=EVERY, loss=loss, chunk_size=2)
    for product in EVERY:
        alone = compute(model, x, wrt=wrt, returns=product, loss=loss)
        for answer in (together, alone):
            close(known.seen(product, answer.found[product]), known.expected(product, loss=loss), dtype)


@pytest.mark.parametrize("method", ["reverse", "forward", "backward_loop", "layerwise"])
@pytest.mark.parametrize("name", ["both", "conv params", "two outputs", "hidden"])
def test_every_method_gives_the_same_products(name: str, method: str) -> None:
    model, x, wrt = case(name)
    known = dense(model, x, wrt)
    answer = compute(model, x, wrt=wrt, returns=EVERY, loss="mse", method=method, chunk_size=3)
    assert answer.plan.method == method
    for product in EVERY:
        close(known.seen(product, answer.found[product]), known.expected(product, loss="mse"))


def test_a_chain_gives_products_too() -> None:
    torch.manual_seed(0)
    wide, narrow = nn.Sequential(nn.Linear(300, 250), nn.Tanh()), nn.Sequential(nn.Linear(250, 6), nn.Tanh())
    model = nn.Sequential(wide, narrow, nn.Linear(6, 250), nn.Tanh(), nn.Linear(250, 300)).double()
    x, k, v = torch.randn(3, 300).double(), torch.randn(300).double(), torch.randn(2, 3, 300).double()
    known = dense(model, x, "inputs")
    answer = compute(
        model, x, returns=("ntk", "norms", "weighted_gradient", "jvp"), weights=k, vectors=v, method="chain"
    )
    close(answer.ntk, known.expected("ntk"))
    close(answer.norms, known.expected("norms"))
    close(answer.weighted_gradient, torch.einsum("r,nrc->nc", k, known.jacobian))
    close(answer.jvp, torch.einsum("nrc,knc->knr", known.jacobian, v))


@pytest.mark.parametrize("form", ["auto", "dense", "factors"])
@pytest.mark.parametrize("name", ["params", "conv params", "positions", "tied"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_factored_blocks_give_the_same_products(name: str, form: str, dtype: torch.dtype) -> None:
    model, x, wrt = case(name, dtype)
    known = dense(model, x, wrt)
    for trace in (False, True):
        answer = compute(
            model,
            x,
            wrt=wrt,
            returns=EVERY,
            method="layerwise",
            form=form,
            chunk_size=2,
            ntk="trace" if trace else "full",
        )
        for product in EVERY:
            close(known.seen(product, answer.found[product]), known.expected(product, trace=trace), dtype)


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("name", ["inputs", "params"])
def test_chunks_and_shards_move_nothing_but_rounding(name: str, workers: int) -> None:
    model, x, wrt = case(name, samples=7)
    known = dense(model, x, wrt)
    for chunk in range(1, 8):
        for trace in ("full", "trace"):
            answer = compute(model, x, wrt=wrt, returns=EVERY, chunk_size=chunk, workers=workers, ntk=trace)
            for product in EVERY:
                expected = known.expected(product, trace=trace == "trace")
                close(known.seen(product, answer.found[product]), expected)


def test_shards_cover_the_kernel_matrix() -> None:
    model, x, wrt = case("params", samples=9)
    answer = compute(model, x, wrt=wrt, returns="ntk", chunk_size=1, workers=2)
    assert answer.plan.shard_count > 1
    close(answer.ntk, dense(model, x, wrt).expected("ntk"))


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
@pytest.mark.parametrize("trace", ["full", "trace"])
def test_rows_in_bands_move_nothing_but_rounding(rows: int, trace: str) -> None:
    model, x, wrt = case("positions inputs")
    known = dense(model, x, wrt)
    names = ("mean_jacobian", "norms", *SUMMED, "ntk")
    v = torch.randn(2, *x.shape[1:], dtype=x.dtype)[:, None].expand(-1, 5, -1, -1)
    for room in (0, 1 << 30):

        def change(plan: Any, room: int = room) -> Any:
            return dataclasses.replace(plan, row_chunk=rows, budget_bytes=plan.peak_bytes + room)

        answer = compute(model, x, wrt=wrt, returns=names, chunk_size=2, ntk=trace, change=change, method="layerwise")
        for product in names:
            expected = known.expected(product, trace=trace == "trace")
            close(known.seen(product, answer.found[product]), expected)
        product = compute(model, x, wrt=wrt, returns=("norms", "ggn"), vectors=v, change=change, method="reverse").ggn
        close(product.flatten(1), v[:, 0].flatten(1) @ known.expected("ggn"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions_are_multiplied_in_float32(dtype: torch.dtype) -> None:
    model, x, wrt = case("inputs", torch.float32)
    known = dense(model.to(dtype), x.to(dtype), wrt)
    answer = compute(model, x.to(dtype), wrt=wrt, returns=EVERY)
    for product in EVERY:
        found, expected = known.seen(product, answer.found[product]).double(), known.expected(product)
        assert float((found - expected).abs().max()) < 0.05 * float(expected.abs().max())


shapes = st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(2, 5))


@given(shapes, st.integers(1, 7), st.sampled_from(["inputs", "params", ["inputs", "*.bias"]]), st.integers(0, 99))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_shape(shape: tuple[int, int, int], chunk: int, wrt: Any, seed: int) -> None:
    samples, width, classes = shape
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(width, 3), nn.Tanh(), nn.Linear(3, classes)).double()
    x = torch.randn(samples, width).double()
    known = dense(model, x, wrt)
    answer = compute(model, x, wrt=wrt, returns=EVERY, chunk_size=min(chunk, samples))
    for product in EVERY:
        close(known.seen(product, answer.found[product]), known.expected(product))


# Identities --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["params", "inputs", "conv params"])
def test_sums_are_symmetric_to_the_bit_and_positive(name: str) -> None:
    model, x, wrt = case(name, torch.float32)
    known = dense(model, x, wrt)
    answer = compute(model, x, wrt=wrt, returns=(*SUMMED, "norms"), chunk_size=2)
    for product in SUMMED:
        whole = known.matrix(answer.found[product]).double()
        assert torch.equal(whole, whole.T)
        assert float(torch.linalg.eigvalsh(whole).min()) >= -1e-6 * float(whole.diagonal().max())
    trace = known.matrix(answer.gram).double().trace()
    assert float(trace) == pytest.approx(float(answer.norms.double().square().sum()), rel=1e-5)
    assert torch.equal(known.matrix(answer.ggn), known.matrix(answer.fisher))


def test_the_kernel_matrix_is_symmetric_to_the_bit() -> None:
    model, x, wrt = case("params", torch.float32, samples=7)
    for form in ("dense", "factors"):
        found = compute(model, x, wrt=wrt, returns="ntk", chunk_size=2, form=form, method="layerwise").ntk
        assert torch.equal(found, found.permute(1, 0, 3, 2))
    found = compute(model, x, wrt=wrt, returns="ntk", chunk_size=2, ntk="trace").ntk
    assert torch.equal(found, found.T)


def test_a_confident_prediction_keeps_its_curvature() -> None:
    """diag(p) - p p^T as a difference would be rounding noise here."""
    model = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[4.0, 4.0, 4.0], [-4.0, -4.0, -4.0]]))
    x = torch.tensor([[0.9, 0.7, 0.6]])
    known = dense(model, x, "inputs")
    found = compute(model, x, returns="ggn").ggn
    close(found, known.expected("ggn"), torch.float32)
    assert float(known.expected("ggn").max()) < 1e-5


# Vectors -----------------------------------------------------------------------------------------------------------


def draw(known: Dense, lead: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(11)
    return [torch.randn(*lead, *leaf, dtype=dtype) for leaf in known.leaves]


@pytest.mark.parametrize("lead", [(), (5,), (3, 5), (3, 1), (130, 1)], ids=str)
@pytest.mark.parametrize("name", ["params", "inputs", "both", "two outputs"])
@pytest.mark.parametrize("with_blocks", [False, True])
def test_products_with_vectors_never_form_the_matrix(name: str, lead: tuple[int, ...], with_blocks: bool) -> None:
    model, x, wrt = case(name)
    known = dense(model, x, wrt)
    loss = "mse" if len(known.outs) > 1 else "cross_entropy"
    parts = draw(known, lead, torch.float64)
    keys = {"params": ["0.weight", "0.bias", "2.weight", "2.bias"], "both": ["inputs", "0.weight", "2.bias"]}
    vectors = dict(zip(keys[name], parts, strict=True)) if name in keys else parts[0]
    returns = (*SUMMED, "norms") if with_blocks else SUMMED
    answer = compute(model, x, wrt=wrt, returns=returns, vectors=vectors, loss=loss, chunk_size=2)
    k = lead[0] if len(lead) == 2 else 1
    flat = torch.cat([p.reshape(k, -1, math.prod(leaf)) for p, leaf in zip(parts, known.leaves, strict=True)], dim=2)
    flat = flat.expand(k, 5, -1)
    for product in SUMMED:
        h = torch.eye(known.jacobian.shape[1]).double().expand(5, -1, -1) if product == "gram" else known.hessian(loss)
        expected = torch.einsum("nrc,nrs,nsd,knd->kc", known.jacobian, h, known.jacobian, flat)
        found = known.columns(answer.found[product], 1 if len(lead) == 2 else 0)
        close(found.reshape(k, -1), expected)


@pytest.mark.parametrize("method", ["reverse", "backward_loop", "layerwise", "forward"])
def test_products_with_vectors_by_every_method(method: str) -> None:
    model, x, wrt = case("params")
    known = dense(model, x, wrt)
    vectors = dict(zip(["0.weight", "0.bias", "2.weight", "2.bias"], draw(known, (), torch.float64), strict=True))
    returns = ("ggn", "norms") if method == "layerwise" else "ggn"
    answer = compute(model, x, wrt=wrt, returns=returns, vectors=vectors, method=method)
    flat = torch.cat([v.flatten() for v in vectors.values()])
    close(known.columns(answer.ggn, 0), known.expected("ggn") @ flat)


@pytest.mark.parametrize("name", ["params", "inputs"])
def test_many_directions_at_once(name: str) -> None:
    model, x, wrt = case(name, torch.float32)
    known = dense(model, x, wrt)
    parts = draw(known, (300, 5), torch.float32)
    keys = ["0.weight", "0.bias", "2.weight", "2.bias"]
    vectors = dict(zip(keys, parts, strict=True)) if name == "params" else parts[0]
    k = torch.randn(300, 5, 3)
    answer = compute(
        model, x, wrt=wrt, returns=("jvp", "weighted_gradient"), vectors=vectors, weights=k, reduction="none"
    )
    flat = torch.cat([p.flatten(2) for p in parts], dim=2).double()
    close(answer.jvp, torch.einsum("nrc,knc->knr", known.jacobian, flat), torch.float32)
    expected = torch.einsum("knr,nrc->knc", k.double(), known.jacobian)
    found = known.columns(answer.weighted_gradient, 2)
    close(found, expected, torch.float32)
    left = (k.double() * answer.jvp.double()).sum(dim=(1, 2))
    right = (found.double() * flat).sum(dim=(1, 2))
    assert torch.allclose(left, right, rtol=1e-4, atol=1e-4)


# What is not computed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("returns", ["ggn", "gram", "mean_jacobian"])
def test_no_jacobian_is_made_where_passes_do(returns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, wrt = case("params")
    known = dense(model, x, wrt)
    vectors = dict(zip(["0.weight", "0.bias", "2.weight", "2.bias"], draw(known, (), torch.float64), strict=True))
    given = {} if returns == "mean_jacobian" else {"vectors": vectors}
    for name in kernels.NAMES:
        monkeypatch.setattr(kernels.pick(name), "jacobian", None)
    compute(model, x, wrt=wrt, returns=returns, **given)


def test_the_top_singular_values_need_no_jacobian(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(160, 40), nn.Tanh(), nn.Linear(40, 150)).double()
    x = torch.randn(2, 160).double()
    expected = dense(model, x, "inputs").expected("singular_values")[:, :2]
    for name in kernels.NAMES:
        monkeypatch.setattr(kernels.pick(name), "jacobian", None)
    close(compute(model, x, returns="singular_values", top_k=2).singular_values, expected)
    monkeypatch.undo()
    # Beside another product its Jacobian is there anyway.
    close(compute(model, x, returns=("singular_values", "norms"), top_k=2).singular_values, expected)


def test_a_product_holds_one_chunk_at_a_time() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    x = torch.randn(64, 64)
    whole = 64 * 8 * sum(p.numel() for p in model.parameters()) * 4
    for returns in ("norms", "ntk"):
        request = make_request(wrt="params", returns=returns, chunk_size=2, form="dense", memory_budget="8MiB")
        prepared = prepare(model, x, request)
        tight = dataclasses.replace(prepared, plan=dataclasses.replace(prepared.plan, budget_bytes=0))
        peak = memory.measure(lambda job=tight: run_shard(job, job.plan.shard(0)), torch.device("cpu"))
        assert peak < whole / 4, returns


def test_a_chunk_that_comes_again_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, wrt = case("params", samples=6)
    known = dense(model, x, wrt)
    returns = ("weighted_gradient", "mean_jacobian", "gram", "ntk", "norms")
    request = make_request(wrt=wrt, returns=returns, weights=torch.ones(3).double(), chunk_size=4, method="layerwise")
    prepared = prepare(model, x, request)
    calls = iter([True, False, True, *[False] * 99])
    squares = spectrum.squares

    def sometimes(blocks: Any) -> Tensor:
        if next(calls):
            raise torch.OutOfMemoryError("out of memory")
        return squares(blocks)

    monkeypatch.setattr(spectrum, "squares", sometimes)
    result = run_shard(prepared, prepared.plan.shard(0))
    assert result.facts["backoffs"] == 2
    again = compute(model, x, wrt=wrt, returns=returns, weights=torch.ones(3).double())
    for array in prepared.plan.arrays:
        other = next(a for a in again.plan.arrays if a.key == array.key)
        close(result.blocks[array.key], again.shards[0].blocks[other.key])
    close(result.blocks["ntk"], known.expected("ntk"))


def test_long_work_stops_when_the_job_is_cancelled() -> None:
    model, x, wrt = case("params", samples=6)
    prepared = prepare(model, x, make_request(wrt=wrt, returns="ntk", chunk_size=1))
    asked = iter([False] * 8 + [True] * 99)
    tight = dataclasses.replace(prepared, plan=dataclasses.replace(prepared.plan, budget_bytes=0))
    with pytest.raises(JobError, match="cancelled"):
        run_shard(tight, tight.plan.shard(0), cancelled=lambda: next(asked))


@pytest.mark.parametrize("wide", [1, 4, 128])
@pytest.mark.parametrize(("limit", "most"), [(1 << 30, 0), (3 * 480, 6), (0, 15)])
def test_the_kernel_matrix_computes_few_blocks_again(
    limit: int, most: int, wide: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products.band, "WIDE", wide)
    torch.manual_seed(0)
    blocks = torch.randn(6, 3, 20).double()
    out = torch.empty(6, 6, 3, 3).double()
    calls: list[Unit] = []

    def again(unit: Unit) -> list[Tensor]:
        calls.append(unit)
        return [blocks[unit.start : unit.stop]]

    prepared = prepare(*case("inputs", samples=6)[:2], make_request(chunk_size=1))
    band = Band(out, prepared.plan.shard(0), 6, 1, [range(3)], False, limit, 1 << 20, again, lambda: None)
    for i in range(6):
        band.add(Unit(i, i + 1, range(3)), [blocks[i : i + 1]])
    band.finish()
    assert len(calls) <= most
    close(out, torch.einsum("nrc,msc->nmrs", blocks, blocks))


# Singular values and determinants ----------------------------------------------------------------------------------


def spectra(rows: int, columns: int, values: Tensor) -> Tensor:
    """Two matrices with these singular values."""
    rank = min(rows, columns)
    left = torch.linalg.qr(torch.randn(2, rows, rank).double()).Q
    right = torch.linalg.qr(torch.randn(2, columns, rank).double()).Q
    return (left * values.double()) @ right.mT


SPECTRA = {
    "decaying": lambda n: torch.exp(-torch.arange(n) / 4),
    "flat": torch.ones,
    "rank three": lambda n: (torch.arange(n) < 3).double(),
    "steep": lambda n: torch.where(torch.arange(n) < 2, 1.0, 1e-6),
    "linear": lambda n: 1 - torch.arange(n) / (2 * n),
    "zero": torch.zeros,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (70, 70), (40, 1), (1, 40), (1, 1), (12, 300)], ids=str)
@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("k", [1, 4, 1000])
def test_leading_singular_values(kind: str, shape: tuple[int, int], k: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    k = min(k, *shape)
    matrix = spectra(*shape, SPECTRA[kind](min(shape))).to(dtype)
    expected = torch.linalg.svdvals(matrix.double())
    unit = torch.finfo(dtype).eps
    scale = float(expected.max())
    assert float((spectrum.values(matrix).double() - expected).abs().max()) <= 32 * unit * scale
    found, good = krylov.largest(
        lambda v: matrix @ v.to(dtype),
        lambda u: matrix.mT @ u.to(dtype),
        tuple(matrix.shape),
        k,
        matrix.device,
        unit,
        0,
    )
    # The bound that ends it takes the values left for what they seem: a small factor beyond the promise.
    assert bool(good.all())
    assert float((found.double() - expected[:, :k]).abs().max()) <= 4 * krylov.UNITS * unit * scale


def test_singular_values_stand_for_samples_that_are_finite() -> None:
    def model(x: Tensor) -> Tensor:
        return torch.stack([x.sum(dim=1).sqrt(), x[:, 0] ** 2], dim=1)

    x = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [4.0, 0.0, 1.0]]).double()
    answer = compute(model, x, returns=("singular_values", "norms"))
    assert answer.singular_values.isfinite().all(dim=1).tolist() == [True, False, True]
    assert answer.norms.isfinite().tolist() == [True, False, True]


def test_top_values_stand_for_samples_that_are_finite() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(3, 130, 140).double()
    expected = torch.linalg.svdvals(matrix)[:, :1]
    matrix[1, 3, 4] = torch.nan
    found = krylov.of_dense(matrix, 1, 0)
    assert found.isnan().flatten().tolist() == [False, True, False]
    close(found[::2], expected[::2])


def test_top_k_beyond_the_rank_gives_the_rank() -> None:
    model, x, wrt = case("inputs")
    answer = compute(model, x, wrt=wrt, returns="singular_values", top_k=50)
    assert answer.singular_values.shape == (5, 3)
    close(answer.singular_values, dense(model, x, wrt).expected("singular_values"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_determinants(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)).to(dtype)
    x = torch.randn(4, 5, dtype=dtype)
    close(compute(model, x, returns="logabsdet").logabsdet, dense(model, x, "inputs").expected("logabsdet"), dtype)


def test_a_log_determinant_is_taken_where_the_determinant_overflows() -> None:
    x = torch.randn(2, 60)
    found = compute(lambda x: x * 1e-3, x, returns="logabsdet").logabsdet
    assert torch.allclose(found, torch.full((2,), 60 * math.log(1e-3)), rtol=1e-5)


def test_a_singular_jacobian_has_minus_infinity() -> None:
    found = compute(lambda x: torch.stack([x[:, 0], x[:, 0]], dim=1), torch.randn(3, 2), returns="logabsdet").logabsdet
    assert (found == -math.inf).all()


def test_outputs_of_no_numbers() -> None:
    model, x = (lambda x: x[:, :0] * 2), torch.randn(3, 4)
    names = ("mean_jacobian", "norms", "singular_values", "gram", "ntk")
    answer = compute(model, x, returns=names)
    assert answer.mean_jacobian.shape == (0, 4)
    assert answer.norms.tolist() == [0, 0, 0]
    assert answer.singular_values.shape == (3, 0)
    assert answer.gram.tolist() == torch.zeros(4, 4).tolist()
    assert answer.ntk.shape == (3, 3, 0, 0)
    assert compute(model, x, returns="ntk", ntk="trace").ntk.tolist() == torch.zeros(3, 3).tolist()


# Structure and refusals --------------------------------------------------------------------------------------------


def test_results_have_the_structure_of_what_is_differentiated() -> None:
    model, x, wrt = case("both")
    answer = compute(model, x, wrt=wrt, returns=("gram", "mean_jacobian"))
    assert set(answer.gram) == {"inputs", "0.weight", "2.bias"}
    assert answer.gram["inputs"]["0.weight"].shape == (4, 6, 4)
    assert answer.mean_jacobian["0.weight"].shape == (3, 6, 4)
    model, x, _ = case("two outputs")
    answer = compute(model, x, returns=("gram", "mean_jacobian"))
    assert answer.gram.shape == (4, 4)
    assert {key: tuple(value.shape) for key, value in answer.mean_jacobian.items()} == {"a": (3, 4), "b": (1, 2, 4)}


def refused(error: type[Exception], *parts: str, **fields: Any) -> None:
    name = fields.pop("case")
    model, x, wrt = case(name)
    with pytest.raises(error) as told:
        compute(model, x, **{"wrt": wrt, **fields})
    for part in parts:
        assert part in str(told.value)


def test_refusals_name_the_rule_the_value_and_the_way_out() -> None:
    refused(RequestError, "square", "3 rows by 4 columns", "same size", case="inputs", returns="logabsdet")
    refused(RequestError, "loss", "one output", "a, b", "outputs=NAME", case="two outputs", returns="ggn")
    refused(RequestError, "loss", "all classes", "2 chosen", case="inputs", returns="fisher", outputs=[0, 2])
    refused(BudgetError, "vectors=", "KiB", case="conv params", returns="gram", memory_budget=20_000)
    with pytest.raises(RequestError, match="two or more classes"):
        compute(lambda x: x.sum(dim=1), torch.randn(3, 2), returns="ggn")


def test_an_output_may_be_chosen_for_the_loss() -> None:
    model, x, _ = case("two outputs")
    found = compute(model, x, returns="ggn", outputs="a").ggn
    known = dense(lambda x: model(x)["a"], x, "inputs")
    close(found, known.expected("ggn"))


def test_a_matrix_that_cannot_fit_is_refused_before_the_model_is_differentiated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x, wrt = case("conv params")
    for name in kernels.NAMES:
        monkeypatch.setattr(kernels.pick(name), "jacobian", None)
        monkeypatch.setattr(kernels.pick(name), "vjp", None)
    with pytest.raises(BudgetError, match="a budget of"):
        compute(model, x, wrt=wrt, returns="ggn", memory_budget=20_000)


def test_traces_of_factors_are_sums_over_rows() -> None:
    model, x, wrt = case("params")
    problem = prepare(model, x, make_request(wrt=wrt)).problem
    with problem.session():
        blocks = kernels.pick("layerwise").jacobian(problem, [x], form="factors")
    full = pairs.products(blocks, blocks).diagonal(dim1=2, dim2=3).sum(dim=2)
    close(pairs.traces(blocks, blocks), full)

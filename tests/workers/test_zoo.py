"""The zoo: every model by every method against the brute-force reference."""

from __future__ import annotations

import pytest
import torch
from jacray_workers.kernels import NAMES, lacks
from jacray_workers.planning import race
from torch.utils import _pytree as pytree

from tests import reference
from tests.zoo import ENTRIES, FAMILIES, table
from tests.zoo.table import SEED, Bench, label

ROWS = [(entry, wrt) for entry in ENTRIES.values() for wrt in entry.wrt]
# One or two of each kind, for every explicit method in the quick run; the others are slow for their number.
QUICK = frozenset(
    (
        "linear",
        "mlp_relu",
        "mlp_float64",
        "mlp_bfloat16",
        "autoencoder",
        "mlp_residual_layernorm",
        "tied_two_names",
        "unused_parameters",
        "cnn",
        "resnet",
        "cnn_transposed",
        "encoder_padded",
        "causal_decoder",
        "rotary_block",
        "lstm",
        "cells_in_a_loop",
        "message_passing",
        "normalizing_flow",
        "radial_basis",
        "fourier_operator",
        "hamiltonian_autograd",
        "leapfrog",
        "dict_in_dict_out",
        "nested_trees",
        "zero_size_output",
        "scalar_samples",
        "constant_outputs",
        "custom_function_old",
        "checkpoint_reentrant",
        "in_place",
        "writes_into_input",
        "item_call",
        "branch_on_batch",
        "dropout_training",
        "batchnorm_training",
        "counts_calls",
        "one_sample_only",
    )
)


def parameters(quick):
    """A parameter per row; slow where the entry is, or is not among the quick ones."""
    found = []
    for entry, wrt in ROWS:
        slow = entry.slow or (quick is not None and entry.name not in quick)
        found.append(pytest.param(entry, wrt, id=f"{entry.name}-{label(wrt)}", marks=pytest.mark.slow if slow else ()))
    return pytest.mark.parametrize(("entry", "wrt"), found)


@pytest.fixture(scope="module", autouse=True)
def short_trials():
    """How fast a method is does not matter here, so no time is spent on finding out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(race, "TRIAL_SECONDS", 0.0)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@parameters(None)
def test_auto(entry, wrt):
    cell = Bench.of(entry, wrt).cell("auto")
    assert not cell.wrong
    assert bool(cell.refused) is entry.couples


@parameters(QUICK)
def test_every_method(entry, wrt):
    bench = Bench.of(entry, wrt)
    cells = [bench.cell(method) for method in NAMES]
    assert not [f"{cell.method}: {cell.wrong}" for cell in cells if cell.wrong]
    # Somebody must have been right, or this test holds whatever the methods do.
    assert entry.couples or any(not cell.refused for cell in cells)


@parameters(QUICK)
def test_outputs_and_products(entry, wrt):
    """Outputs, weighted gradients and JVPs beside the Jacobian agree with what the reference's Jacobian gives."""
    if entry.couples:
        pytest.skip("has no per-sample answer")
    bench = Bench.of(entry, wrt)
    prepared = bench.ask("auto", returns="outputs").prepared
    generator = torch.Generator().manual_seed(1)

    def draw(shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    samples = prepared.plan.samples
    ks = [draw((samples, *out.shape)) for out in prepared.problem.outs]
    vs = [draw((samples, *leaf.shape) if leaf.side != "param" else leaf.shape) for leaf in prepared.problem.leaves]
    returns = ["outputs", "jacobian", "weighted_gradient", *(() if "jvp" in entry.defeats else ("jvp",))]
    found = bench.ask(
        "auto",
        returns=returns,
        weights=pytree.tree_map(lambda o: None if o is None else ks[o], prepared.problem.out_tree),
        vectors=pytree.tree_map(lambda i: None if i is None else vs[i], prepared.problem.wrt_tree),
    )
    blocks = _by_place(prepared.problem, bench.expected)
    pulled = {}
    pushed = {}
    for (o, i), block in blocks.items():
        out, leaf = prepared.problem.outs[o], prepared.problem.leaves[i]
        rows = block.reshape(samples, len(out.rows), leaf.size)
        k = ks[o].reshape(samples, -1)
        v = vs[i].reshape(-1, leaf.size).expand(samples, -1)
        gradient = torch.einsum("br,brc->bc", k, rows).reshape(samples, *leaf.shape)
        gradient = gradient.sum(0) if leaf.side == "param" else gradient
        pulled[i] = pulled.get(i, 0.0) + gradient
        pushed[o] = pushed.get(o, 0.0) + torch.einsum("brc,bc->br", rows, v).reshape(samples, *out.shape)
    allowed = 10 * bench.allowed
    for name, expected in (("weighted_gradient", pulled), ("jvp", pushed)):
        if name not in returns:
            continue
        tree = prepared.problem.wrt_tree if name == "weighted_gradient" else prepared.problem.out_tree
        wanted = pytree.tree_map(lambda i, e=expected: None if i is None else e[i], tree)
        assert reference.worst(getattr(found, name), wanted) < allowed, name
    assert reference.worst(found.jacobian, bench.expected) < bench.allowed
    plain = getattr(bench.model, "_orig_mod", bench.model)
    with entry.quiet():
        seed = SEED if entry.training else None
        y = reference.outputs(plain, bench.inputs, spread=entry.spread, training=entry.training, seed=seed)
    assert reference.worst(found.outputs, y) < allowed


def _by_place(problem, expected):
    """The reference's blocks by (output, leaf)."""
    slots = pytree.tree_leaves(problem.out_tree, is_leaf=_none)
    places = pytree.tree_leaves(problem.wrt_tree, is_leaf=_none)
    blocks = pytree.tree_leaves(expected, is_leaf=_none)
    found = {}
    at = 0
    for slot in slots:
        if slot is None:
            # An output without derivative is one None in the reference.
            at += 1
            continue
        for place in places:
            if place is not None:
                found[slot, place] = blocks[at]
            at += 1
    assert at == len(blocks)
    return found


def _none(value):
    return value is None


def test_the_zoo_is_large_and_of_every_kind():
    assert len(ENTRIES) >= 60
    assert {entry.family for entry in ENTRIES.values()} == {family.__name__.rsplit(".", 1)[1] for family in FAMILIES}
    assert len({entry.about for entry in ENTRIES.values()}) > 100
    assert set(ENTRIES) >= QUICK


def test_builders_give_the_same_model_every_time():
    for name in ("mlp_tanh", "resnet", "causal_decoder"):
        (a, x), (b, y) = ENTRIES[name].make(), ENTRIES[name].make()
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
        assert torch.equal(x, y)


def test_the_table(capsys):
    assert table.main(["linear", "--methods", "auto,reverse,chain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["model", "wrt", "auto", "reverse", "chain"]
    assert lines[1].split()[:2] == ["linear", "inputs"]
    assert "1 models, 6 cells" in lines[4]
    assert any("refused linear wrt params by chain: method: chain cannot do this work" in line for line in lines)


def test_the_table_finds_a_wrong_number(monkeypatch, capsys):
    from jacray_workers.kernels import reverse

    right = reverse.jacobian

    def off(problem, batch, rows=None, into=None, width=None):
        blocks = [block * 1.001 for block in right(problem, batch, rows, None, width)]
        if into is None:
            return blocks
        reverse.deliver(blocks, into)
        return into

    monkeypatch.setattr(reverse, "jacobian", off)
    assert table.main(["linear", "--methods", "reverse"]) == 1
    assert "WRONG linear wrt inputs by reverse: off by 1.0e-03" in capsys.readouterr().out


def test_every_method_has_a_short_name_and_known_passes():
    assert set(table.SHORT) >= set(NAMES)
    assert all(lacks(name) <= {"jvp", "vjp"} for name in NAMES)

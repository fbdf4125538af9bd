"""The engine from a request to results: known answers, every shape of request, and numbers that do not move."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jacray_workers.chain import chaining
from jacray_workers.engine import assemble, combine, prepare, run_shard
from jacray_workers.errors import InputError, JobError
from jacray_workers.kernels import NAMES
from jacray_workers.request import make_request
from torch import nn

from tests import reference
from tests.contraction import by_place, pulled, pushed, rows_of, tree
from tests.door import compute
from tests.known_answers import CASES
from tests.workers.nets import drawn

EXAMPLES = settings(max_examples=10, deadline=None, derandomize=True)
SERVING = [name for name in NAMES if name != "chain"]


@pytest.fixture(autouse=True, scope="module")
def cuts_always_pay():
    """`chain` refuses nets as small as these because nothing is gained; here it has to be right, not fast."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chaining, "GAIN", 0.0)
        patch.setattr(chaining, "SAVED", -float("inf"))
        yield


def net(out: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, out))


@pytest.mark.parametrize("method", ["auto", *SERVING])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_known_answers(case, method):
    found = compute(case.model, case.inputs, method=method, **case.request)
    case.check(lambda name: getattr(found, name))


@pytest.mark.parametrize("method", ["auto", *SERVING])
@EXAMPLES
@given(data=st.data())
def test_every_request_against_the_reference(method, data):
    case = data.draw(drawn())
    expected = reference.jacobian(case.net, case.inputs, case.wrt)
    probe = compute(case.net, case.inputs, wrt=case.wrt, returns="outputs").prepared
    problem, samples = probe.problem, probe.plan.samples
    k = data.draw(st.sampled_from([0, 1, 2]), label="rank of the weights")
    v = data.draw(st.sampled_from([0, 1, 2]), label="rank of the vectors")
    count = data.draw(st.integers(1, 3), label="K")
    reduction = data.draw(st.sampled_from(["sum", "none"]))

    def draw(shape, rank):
        return torch.randn(((), (samples,), (count, samples))[rank] + tuple(shape))

    def full(given_part, shape, rank):
        return given_part.expand(count if rank == 2 else 1, samples, *shape)

    ks = [draw(out.shape, k).to(problem.dtype) for out in problem.outs]
    vs = [draw(leaf.shape, v).to(leaf.dtype) for leaf in problem.leaves]
    found = compute(
        case.net,
        case.inputs,
        wrt=case.wrt,
        method=method,
        returns=["jacobian", "weighted_gradient", "jvp", "outputs"],
        weights=tree(problem.out_tree, ks),
        vectors=tree(problem.wrt_tree, vs),
        reduction=reduction,
        chunk_size=data.draw(st.sampled_from([None, 1, 2, 9]), label="chunk"),
        workers=data.draw(st.sampled_from([1, 2]), label="workers"),
        form=data.draw(st.sampled_from(["auto", "dense", "factors"])),
    )
    rows = rows_of(problem, by_place(problem, expected))
    gradient = pulled(problem, rows, [full(t, o.shape, k) for t, o in zip(ks, problem.outs, strict=True)], reduction)
    push = pushed(problem, rows, [full(t, leaf.shape, v) for t, leaf in zip(vs, problem.leaves, strict=True)])
    close(found.jacobian, expected, case)
    close(
        found.weighted_gradient, tree(problem.wrt_tree, {i: t if k == 2 else t[0] for i, t in gradient.items()}), case
    )
    close(found.jvp, tree(problem.out_tree, {o: t if v == 2 else t[0] for o, t in push.items()}), case)
    close(found.outputs, reference.outputs(case.net, case.inputs), case)


def close(found, expected, case):
    mine = [t for t in torch.utils._pytree.tree_leaves(found) if t is not None]
    theirs = [t for t in torch.utils._pytree.tree_leaves(expected) if t is not None]
    assert len(mine) == len(theirs)
    for a, e in zip(mine, theirs, strict=True):
        a = a.dense() if hasattr(a, "dense") else a  # noqa: PLW2901 - a block is looked at as the tensor it stands for
        assert a.shape == e.shape
        if e.numel():
            error = float((a.double() - e).abs().max())
            # Sums over samples and columns add their terms' errors up.
            assert error <= 4 * case.tolerance * max(float(e.abs().max()), case.floor), error


@pytest.mark.parametrize("method", ["auto", *SERVING])
@EXAMPLES
@given(data=st.data())
def test_a_choice_of_outputs(method, data):
    case = data.draw(drawn(dtypes=(torch.float64, torch.float32)))
    probe = compute(case.net, case.inputs, wrt=case.wrt, returns="outputs").prepared.problem
    names = [out.key for out in probe.outs]
    sizes = [len(out.rows) for out in probe.outs]
    assume(any(sizes))
    chosen = data.draw(st.integers(0, len(names) - 1))
    assume(sizes[chosen])
    indices = data.draw(st.lists(st.integers(-sizes[chosen], sizes[chosen] - 1), min_size=1, max_size=3))
    choice = {names[chosen]: indices} if names[chosen] else indices
    found = compute(case.net, case.inputs, wrt=case.wrt, outputs=choice, method=method, returns=["jacobian", "outputs"])
    problem = found.prepared.problem
    blocks = by_place(probe, reference.jacobian(case.net, case.inputs, case.wrt))
    for i, leaf in enumerate(problem.leaves):
        block = blocks[chosen, i]
        flat = block.reshape(block.shape[0], sizes[chosen], *leaf.shape)[:, indices]
        mine = [t for t in torch.utils._pytree.tree_leaves(found.jacobian) if t is not None][i]
        close(mine, flat, case)


@pytest.mark.parametrize("method", SERVING)
@pytest.mark.parametrize("wrt", ["inputs", "params"])
def test_chunks_shards_and_workers_change_rounding_only(method, wrt):
    model, x = net(), torch.randn(13, 4)
    k, v = torch.randn(13, 3), None
    fields = {"wrt": wrt, "method": method, "weights": k, "vectors": v}
    fields["returns"] = ["jacobian", "weighted_gradient", "outputs", "norms", "gram"]
    whole = compute(model, x, **fields)
    for chunk in (1, 2, 5, 13):
        for workers in (1, 3):
            other = compute(model, x, chunk_size=chunk, workers=workers, **fields)
            assert other.plan.chunk_size == chunk
            assert sum(s.stop - s.start for s in other.plan.shards()) == 13
            for name in fields["returns"]:
                assert reference.worst(other.found[name], double(whole.found[name])) < 1e-5, name


def double(found):
    return torch.utils._pytree.tree_map(lambda t: (t.dense() if hasattr(t, "dense") else t).double(), found)


@pytest.mark.parametrize("method", SERVING)
@pytest.mark.parametrize("wrt", ["inputs", "params"])
def test_the_same_plan_gives_the_same_bits(method, wrt):
    model, x = net(), torch.randn(7, 4)
    first = compute(model, x, wrt=wrt, method=method, chunk_size=3)
    again = compute(model, x, wrt=wrt, method=method, chunk_size=3, plan=first.plan)
    assert again.plan is first.plan
    assert torch.utils._pytree.tree_all(
        lambda pair: torch.equal(*pair),
        torch.utils._pytree.tree_map(lambda a, b: [(_plain(a), _plain(b))], first.jacobian, again.jacobian),
        is_leaf=lambda t: isinstance(t, tuple),
    )


def _plain(block):
    return block.dense() if hasattr(block, "dense") else block


@pytest.mark.parametrize("method", SERVING)
def test_the_order_of_samples_permutes_the_results(method):
    model, x = net(), torch.randn(9, 4)
    order = torch.randperm(9)
    k = torch.randn(9, 3)
    fields = {"method": method, "returns": ["jacobian", "weighted_gradient", "norms"]}
    straight = compute(model, x, weights=k, chunk_size=4, **fields)
    mixed = compute(model, x[order], weights=k[order], chunk_size=4, **fields)
    for name in fields["returns"]:
        torch.testing.assert_close(mixed.found[name], straight.found[name][order])


@pytest.mark.parametrize("method", SERVING)
def test_a_sample_alone_is_the_sample_among_others(method):
    model, x = net(), torch.randn(5, 4)
    among = compute(model, x, wrt="params", method=method).jacobian
    for i in range(5):
        alone = compute(model, x[i : i + 1], wrt="params", method=method).jacobian
        for name in among:
            torch.testing.assert_close(_plain(alone[name])[0], _plain(among[name])[i])


@pytest.mark.parametrize("method", SERVING)
def test_the_model_is_its_own_oracle(method):
    """output = J input for a linear model without a bias: the answer is its weight, by construction."""
    weight = torch.randn(3, 4)
    model = nn.Linear(4, 3, bias=False)
    model.weight.data.copy_(weight)
    found = compute(model, torch.randn(6, 4), method=method).jacobian
    torch.testing.assert_close(found, weight.expand(6, 3, 4))


@pytest.mark.parametrize("method", SERVING)
def test_the_chain_rule_holds_between_models(method):
    """J(f after g) = J_f J_g."""
    torch.manual_seed(3)
    f = nn.Sequential(nn.Linear(5, 3), nn.Tanh()).double()
    g = nn.Sequential(nn.Linear(4, 5), nn.Softplus()).double()
    x = torch.randn(4, 4, dtype=torch.float64)
    both = compute(nn.Sequential(g, f), x, method=method).jacobian
    outer, inner = compute(f, g(x).detach(), method=method).jacobian, compute(g, x, method=method).jacobian
    torch.testing.assert_close(both, outer @ inner)


@pytest.mark.parametrize("method", SERVING)
def test_a_hidden_output_and_a_hidden_input_meet(method):
    """From the input to a hidden point, and from there to the end: their product is the whole."""
    model, x = net().double(), torch.randn(4, 4, dtype=torch.float64)
    first = compute(model, x, outputs={"module": "1"}, method=method).jacobian
    last = compute(model, x, wrt={"module": "1"}, method=method).jacobian
    torch.testing.assert_close(last @ first, compute(model, x, method=method).jacobian)


def test_hidden_outputs_come_as_they_passed():
    model, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)), torch.randn(3, 4)
    found = compute(model, x, outputs={"module": "0"}, returns=["outputs", "jacobian"])
    torch.testing.assert_close(found.outputs, model[0](x).detach())
    torch.testing.assert_close(found.jacobian, model[0].weight.detach().expand(3, 5, 4))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_weighted_gradients_never_build_the_jacobian(reduction, monkeypatch):
    from jacray_workers.kernels import backward_loop, forward, reverse

    for kernel in (backward_loop, forward, reverse):
        monkeypatch.setattr(kernel, "jacobian", None)
    model, x, k = net(), torch.randn(5, 4), torch.randn(5, 3)
    found = compute(model, x, wrt="params", returns="weighted_gradient", weights=k, reduction=reduction)
    model(x).backward(gradient=k)
    for name, parameter in model.named_parameters():
        mine = found.weighted_gradient[name]
        torch.testing.assert_close(mine.sum(0) if reduction == "none" else mine, parameter.grad)


def test_structures_of_results():
    class Two(nn.Module):
        def forward(self, a, b):
            return {"sum": a + b, "both": (a * b, b.long())}

    a, b = torch.randn(3, 2), torch.randn(3, 2)
    found = compute(Two(), {"a": a, "b": b}).jacobian
    assert set(found) == {"sum", "both"}
    assert set(found["sum"]) == {"a", "b"}
    assert found["sum"]["a"].shape == (3, 2, 2)
    assert found["both"][1] is None
    torch.testing.assert_close(found["both"][0]["a"], torch.diag_embed(b))
    one = compute(Two(), {"a": a, "b": b}, wrt="inputs.a", outputs="sum").jacobian["sum"]
    assert torch.equal(one, torch.eye(2).expand(3, 2, 2))
    several = compute(net(), a.repeat(1, 2), wrt=["inputs", "0.*"]).jacobian
    assert set(several) == {"inputs", "0.weight", "0.bias"}


def test_dtypes_of_results():
    x = torch.randn(3, 4)
    assert compute(net(), x).jacobian.dtype == torch.float32
    assert compute(net(), x, dtype="float64").jacobian.dtype == torch.float64
    # Numpy has no bfloat16: results are kept in float32.
    assert compute(net(), x, dtype="bfloat16").jacobian.dtype == torch.float32
    wide = compute(net(), x, dtype="float64").jacobian
    assert float((compute(net(), x).jacobian - wide).abs().max()) < 1e-6
    assert float((compute(net(), x, dtype="bfloat16").jacobian - wide).abs().max()) < 0.05


def test_results_hold_no_graph_and_own_their_memory():
    model, x = net(), torch.randn(3, 4, requires_grad=True)
    found = compute(model, x, returns=["jacobian", "outputs"])
    assert not found.jacobian.requires_grad
    assert not found.outputs.requires_grad
    kept = found.jacobian.clone()
    compute(model, x * 2, returns=["jacobian", "outputs"])
    assert torch.equal(kept, found.jacobian)


def test_changed_parameters_are_seen_by_the_next_call():
    model, x = net(), torch.randn(3, 4)
    before = compute(model, x).jacobian
    with torch.no_grad():
        model[0].weight.mul_(2.0)
    torch.testing.assert_close(compute(model, x).jacobian, reference_of(model, x))
    assert not torch.equal(before, compute(model, x).jacobian)
    model[2] = nn.Linear(6, 5)
    assert compute(model, x).jacobian.shape == (3, 5, 4)


def test_changed_structure_is_seen_by_the_next_call():
    """What is kept between calls must not outlive a change of anything that a model looks at."""

    class Switch(nn.Module):
        def __init__(self):
            super().__init__()
            self.power, self.extra = 2, {"scale": 1.0}

        def forward(self, x):
            return x**self.power * self.extra["scale"]

    model, x = Switch(), torch.tensor([[2.0]])
    assert compute(model, x).jacobian.item() == 4.0
    model.power = 3
    assert compute(model, x).jacobian.item() == 12.0
    model.extra["scale"] = 2.0
    assert compute(model, x).jacobian.item() == 24.0
    model.register_forward_hook(lambda _m, _a, y: y * 10)
    assert compute(model, x).jacobian.item() == 240.0


def test_a_function_that_closes_over_a_number():
    x = torch.tensor([[2.0]])
    for power in (2, 3, 4):
        assert compute(lambda t, p=power: t**p, x).jacobian.item() == power * 2.0 ** (power - 1)

        def closed(t):
            return t**power  # noqa: B023 - the cell is what is looked at

        assert compute(closed, x).jacobian.item() == power * 2.0 ** (power - 1)


def reference_of(model, x):
    return reference.jacobian(model, x).float()


# ------------------------------------------------------------------------------------------------ shards by hand


def parts(samples=10, workers=2, **fields):
    prepared = prepare(net(), torch.randn(samples, 4), make_request(**fields), workers=workers)
    return prepared, [run_shard(prepared, shard) for shard in prepared.plan.shards()]


def test_shards_come_together_in_any_order():
    prepared, results = parts(wrt="params", returns=["jacobian", "gram"], chunk_size=2)
    assert len(results) > 2
    straight = combine(prepared.plan, results)
    backwards = combine(prepared.plan, results[::-1])
    for key, value in straight.items():
        assert torch.equal(_plain(value), _plain(backwards[key])), key


@pytest.mark.parametrize("spoil", [lambda r: r[:-1], lambda r: [*r, r[0]], lambda r: [r[0], r[0], *r[2:]]])
def test_missing_and_repeated_shards_are_refused(spoil):
    prepared, results = parts()
    with pytest.raises(InputError, match="must hold every shard exactly once"):
        combine(prepared.plan, spoil(results))


def test_shards_write_into_buffers_they_are_given():
    x = torch.randn(6, 4)
    prepared = prepare(net(), x, make_request(form="dense", returns=["jacobian", "outputs"]))
    whole = {"jacobian": torch.full((6, 3, 4), 9.0), "outputs": torch.full((6, 3), 9.0)}
    for shard in prepared.plan.shards():
        views = {key: value[shard.start : shard.stop] for key, value in whole.items()}
        result = run_shard(prepared, shard, into=views)
        assert all(result.blocks[key].data_ptr() == views[key].data_ptr() for key in whole)
    torch.testing.assert_close(whole["jacobian"], compute(net(), x).jacobian)
    torch.testing.assert_close(whole["outputs"], net()(x).detach())


def test_a_shard_can_be_cancelled_between_chunks():
    prepared = prepare(net(), torch.randn(8, 4), make_request(chunk_size=2))
    done = []
    with pytest.raises(JobError) as caught:
        run_shard(prepared, prepared.plan.shard(0), cancelled=lambda: len(done) >= 2, on_samples=done.append)
    assert done == [2, 2]
    assert caught.value.rule == "was cancelled"
    assert "after 4 samples" in str(caught.value.value)


def test_progress_counts_every_sample_once():
    prepared = prepare(net(), torch.randn(11, 4), make_request(chunk_size=4), workers=3)
    done = []
    for shard in prepared.plan.shards():
        run_shard(prepared, shard, on_samples=done.append)
    assert sum(done) == 11


def test_facts_of_a_shard():
    prepared, results = parts()
    assert {r.shard.index for r in results} == set(range(prepared.plan.shard_count))
    assert all(r.seconds >= 0 and r.facts["threads"] >= 1 and r.chunk_size >= 1 for r in results)
    assert all("backoffs" not in r.facts for r in results)


def test_assembled_results_have_every_return_in_order():
    names = ["norms", "jacobian", "outputs", "gram", "mean_jacobian"]
    prepared, results = parts(returns=names)
    assert list(assemble(prepared, combine(prepared.plan, results))) == names


def test_blocks_of_parameters_have_methods_unless_dense_is_asked():
    model, x = net(), torch.randn(4, 4)
    auto = compute(model, x, wrt="params", form="auto").jacobian
    dense = compute(model, x, wrt="params", form="dense").jacobian
    factors = compute(model, x, wrt="params", form="factors", method="layerwise").jacobian
    for name, value in dense.items():
        assert type(value) is torch.Tensor
        for block in (auto[name], factors[name]):
            assert block.shape == value.shape
            torch.testing.assert_close(block.dense(), value)


def test_plans_are_made_for_the_shapes_they_are_used_with():
    first = compute(net(), torch.randn(5, 4))
    other = dataclasses.replace(first.plan, samples=6, shard_size=6)
    with pytest.raises(InputError, match="must have the 6 samples"):
        compute(net(), torch.randn(5, 4), plan=other)

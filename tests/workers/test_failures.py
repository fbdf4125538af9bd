"""What defeats vmap and jacrev, row by row: `auto` gives the right answer or says why not, and the plan tells which
method failed on what; an explicit method that cannot work is an error with its reason and the method that would."""

from __future__ import annotations

import contextlib
import warnings

import numpy as np
import pytest
import torch
from jacray_workers.engine import prepare
from jacray_workers.errors import CoupledSamplesError, InputError, MethodError, ModelError
from jacray_workers.kernels import NAMES
from jacray_workers.request import make_request
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from tests import reference
from tests.door import compute
from tests.zoo import ENTRIES
from tests.zoo.attention import EMBEDDED
from tests.zoo.awkward import CubeOld, Custom

VMAP = ("reverse", "forward")
X = torch.linspace(-1.0, 1.3, 12).reshape(3, 4)


def right(model, inputs, allowed=1e-4, **fields):
    """`auto` gives the right answer; its plan is returned."""
    found = compute(model, inputs, **fields)
    wrt = fields.get("wrt", "inputs")
    seed = fields.get("seed", 0) if fields.get("training") else None
    expected = reference.jacobian(model, inputs, wrt, training=fields.get("training", False), seed=seed)
    assert reference.worst(found.jacobian, expected) < allowed
    return found.plan


def refused(model, inputs, method, **fields) -> MethodError:
    """The explicit method is refused; the reason is in the rule, and the way out names a method that can."""
    with pytest.raises(MethodError) as caught:
        compute(model, inputs, method=method, **fields)
    error = caught.value
    assert error.argument == "method"
    assert error.rule.startswith(f"{method} cannot do this work: ")
    assert len(error.rule) > len(f"{method} cannot do this work: ") + 10
    able = error.way_out.removeprefix("use method='auto', or ").removesuffix(", which can")
    assert able in NAMES
    assert able != method
    assert compute(model, inputs, method=able, **fields).plan.method == able
    return error


def why(plan, method):
    """What the plan says of a method that failed."""
    (candidate,) = [c for c in plan.candidates if c.method == method]
    assert candidate.refused, f"{method} was not refused"
    assert f"{method:<14}refused: {candidate.refused}" in plan.explain()
    return candidate.refused


# -------------------------------------------------------------------------------------- samples that are not apart


def test_batch_norm_in_training_mode():
    model = nn.Sequential(nn.Linear(4, 5), nn.Sequential(nn.BatchNorm1d(5)), nn.Linear(5, 2))
    for method in ("auto", "reverse", "backward_loop"):
        with pytest.raises(CoupledSamplesError) as caught:
            compute(model, X, training=True, method=method)
        assert caught.value.value == "module 1.0"
        assert "training=False" in caught.value.way_out
    right(model, X)


def test_batch_norm_over_pixels_in_training_mode():
    # One image has pixels enough for statistics, so the model runs; its samples are coupled all the same.
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(CoupledSamplesError) as caught:
        compute(model, torch.randn(4, 1, 3, 3), training=True)
    assert caught.value.value == "module 1"


def test_a_softmax_over_the_batch():
    class Softmax(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x):
            return torch.softmax(self.inner(x), dim=0)

    with pytest.raises(CoupledSamplesError, match="must treat the samples of a batch apart"):
        compute(Softmax(), X)


def test_instance_norm_couples_nothing():
    right(nn.Sequential(nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2, affine=True), nn.Flatten()), X, wrt="params")


# --------------------------------------------------------------------------------------------------- randomness


@pytest.mark.parametrize("method", ["auto", "reverse", "forward", "backward_loop"])
@pytest.mark.parametrize("wrt", ["inputs", "params", {"module": "0", "side": "output"}])
def test_dropout_draws_the_same_mask_for_every_sample_and_pass(method, wrt):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Dropout(0.5), nn.Linear(32, 3))
    x = X[:1].expand(3, 4).contiguous()
    fields = {"wrt": wrt, "training": True, "seed": 3, "returns": ["jacobian", "outputs"]}
    found = compute(model, x, method=method, **fields)
    # Equal samples see equal masks; a chunk, a band of rows or another method sees them too.
    assert torch.allclose(found.outputs, found.outputs[:1].expand_as(found.outputs), atol=1e-6)
    chunked = compute(model, x, method=method, chunk_size=2, **fields)
    assert reference.worst(chunked.jacobian, reference.jacobian(model, x, wrt, training=True, seed=3)) < 1e-4
    assert torch.allclose(chunked.outputs, found.outputs, atol=1e-6)


def test_dropout_outside_training_mode_does_nothing():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.9), nn.Linear(8, 3)).train()
    right(model, X, wrt="params")


def test_noise_from_torch_is_fixed_by_the_seed():
    class Noisy(nn.Module):
        def forward(self, x):
            return x * torch.randn(4)

    found = [compute(Noisy(), X, seed=seed).jacobian for seed in (1, 1, 2)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.allclose(found[0], found[0][:1].expand_as(found[0]))


def test_whole_batch_methods_are_refused_for_random_models():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    error = refused(model, X, "layerwise", training=True)
    assert "draws random numbers" in error.rule
    plan = compute(model, X, training=True).plan
    assert not plan.batched
    assert any("random" in note for note in plan.notes)


# ------------------------------------------------------------------------------------------------------ kernels


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("wrt", ["inputs", "params"])
def test_recurrent_kernels(kind, wrt):
    torch.manual_seed(0)

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = kind(3, 4, batch_first=True)

        def forward(self, x):
            return self.body(x)[0][:, -1]

    model, x = Last(), torch.randn(3, 5, 3)
    plan = right(model, x, wrt=wrt)
    failed = {c.method for c in plan.candidates if c.refused}
    assert "forward" in failed or kind is nn.RNN
    refused(model, x, "forward", wrt=wrt)


def test_the_encoder_layers_fast_path_is_off():
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)
    for method in ("auto", *VMAP, "backward_loop", "layerwise"):
        right(model, torch.randn(2, 3, 8), method=method)


def test_nested_tensors_are_off():
    entry = ENTRIES["encoder_padded"]
    model, inputs = entry.make()
    for method in ("auto", *VMAP, "backward_loop", "layerwise"):
        right(model, inputs, method=method)


@pytest.mark.parametrize("causal", [False, True])
def test_fused_attention(causal):
    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)

    torch.manual_seed(0)
    model, x = Attend(), torch.randn(2, 3, 8)
    # Forward mode, and backward twice for a jvp by backward_loop, have no fused rule.
    v = torch.randn(3, 8)
    expected = torch.einsum("btdse,se->btd", reference.jacobian(model, x).flatten(3).unflatten(3, (3, 8)), v.double())
    for method in ("auto", "reverse", "forward", "backward_loop"):
        right(model, x, method=method)
        pushed = compute(model, x, returns="jvp", vectors=v, method=method).jvp
        assert reference.worst(pushed, expected) < 1e-4, method


def test_the_callers_choice_of_attention_comes_back():
    model, x = nn.MultiheadAttention(6, 2, batch_first=True), torch.randn(2, 3, 6)

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x, x, x, need_weights=False)[0]

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        compute(Wrapped(), x)
        assert torch.backends.cuda.flash_sdp_enabled()
        assert not torch.backends.cuda.math_sdp_enabled()
    assert torch.backends.cuda.math_sdp_enabled()


# ------------------------------------------------------------------------------- custom functions and saved tensors


def test_a_custom_function_without_setup_context():
    model = Custom(CubeOld)
    plan = right(model, X, wrt="params")
    for method in VMAP:
        assert "without setup_context" in why(plan, method)
        assert "without setup_context" in refused(model, X, method, wrt="params").rule


def test_a_custom_function_that_can_be_differentiated_once():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.exp()

        @staticmethod
        @once_differentiable
        def backward(ctx, grad):
            return grad * ctx.saved_tensors[0].exp()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return Once.apply(self.layer(x))

    model = Model()
    right(model, X)
    # A push-forward alone cannot be had; beside the Jacobian it is made from that.
    with pytest.raises(MethodError, match="no method can differentiate it"):
        compute(model, X, returns="jvp", vectors=torch.ones(4))
    found = compute(model, X, returns=["jacobian", "jvp"], vectors=torch.ones(4))
    torch.testing.assert_close(found.jvp, found.jacobian.sum(-1))


@pytest.mark.parametrize("wrt", ["inputs", "params"])
def test_checkpoints_of_the_new_kind(wrt):
    model, x = ENTRIES["checkpoint_plain"].make()
    plan = right(model, x, wrt=wrt)
    assert "saved-tensor hooks" in why(plan, "reverse")
    # Recomputed in another precision than the module's own: the parameters must still be in place.
    right(model, x.double(), wrt=wrt, dtype="float64", allowed=1e-10)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("wrt", ["inputs", "params"])
def test_checkpoints_of_the_old_kind(wrt):
    model, x = ENTRIES["checkpoint_reentrant"].make()
    right(model, x, wrt=wrt)
    right(model, x.double(), wrt=wrt, dtype="float64", allowed=1e-10)
    error = refused(model, x, "reverse", wrt=wrt)
    assert error.way_out == "use method='auto', or backward_loop, which can"


def test_a_checkpoint_around_a_recurrent_kernel():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(checkpoint(lambda t: self.body(t)[0], x, use_reentrant=False)[:, -1])

    right(Model(), torch.randn(2, 3, 3), wrt="params")


def test_saved_tensor_hooks():
    model, x = ENTRIES["saved_tensor_hooks"].make()
    for wrt in ("inputs", "params"):
        assert "saved-tensor hooks" in why(right(model, x, wrt=wrt), "reverse")


# ------------------------------------------------------------------------------------- Python that looks at numbers


@pytest.mark.parametrize("name", ["item_call", "branch_per_sample", "branch_on_batch", "shape_from_data"])
def test_models_that_look_at_their_data(name):
    model, x = ENTRIES[name].make()
    for wrt in ("inputs", "params"):
        plan = right(model, x, wrt=wrt)
        assert plan.method in ("backward_loop", "layerwise")
        for method in VMAP:
            assert len(why(plan, method)) > 20
            assert "vmap" in refused(model, x, method, wrt=wrt).rule


def test_a_branch_on_the_whole_batch_goes_one_sample_at_a_time():
    model, x = ENTRIES["branch_on_batch"].make()
    found = compute(model, x, returns=["jacobian", "outputs"])
    assert not found.plan.batched
    assert found.plan.chunk_size == 1
    assert any("reads values" in note for note in found.plan.notes)
    alone = torch.cat([model(row[None]) for row in x]).detach()
    torch.testing.assert_close(found.outputs, alone)
    # As a batch it gives something else, or this test could not fail.
    assert not torch.allclose(model(x), alone)


def test_a_threshold_that_copies_of_a_sample_would_cross():
    """One backward for all rows repeats a sample; a model that sums over its batch must not be shown that."""

    class Threshold(nn.Module):
        def forward(self, x):
            return x**2 if x.sum() < 5 else x**3

    x = torch.full((4, 3), 1.5)
    found = compute(Threshold(), x).jacobian
    torch.testing.assert_close(found, torch.diag_embed(2 * x))


class Branching(nn.Module):
    """One of two functions, picked by `torch.cond` or by `if`."""

    def __init__(self, pick, plain=False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.pick, self.plain = nn.Linear(4, 5), nn.Linear(5, 3), pick, plain

    def forward(self, x):
        def inner(t):
            return self.branch(t.sum() > 1, lambda s: s**2, torch.sin, t)

        return self.last(self.branch(self.pick(self, x), inner, torch.tanh, self.first(x)))

    def branch(self, pred, yes, no, t):
        return (yes(t) if pred else no(t)) if self.plain else torch.cond(pred, yes, no, (t,))


@pytest.mark.parametrize("wrt", ["inputs", "params", {"module": "first", "side": "output"}])
def test_cond_takes_the_branch_of_each_sample(wrt):
    """Brute force takes the same model with `if`: torch itself cannot differentiate these branches of `torch.cond`."""
    model, twin = (Branching(lambda _, x: x.sum() > 0, plain) for plain in (False, True))
    assert len({bool(row.sum() > 0) for row in X}) == 2
    found = compute(model, X, wrt=wrt, returns=["jacobian", "outputs"], verify=3)
    assert not found.plan.batched
    assert reference.worst(found.jacobian, reference.jacobian(twin, X, wrt)) < 1e-4
    assert reference.worst(found.outputs, reference.outputs(twin, X)) < 1e-4
    for method in VMAP:
        assert "vmap cannot follow" in refused(model, X, method, wrt=wrt).rule


@pytest.mark.parametrize("method", ["auto", "backward_loop", "reverse", "forward"])
def test_cond_on_what_all_samples_share(method):
    class Shared(Branching):
        def forward(self, x):
            scaled = self.branch(self.last.weight.sum() > 0, lambda t: t * 2, lambda t: t * 3, self.first(x))
            return self.last(torch.tanh(scaled))

    model, twin = (Shared(None, plain) for plain in (False, True))
    for wrt in ("inputs", "params"):
        found = compute(model, X, wrt=wrt, method=method)
        assert found.plan.batched
        assert reference.worst(found.jacobian, reference.jacobian(twin, X, wrt)) < 1e-4


def test_a_loop_until_convergence():
    model, x = ENTRIES["fixed_point_until"].make()
    plan = right(model, x, wrt="params")
    assert not plan.batched


def test_a_model_for_one_sample_only():
    model, x = ENTRIES["one_sample_only"].make()
    plan = right(model, x)
    assert not plan.batched
    found = compute(model, x, returns=["jacobian", "outputs", "weighted_gradient"], weights=torch.ones(3))
    torch.testing.assert_close(found.outputs, torch.cat([model(row[None]) for row in x]).detach())


# ------------------------------------------------------------------------------------------------ in-place writes


def test_in_place_writes_into_unbatched_tensors():
    model, x = ENTRIES["writes_into_unbatched"].make()
    plan = right(model, x, wrt="params")
    for method in VMAP:
        assert "writes a sample's values into a tensor shared by all samples" in why(plan, method)
        refused(model, x, method)


@pytest.mark.parametrize("method", ["auto", "layerwise", "reverse", "backward_loop"])
def test_a_model_that_writes_into_its_input_leaves_the_callers(method):
    model, x = ENTRIES["writes_into_input"].make()
    before, version = x.clone(), x._version
    right(model, x, method=method)
    compute(model, x, wrt="params", returns=["jacobian", "outputs", "norms"], method=method)
    assert torch.equal(x, before)
    assert x._version == version


def test_a_model_that_writes_into_its_tokens():
    class Mask(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 3)

        def forward(self, tokens):
            tokens[tokens == 4] = 0
            return self.embed(tokens).sum(1)

    tokens = torch.tensor([[4, 1], [2, 4]])
    right(Mask(), tokens, wrt="params")
    assert tokens.tolist() == [[4, 1], [2, 4]]


@pytest.mark.parametrize("method", ["auto", "layerwise", "reverse", "backward_loop"])
@pytest.mark.parametrize("point", [{"module": "first", "side": "output"}, {"module": "act", "side": "input"}])
def test_hidden_values_that_are_written_over(method, point):
    model, x = ENTRIES["overwritten_points"].make()
    right(model, x, wrt=point, method=method)
    found = compute(model, x, outputs={"module": "first"}, returns=["outputs", "jacobian"], method=method)
    torch.testing.assert_close(found.outputs, (x @ model.first.weight.T + model.first.bias).detach())


def test_buffers_that_are_written_to_are_the_modules_no_more():
    model, x = ENTRIES["counts_calls"].make()
    plan = right(model, x, wrt="params")
    assert (int(model.calls), model.seen, model.last) == (0, 0, None)
    assert any("writes to its buffer calls" in note for note in plan.notes)


# -------------------------------------------------------------------------------------------------------- inputs


def test_integer_inputs_go_to_the_embedding():
    entry = ENTRIES["causal_decoder"]
    model, tokens = entry.make()
    with pytest.raises(InputError) as caught:
        compute(model, tokens)
    assert "wrt={'module': 'embed', 'side': 'output'}" in caught.value.way_out
    for method in ("auto", *VMAP, "layerwise", "backward_loop"):
        right(model, tokens, wrt=EMBEDDED, method=method)


# ---------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("name", ["tied_two_names", "tied_transpose", "reused_layer", "parameter_used_outside"])
def test_every_use_of_a_parameter_counts(name):
    model, x = ENTRIES[name].make()
    for method in ("auto", *VMAP, "layerwise", "backward_loop"):
        right(model, x, wrt="params", method=method)


def test_unused_parameters_get_zeros():
    model, x = ENTRIES["unused_parameters"].make()
    for method in ("auto", *VMAP, "layerwise", "backward_loop"):
        found = compute(model, x, wrt="params", method=method).jacobian
        assert not found["spare.weight"].dense().any()
        assert found["spare.weight"].shape == (3, 3, 7, 5)


def test_frozen_parameters_have_derivatives_too():
    model, x = ENTRIES["frozen_layers"].make()
    right(model, x, wrt="params")
    assert not model[0].weight.requires_grad
    assert model[2].weight.requires_grad


def test_a_parameter_in_a_plain_list_is_refused():
    """Its uses through the list cannot be followed, and would be missing from the derivative."""

    class Hoarder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.kept = [self.layer.weight]

        def forward(self, x):
            return self.layer(x) @ self.kept[0]

    with pytest.raises(ModelError) as caught:
        compute(Hoarder(), X, wrt="params")
    assert caught.value.value == "layer.weight"
    assert "through the module that owns it" in caught.value.rule
    assert "nn.ParameterList" in caught.value.way_out
    # The other parameter, and the inputs, are not touched by that.
    right(Hoarder(), X)
    compute(Hoarder(), X, wrt="layer.bias")


# ----------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("method", ["auto", "reverse", "forward", "layerwise", "backward_loop"])
def test_the_callers_autocast_does_not_reach_the_model(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        right(model, X, wrt="params", method=method)
    assert not torch.is_autocast_enabled("cpu")


def test_an_autocast_of_the_models_own():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                h = self.body(x)
            return self.norm(h.float())

    model = Mixed()
    for method in ("auto", "reverse", "layerwise", "backward_loop"):
        found = compute(model, X, method=method).jacobian
        assert reference.worst(found, reference_in(model, X)) < 0.1, method


def reference_in(model, x):
    """One backward per number in the model's own precision: in float64 an autocast would round all the same."""
    rows = []
    for sample in x:
        leaf = sample[None].clone().requires_grad_()
        y = model(leaf)[0]
        rows.append(torch.stack([torch.autograd.grad(n, leaf, retain_graph=True)[0][0] for n in y]))
    return torch.stack(rows).double()


# -------------------------------------------------------------------------------------------- wrappers and outputs


def test_dict_like_outputs():
    model, x = ENTRIES["dict_like_output"].make()
    found = compute(model, x, returns=["jacobian", "outputs"])
    assert type(found.jacobian).__name__ == "Output"
    assert found.jacobian.logits.shape == (3, 3, 4)
    assert found.outputs["hidden"].shape == (3, 5)
    only = compute(model, x, outputs="logits").jacobian
    torch.testing.assert_close(only["logits"], found.jacobian["logits"])


def test_a_compiled_module_is_not_compiled():
    model, x = ENTRIES["compiled"].make()
    found = compute(model, x, wrt="params").jacobian
    assert set(found) == {f"body.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}


def test_a_model_that_differentiates_itself():
    model, x = ENTRIES["hamiltonian_autograd"].make()
    for wrt in ("inputs", "params"):
        plan = right(model, x, wrt=wrt)
        assert "takes derivatives itself" in why(plan, "forward")
    found = compute(model, x, returns=["outputs", "jacobian"])
    torch.testing.assert_close(found.outputs, model(x.clone()).detach())


def test_gradients_must_be_on_for_some_models():
    class Force(nn.Module):
        """Assumes that gradients are recorded, and fails under no_grad."""

        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))

        def forward(self, x):
            x = x.requires_grad_() if not x.requires_grad else x
            return torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0]

    model = Force()
    found = compute(model, X, returns=["jacobian", "outputs"])
    assert found.prepared.problem.differentiates
    assert reference.worst(found.jacobian, reference.jacobian(model, X)) < 1e-4
    assert not found.outputs.requires_grad
    assert not X.requires_grad


# --------------------------------------------------------------------------------------------- wrong rules in torch


@pytest.mark.parametrize(("name", "method"), [("radial_basis", "reverse"), ("linear_solve", "forward")])
def test_wrong_answers_of_torch_are_noticed(name, method):
    """torch 2.13 gives wrong numbers here without a word; the trial against plain autograd finds them."""
    model, x = ENTRIES[name].make()
    error = refused(model, x, method)
    assert "disagrees with plain autograd by" in error.rule
    right(model, x)


# ---------------------------------------------------------------------------------------------------------- kinks


def test_kinks_follow_torchs_convention():
    x = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    found = compute(nn.ReLU(), x).jacobian
    torch.testing.assert_close(found, torch.diag_embed(torch.tensor([[0.0, 1.0], [0.0, 0.0]])))


def test_ties_in_a_maximum():
    x = torch.tensor([[2.0, 2.0, 1.0]])
    values = {m: compute(lambda t: t.amax(-1), x, method=m).jacobian for m in ("auto", "reverse", "backward_loop")}
    for found in values.values():
        torch.testing.assert_close(found, torch.tensor([[0.5, 0.5, 0.0]]))


def test_the_root_of_zero_is_kept_counted_and_located():
    x = torch.tensor([[4.0, 1.0], [4.0, 0.0], [0.0, 0.0]])
    for method in ("auto", "reverse", "backward_loop"):
        found = compute(lambda t: t.sqrt(), x, method=method)
        assert torch.equal(torch.isfinite(found.jacobian.diagonal(dim1=1, dim2=2)), x > 0)
        (bad,) = found.shards[0].nonfinite
        assert bad.first == 1
    # Forward mode multiplies zero by infinity, and spoils the whole row of an output.
    assert "gives NaN or infinity where" in refused(lambda t: t.sqrt(), x[:2], "forward").rule
    # The finite samples are right beside them.
    assert found.jacobian[0].tolist() == [[0.25, 0.0], [0.0, 0.5]]


def test_nan_of_one_sample_stays_with_it():
    x = X.clone()
    x[1, 2] = float("nan")
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    found = compute(model, x)
    assert torch.isfinite(found.jacobian[[0, 2]]).all()
    assert torch.isnan(found.jacobian[1]).any()
    torch.testing.assert_close(found.jacobian[[0, 2]], reference.jacobian(model, x[[0, 2]]).float())


# ------------------------------------------------------------------------------------------- nothing works at all


def test_a_model_that_no_method_can_differentiate():
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.scale = 2
            return x * ctx.scale

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError(f"there is no way back from {ctx.scale} times, for {tuple(grad.shape)}")

    with pytest.raises(MethodError) as caught:
        compute(Broken.apply, X)
    error = caught.value
    assert error.argument == "model"
    assert "no method can differentiate it" in error.rule
    assert "backward_loop: backward failed: there is no way back" in error.rule
    assert "reverse: a custom autograd.Function without setup_context" in error.rule


@pytest.mark.parametrize("cut", ["detach", "no_grad", "inference_mode", "numpy"])
def test_a_model_without_a_way_back_is_refused(cut):
    """Zeros are what torch gives, and nobody's Jacobian."""

    def model(x):
        if cut == "numpy":
            return torch.from_numpy(np.sin(x.detach().numpy()))
        with {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(cut, contextlib.nullcontext)():
            return x.detach().sin() if cut == "detach" else x.sin()

    with pytest.raises(ModelError, match="nothing that torch recorded leads from its outputs to inputs"):
        compute(model, X)


@pytest.mark.parametrize("model", [lambda x: (x > 0).to(x), lambda x: x.round().detach(), torch.ones_like])
def test_steps_and_constants_have_a_zero_jacobian(model):
    assert not compute(model, X).jacobian.any()


def test_no_method_warns():
    """Warnings are for the caller's mistakes; none comes from what jacray tries out by itself."""
    entries = ("multihead", "lstm", "glu_gates", "segment_max", "matrix_functions")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`torch.jit.script` is", DeprecationWarning)
        for name in entries:
            compute(*ENTRIES[name].make())


# ----------------------------------------------------------------------------------- a model that raises in a shard


class Hot(nn.Module):
    """Raises at a sample that no trial sees."""

    def __init__(self):
        super().__init__()
        self.first, self.guard = nn.Linear(4, 4), nn.Identity()
        self.guard.register_forward_pre_hook(self.check)

    @staticmethod
    def check(_module, args):
        if bool((args[0] > 5).any()):
            raise ValueError("too hot")

    def forward(self, x):
        return self.first(self.guard(x))


@pytest.mark.parametrize("chunk", [None, 4])
def test_what_a_model_raises_names_the_module_and_the_sample(chunk):
    x = torch.randn(40, 4)
    x[23, 1] = 9.0
    with pytest.raises(
        ModelError, match=r"raised ValueError in module guard: too hot; got sample 23, .*\(1, 4\)"
    ) as caught:
        compute(Hot(), x, chunk_size=chunk)
    assert isinstance(caught.value.__cause__, ValueError)


def test_an_index_out_of_range_in_the_middle_of_a_job():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 2))
    ids = torch.randint(0, 10, (30, 3))
    ids[17, 2] = 11
    with pytest.raises(ModelError, match=r"raised IndexError in module 0: .* got sample 17"):
        compute(model, ids, wrt="params", chunk_size=5)


def test_our_own_faults_are_not_blamed_on_the_model(monkeypatch):
    from jacray_workers import run

    model, x = nn.Linear(4, 3), torch.randn(6, 4)
    prepared = prepare(model, x, make_request())

    def broken(*_):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(run, "by_rows", broken)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        run.run_shard(prepared, prepared.plan.shard(0))

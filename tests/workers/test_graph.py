"""Graph files: what was exported computes the same, under every method, from every named point."""

from __future__ import annotations

import copy
import pickle
from typing import NamedTuple

import jacray
import pytest
import torch
from jacray_workers.errors import InputError, ModelError, RequestError
from jacray_workers.models import as_model, digest, graph
from jacray_workers.models.specs import GraphModel
from torch import nn
from torch.utils import _pytree as pytree

from tests.zoo import ENTRIES

# What torch.export cannot capture, each with a word of the refusal that tells why.
REFUSED = {
    "numpy_inside": "autograd.Function",
    "straight_through": "autograd.Function",
    "custom_function_old": "autograd.Function",
    "custom_function_new": "autograd.Function",
    "custom_function_vmap": "autograd.Function",
    "checkpoint_reentrant": "autograd.Function",
    "item_call": "item",
    "branch_per_sample": "torch.where",
    "branch_on_batch": "torch.where",
    "one_sample_only": "unpack",
    "shape_from_data": "batch size",
    "nearest_neighbours": "batch size",
    "fixed_point_until": "torch.where",
    "hamiltonian_autograd": "torch.export",
    "hamiltonian_func": "torch.export",
    "branch_by_numpy": "numpy",
    "branch_by_count": "torch.where",
    "branch_by_comparison": "torch.where",
    "other_way_in_large_batches": "batch size",
    "writes_into_its_weight": "writes into a parameter",
}
# The graph is of eval mode, and one batch's samples may not depend on each other.
ELSEWHERE = {"compiled"}
QUICK = {
    "linear",
    "mlp_bfloat16",
    "tied_two_names",
    "tied_transpose",
    "frozen_layers",
    "cnn_grouped",
    "encoder_layer",
    "multihead",
    "message_passing",
    "segment_max",
    "spectral_norm",
    "fourier_operator",
    "in_place",
    "counts_calls",
    "nested_trees",
    "named_tuple_out",
    "dict_like_output",
    "default_arguments",
    "exported_program",
    "rnn",
    "item_call",
    "one_sample_only",
    "straight_through",
    "checkpoint_reentrant",
}


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


class Block(nn.Module):
    """Much of what modules do: a buffer, a plain tensor, autocast, an optional argument."""

    def __init__(self):
        super().__init__()
        self.into, self.act, self.same = nn.Linear(4, 4), nn.ReLU(), nn.Identity()
        self.register_buffer("offset", torch.randn(4))
        self.scale = torch.tensor([2.0])

    def forward(self, x, mask=None):
        y = self.act(self.into(x)) + self.offset
        if mask is not None:
            y = y * mask.unsqueeze(-1).to(y.dtype)
        with torch.autocast("cpu", enabled=False):
            y = self.same(y) + x
        return {"y": y * self.scale, "pair": [x.new_ones(x.shape[0], 2), y.sum(dim=-1)], "n": 3}


@pytest.fixture(scope="module")
def block():
    torch.manual_seed(0)
    module = Block().eval()
    inputs = {"x": torch.randn(5, 4), "mask": torch.ones(5, dtype=torch.long)}
    return module, inputs, graph.load(graph.dump(module, inputs))


def tensors(value):
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def test_the_loaded_module_computes_the_same_bits_for_any_batch(block):
    module, inputs, loaded = block
    for size in (1, 2, 5):
        some = {name: tensor[:size] for name, tensor in inputs.items()}
        expected, found = module(**some), loaded(**some)
        assert list(found) == list(expected)
        assert found["n"] == 3
        assert all(map(torch.equal, tensors(expected), tensors(found)))
    assert all(map(torch.equal, tensors(module(inputs["x"], inputs["mask"])), tensors(loaded(*inputs.values()))))


def test_parameters_and_buffers_keep_their_names(block):
    module, _, loaded = block
    assert list(dict(loaded.named_parameters())) == list(dict(module.named_parameters()))
    assert set(module.state_dict()) == set(loaded.state_dict())
    assert {name for name, _ in module.named_modules()} == {name for name, _ in loaded.named_modules()}


@pytest.mark.parametrize("method", ["auto", "reverse", "forward", "backward_loop", "layerwise"])
@pytest.mark.parametrize(
    "wrt", ["inputs.x", "params", {"module": "into", "side": "output"}, {"module": "act", "side": "input"}], ids=str
)
def test_every_method_gives_the_same_jacobian(block, method, wrt):
    module, inputs, loaded = block
    for outputs in ("y", {"module": "same", "side": "input"}):
        expected = jacray.jacobian(module, inputs, wrt=wrt, outputs=outputs, method=method)
        found = jacray.jacobian(loaded, inputs, wrt=wrt, outputs=outputs, method=method)
        pairs = list(zip(tensors(expected), tensors(found), strict=True))
        assert pairs
        for a, b in pairs:
            torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)


def test_chain_cuts_a_graph_as_it_cuts_the_module():
    module, x = ENTRIES["autoencoder"].make()
    loaded = graph.load(graph.dump(module, x))
    expected = jacray.jacobian(module, x, method="reverse")
    torch.testing.assert_close(jacray.jacobian(loaded, x, method="chain"), expected, rtol=1e-5, atol=1e-6)


def test_the_same_module_gives_the_same_bytes(block):
    module, inputs, _ = block
    assert graph.dump(module, inputs) == graph.dump(copy.deepcopy(module), {k: v[:1] for k, v in inputs.items()})


def test_a_loaded_module_can_be_dumped_again(block):
    _, inputs, loaded = block
    again = graph.load(graph.dump(loaded, inputs))
    assert all(map(torch.equal, tensors(loaded(**inputs)), tensors(again(**inputs))))
    wrt = {"module": "act", "side": "output"}
    expected = jacray.jacobian(loaded, inputs, wrt=wrt, outputs="y")
    torch.testing.assert_close(jacray.jacobian(again, inputs, wrt=wrt, outputs="y"), expected)


def test_a_loaded_module_survives_pickle_and_copy(block):
    _, inputs, loaded = block
    for again in (pickle.loads(pickle.dumps(loaded)), copy.deepcopy(loaded)):
        assert all(map(torch.equal, tensors(loaded(**inputs)), tensors(again(**inputs))))


def test_a_wider_precision_reaches_what_the_graph_makes_itself():
    class Filled(nn.Module):
        def forward(self, x):
            return x @ torch.full((3, 2), 0.5, dtype=torch.float32) + torch.zeros(x.shape[0], 2)

    x = torch.randn(2, 3)
    loaded = graph.load(graph.dump(Filled(), x))
    assert loaded(x.double()).dtype == torch.float64
    assert loaded(x).dtype == torch.float32


def test_what_ran_without_gradients_has_none():
    class Stops(nn.Module):
        @torch.no_grad()
        def turned(self, x):
            return x.sin()

        def forward(self, x):
            return self.turned(x) * x

    x = torch.randn(3, 2)
    loaded = graph.load(graph.dump(Stops(), x))
    for method in ("reverse", "forward", "backward_loop"):
        torch.testing.assert_close(jacray.jacobian(loaded, x, method=method), torch.diag_embed(x.sin()))


def test_a_batch_size_taken_by_len_stays_free():
    class Counts(nn.Module):
        def forward(self, x):
            return x.reshape(len(x) * 2, -1).tanh().reshape(len(x), -1) + torch.arange(3.0).repeat(len(x), 1)[:, :1]

    module, x = Counts(), torch.randn(4, 6)
    loaded = graph.load(graph.dump(module, x[:1]))
    for size in (1, 3, 4):
        assert torch.equal(loaded(x[:size]), module(x[:size]))


def test_attention_may_be_asked_about_as_a_point():
    torch.manual_seed(0)
    module = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    loaded = graph.load(graph.dump(module, x))
    wrt = {"module": "self_attn", "side": "input"}
    outputs = {"module": "self_attn", "side": "output"}
    expected = jacray.jacobian(module, x, wrt=wrt, outputs=outputs)
    torch.testing.assert_close(jacray.jacobian(loaded, x, wrt=wrt, outputs=outputs), expected, rtol=1e-5, atol=1e-6)
    # The tensor that enters is query, key and value at once.
    plain = torch.func.vmap(torch.func.jacrev(lambda s: module.self_attn(s[None], s[None], s[None])[0][0]))(x)
    torch.testing.assert_close(expected, plain, rtol=1e-5, atol=1e-6)


def test_what_a_submodule_writes_in_place_is_kept_though_no_point_can_be_marked():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU(inplace=True)

        def forward(self, x):
            y = x - 1
            self.act(y)
            return y * 3

    module, x = Writes(), torch.randn(4, 3)
    loaded = graph.load(graph.dump(module, x))
    assert torch.equal(loaded(x), module(x))


def test_a_named_tuple_and_a_list_of_inputs_are_taken_as_by_the_module():
    class Takes(nn.Module):
        def forward(self, pair, rest):
            return pair.left * rest[0] + pair.right * rest[1]

    module = Takes()
    inputs = (Pair(torch.randn(3, 2), torch.randn(3, 2)), [torch.randn(3, 2), torch.randn(3, 2)])
    loaded = graph.load(graph.dump(module, inputs))
    assert torch.equal(loaded(*inputs), module(*inputs))


def test_a_shape_that_was_not_exported_is_refused(block):
    _, inputs, loaded = block
    with pytest.raises(InputError, match=r"inputs\.x: must have the shape .* a batch of \[4\]"):
        loaded(torch.randn(2, 5), inputs["mask"][:2])
    with pytest.raises(ModelError, match="takes the tensors x, mask"):
        loaded(inputs["x"])
    with pytest.raises(InputError, match=r"inputs\.mask: must be of the kind"):
        loaded(inputs["x"], torch.ones(5))


def test_training_mode_is_refused(block):
    _, inputs, loaded = block
    with pytest.raises(ModelError, match="training: must be false"):
        jacray.jacobian(loaded, inputs, wrt="inputs.x", outputs="y", training=True)


def test_a_point_that_is_not_there_is_refused(block):
    _, inputs, loaded = block
    with pytest.raises(RequestError, match="did you mean into"):
        jacray.jacobian(loaded, inputs, wrt={"module": "inot", "side": "output"}, outputs="y")


def test_export_writes_what_a_spec_reads(block, tmp_path):
    module, inputs, _ = block
    path = jacray.export(module, inputs, tmp_path / "block.safetensors")
    spec = {"kind": "graph", "path": str(path)}
    expected = jacray.jacobian(module, inputs, wrt="inputs.x", outputs="y")
    torch.testing.assert_close(jacray.jacobian(spec, inputs, wrt="inputs.x", outputs="y"), expected)
    first = digest(GraphModel(path="block.safetensors"), tmp_path)
    path.rename(tmp_path / "moved.safetensors")
    assert digest(GraphModel(path="moved.safetensors"), tmp_path) == first
    assert as_model(GraphModel(path="moved.safetensors"), tmp_path)(**inputs)["n"] == 3


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n, e in ENTRIES.items() if n not in ELSEWHERE],
)
def test_the_zoo_as_graphs(name):
    entry = ENTRIES[name]
    module, inputs = entry.make()
    with entry.quiet():
        if name in REFUSED:
            with pytest.raises(ModelError, match=REFUSED[name]):
                graph.dump(module, inputs)
            return
        loaded = graph.load(graph.dump(module, inputs))
        if entry.couples or entry.training:
            return
        for wrt in entry.wrt:
            try:
                expected = jacray.jacobian(module, inputs, wrt=wrt)
            except RequestError:
                continue  # a plain function has no parameters
            found = jacray.jacobian(loaded, inputs, wrt=wrt)
            for a, b in zip(tensors(expected), tensors(found), strict=True):
                near = 6e-2 if a.dtype == torch.bfloat16 else 1e-4
                torch.testing.assert_close(
                    b, a, rtol=near, atol=near * max(1.0, float(a.abs().amax()) if a.numel() else 0)
                )

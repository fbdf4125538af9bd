from __future__ import annotations

import copy
import gc
import itertools
import random
import re

import pytest
import torch
from jacray_workers.chain import bracket, chaining, cuts
from jacray_workers.chain.bracket import Bracket
from jacray_workers.errors import MethodError
from jacray_workers.kernels import chain
from jacray_workers.problem.resolve import place, resolve
from jacray_workers.request import make_request
from torch import nn

from tests import reference
from tests.door import compute

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


@pytest.fixture
def always(monkeypatch):
    """Offer chain however little it gains, and let every pass cost only its arithmetic."""
    monkeypatch.setattr(chaining, "GAIN", 0.0)
    monkeypatch.setattr(chaining, "SAVED", float("-inf"))
    monkeypatch.setattr(cuts, "LAUNCH", 0.0)


def made(model, inputs, **fields):
    torch.manual_seed(0)
    return resolve(model, inputs, make_request(**{"dtype": "float64", **fields}))


def brute(problem, batch, rows):
    """Plain autograd, one sample and one output number at a time."""
    values = problem.values(batch)
    blocks = [torch.empty(len(batch[0]), len(rows), *leaf.shape, dtype=problem.dtype) for leaf in problem.leaves]
    for i in range(len(batch[0])):
        sample = [value[i : i + 1].clone().requires_grad_() for value in values]
        y = problem.forward(sample, [leaf[i : i + 1] for leaf in batch])
        for k, row in enumerate(rows):
            grads = torch.autograd.grad(y[0, row], sample, retain_graph=True, allow_unused=True, materialize_grads=True)
            for block, grad in zip(blocks, grads, strict=True):
                block[i, k] = grad[0]
    return blocks


def some(problem, most=60):
    """Rows to compare: all where they are few."""
    rows = torch.randperm(problem.rows, generator=torch.Generator().manual_seed(5))[:most]
    return sorted(rows.tolist())


def worst(found, expected):
    gaps = [float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in zip(found, expected, strict=True)]
    return max(gaps)


def check(model, inputs, **fields):
    """Chain against brute force; the plan comes back."""
    problem, leaves = made(model, inputs, **fields)
    batch = place(problem, leaves)
    with problem.session():
        plan = chain.price(problem, batch)
        assert not isinstance(plan, str), plan
        found, rows = chain.jacobian(problem, batch), some(problem)
        assert worst([block[:, rows] for block in found], brute(problem, batch, rows)) < TOLERANCE[problem.dtype]
        return plan


def refusal(model, inputs, **fields):
    problem, leaves = made(model, inputs, **fields)
    batch = place(problem, leaves)
    with problem.session():
        plan = chain.price(problem, batch)
        assert isinstance(plan, str)
        with pytest.raises(MethodError, match="chain cannot do this work"):
            chain.jacobian(problem, batch)
    return plan


class Traced(nn.Sequential):
    """Calls that must be recorded: those of a plain net take the short way, which knows none that asks for strides."""

    def forward(self, x):
        x.is_contiguous()
        return super().forward(x)


def mlp(*widths, act=nn.ReLU, last=False):
    layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), act())]
    return Traced(*(layers if last else layers[:-1]))


# --- what it must find -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("widths", "act"),
    [
        ((784, 512, 32, 512, 784), nn.ReLU),
        ((784, 512, 32, 512, 784), nn.Tanh),
        ((400, 256, 128, 16, 128, 256, 400), nn.ReLU),
        ((300, 200, 8, 300), nn.GELU),
        ((500, 10, 400, 500), nn.Sigmoid),
    ],
)
def test_the_bottleneck_of_an_autoencoder(widths, act):
    plan = check(mlp(*widths, act=act), torch.randn(3, widths[0]))
    assert len(plan.cuts) == 1
    assert f"({min(widths)} wide)" in plan.cuts[0]
    assert plan.bracket.kind == "product"
    assert plan.pure_operations > 2 * plan.operations


def test_float32_keeps_four_digits():
    model = mlp(784, 512, 32, 512, 784)
    problem, leaves = made(model, torch.randn(6, 784), dtype=None)
    exact, _ = made(copy.deepcopy(model), leaves[0])
    batch = place(problem, leaves)
    with problem.session(), exact.session():
        found = chain.jacobian(problem, batch)
        assert found[0].dtype == torch.float32
        rows = some(exact)
        assert worst([found[0][:, rows].double()], brute(exact, place(exact, leaves), rows)) < 1e-4


def test_norms_and_residuals_inside_an_autoencoder():
    class Residual(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.norm, self.body = nn.LayerNorm(width), mlp(width, 2 * width, width)

        def forward(self, x):
            return x + self.body(self.norm(x))

    parts = [nn.Linear(300, 200), Residual(200), nn.Linear(200, 12), Residual(12), nn.Linear(12, 200), Residual(200)]
    plan = check(nn.Sequential(*parts, nn.Linear(200, 300)), torch.randn(4, 300))
    assert "(12 wide)" in plan.cuts[0]


def test_a_convolutional_autoencoder_with_in_place_activations():
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(16 * 49, 8),
        nn.Linear(8, 16 * 49),
        nn.ReLU(inplace=True),
        nn.Unflatten(1, (16, 7, 7)),
        nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(8, 1, 4, stride=2, padding=1),
        nn.Sigmoid(),
    )
    plan = check(model, torch.randn(3, 1, 28, 28))
    assert "(8 wide)" in plan.cuts[0]


def test_the_features_before_a_wide_head():
    plan = check(mlp(600, 256, 256, 24, 1500), torch.randn(4, 600))
    assert "(24 wide)" in plan.cuts[0]
    assert "times the weight" in plan.text


def test_outputs_that_follow_a_wide_head_do_not_hide_it():
    model = nn.Sequential(mlp(900, 256, 24, 1500), nn.LogSoftmax(dim=-1))
    plan = check(model, torch.randn(3, 900))
    assert "(24 wide)" in plan.cuts[0]


def test_a_leading_wide_linear_comes_last():
    model = Traced(nn.Linear(3000, 16), nn.Tanh(), mlp(16, 400, 400, 300))
    plan = check(model, torch.randn(4, 3000))
    assert "(16 wide)" in plan.cuts[0]
    assert any(part.kind == "known" and part.start == 0 for part in plan.bracket.walk())


class LanguageModel(nn.Module):
    def __init__(self, vocabulary, width=64, tokens=16, tied=True, batch_first=True, late=False):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.place = nn.Parameter(torch.randn(tokens, width) * 0.1)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 2 * width, 0.0, activation="gelu", batch_first=batch_first, norm_first=True
            )
            for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)
        self.tied, self.batch_first, self.late = tied, batch_first, late

    def forward(self, tokens):
        h = self.embed(tokens) + self.place
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1]).to(h)
        h = h if self.batch_first else h.transpose(0, 1)
        for block in self.blocks:
            h = block(h, src_mask=mask)
        h = h if self.batch_first else h.transpose(0, 1)
        h = self.norm(h)
        h = h if self.late else h[:, -1]
        logits = h @ self.embed.weight.T if self.tied else self.head(h)
        return logits[:, -1] if self.late else logits


EMBEDDINGS = {"module": "embed", "side": "output"}


@pytest.mark.parametrize(
    ("tied", "late", "batch_first"),
    [(True, False, True), (True, True, False), (False, False, False), (False, True, True)],
)
def test_the_head_of_a_language_model(tied, late, batch_first):
    model = LanguageModel(600, 32, 8, tied, batch_first, late)
    plan = check(model, torch.randint(0, 600, (3, 8)), wrt=EMBEDDINGS)
    assert "(32 wide)" in plan.cuts[0]
    assert plan.text.endswith("times the weight of the output")


def test_eight_thousand_logits_with_a_tied_head():
    problem, leaves = made(LanguageModel(8000), torch.randint(0, 8000, (2, 16)), wrt=EMBEDDINGS)
    batch = place(problem, leaves)
    with problem.session():
        plan = chain.price(problem, batch)
        assert not isinstance(plan, str)
        assert plan.cuts == ("after layer_norm 5 (64 wide)",)
        found = chain.jacobian(problem, batch)[0]
        assert found.shape == (2, 8000, 16, 64)
        rows = some(problem)
        assert worst([found[:, rows]], brute(problem, batch, rows)) < 1e-10


def test_a_mask_whose_values_are_looked_at():
    """Without `is_causal` the encoder compares the mask with the causal one."""

    class Masked(LanguageModel):
        def __init__(self):
            super().__init__(600, 32, 8)
            layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True, norm_first=True)
            self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(8))

        def forward(self, tokens):
            return self.head(self.layers(self.embed(tokens), mask=self.mask)[:, -1])

    plan = check(Masked(), torch.randint(0, 600, (3, 8)), wrt=EMBEDDINGS)
    assert "(32 wide)" in plan.cuts[0]


class PaddedLanguageModel(LanguageModel):
    """Builds a mask only where something is padded; counts the tokens in Python where `counts`."""

    counts = False

    def forward(self, tokens, mask):
        h = self.embed(tokens) + self.place
        padding = None if mask.all() else ~mask
        for block in self.blocks:
            h = block(h, src_key_padding_mask=padding)
        h = (h * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        h = self.norm(h)
        return self.head(h * int(mask.sum(dim=1).max()) if self.counts else h)


@pytest.mark.parametrize("lengths", [(8, 3, 5, 1), (8, 8, 8, 8), (8, 8, 8, 8, 8, 8, 2, 8), (8, 8, 4, 4, 4, 4, 8, 8)])
def test_padding_that_is_looked_at(lengths):
    model = PaddedLanguageModel(500, 32, 8, tied=False).eval()
    mask = torch.arange(8) < torch.tensor(lengths)[:, None]
    inputs = {"tokens": torch.randint(0, 500, (len(lengths), 8)), "mask": mask}
    found = compute(model, inputs, wrt=EMBEDDINGS, method="chain", chunk_size=2, outputs=list(range(500)))
    assert found.plan.compared
    assert "(32 wide)" in found.plan.cuts[0]
    assert not any("alone" in shard.facts for shard in found.shards)
    plain = compute(model, inputs, wrt=EMBEDDINGS, method="backward_loop", chunk_size=1, dtype="float64")
    assert reference.worst(found.jacobian, plain.jacobian) < 1e-4


def test_counts_that_differ_between_a_sample_and_its_chunk():
    model = PaddedLanguageModel(500, 32, 8, tied=False).eval()
    model.counts = True
    mask = torch.arange(8) < torch.tensor((6, 6, 6, 6, 5, 4))[:, None]
    inputs = {"tokens": torch.randint(0, 500, (6, 8)), "mask": mask}
    found = compute(model, inputs, wrt=EMBEDDINGS, method="chain", chunk_size=2)
    assert sum(shard.facts.get("alone", 0) for shard in found.shards) == 2
    plain = compute(model, inputs, wrt=EMBEDDINGS, method="backward_loop", chunk_size=1, dtype="float64")
    assert reference.worst(found.jacobian, plain.jacobian) < 1e-4


def test_the_last_position_chosen_among_flat_outputs():
    class Everywhere(LanguageModel):
        def forward(self, tokens):
            h = self.embed(tokens) + self.place
            for block in self.blocks:
                h = block(h)
            return self.head(self.norm(h))

    picks = list(range(7 * 300, 8 * 300))
    plan = check(Everywhere(300, 32, 8), torch.randint(0, 300, (2, 8)), wrt=EMBEDDINGS, outputs=picks)
    assert "(32 wide)" in plan.cuts[0]


def test_nothing_in_a_plain_classifier():
    assert refusal(mlp(784, 512, 512, 10), torch.randn(32, 784)) == "no cut pays"
    convolutional = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 26 * 26, 10))
    assert refusal(convolutional, torch.randn(8, 1, 28, 28)) == "no cut pays"


# --- that it is right, whatever it does --------------------------------------------------------------------------


def anything(generator):
    """A solver that brackets at random, to exercise every kind of bracket."""

    def build(given, start, stop):
        if stop == start + 1 and given.known[start]:
            return Bracket("known", start, stop, 1.0)
        kinds = ["reverse", "forward"] + ["product", "product", "pull", "push"] * (stop - start > 1)
        kind = generator.choice(kinds)
        at = generator.randrange(start + 1, stop) if stop - start > 1 and kind not in ("reverse", "forward") else -1
        begin = {"push": at}.get(kind, start)
        if kind in ("forward", "push") and not all(given.forward[begin:stop]):
            return Bracket("reverse", start, stop, 1.0)
        left = build(given, at, stop) if kind in ("product", "pull") else None
        right = build(given, start, at) if kind in ("product", "push") else None
        return Bracket(kind, start, stop, 1.0, at, left, right)

    return lambda given: build(given, 0, len(given.costs))


class TwoTowers(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.top = mlp(5, 6, last=True), mlp(4, 6, last=True), mlp(12, 5, 7)

    def forward(self, a, b):
        return self.top(torch.cat([self.left(a.flatten(1)), self.right(b)], dim=1))


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 6)

    def forward(self, x):
        h = torch.zeros(x.shape[0], 5, dtype=x.dtype)
        h[:, 1:] = self.first(x)[:, :-1]
        h.mul_(2.0)
        h += self.first.bias
        return torch.nn.functional.elu(self.last(h), inplace=True)


class TimeFirst(nn.Module):
    """Samples on the second axis, then folded into one with time."""

    def __init__(self):
        super().__init__()
        self.first, self.mix, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = torch.tanh(self.first(x.transpose(0, 1)))
        h = torch.tanh(self.mix(h.reshape(-1, 4))).reshape(h.shape)
        return self.last(h.cumsum(0)).transpose(0, 1)


MODELS = {
    "mlp": lambda: (mlp(6, 5, 4, 6, act=nn.Tanh), torch.randn(3, 6)),
    "linear": lambda: (mlp(6, 5), torch.randn(3, 6)),
    "two linears": lambda: (Traced(nn.Linear(6, 3), nn.Linear(3, 5)), torch.randn(3, 6)),
    "convolutions": lambda: (
        nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(2, 3, 2)
        ),
        torch.randn(2, 1, 8, 8),
    ),
    "towers": lambda: (TwoTowers(), (torch.randn(3, 5, 1), torch.randn(3, 4))),
    "in place": lambda: (InPlace(), torch.randn(4, 6)),
    "time first": lambda: (TimeFirst(), torch.randn(3, 3, 3)),
    "recurrent": lambda: (Recurrent(), torch.randn(3, 4, 2)),
    "function": lambda: (lambda x: torch.sin(x) * x.sum(-1, keepdim=True).detach(), torch.randn(3, 4)),
    "no_grad inside": lambda: (gated, torch.randn(3, 4)),
    "distances": lambda: (distances, torch.randn(3, 4)),
    "attention": lambda: (nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), torch.randn(3, 4, 8)),
    "one sample": lambda: (mlp(6, 5, 4, 6), torch.randn(1, 6)),
}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(2, 5, batch_first=True), nn.Linear(5, 6)

    def forward(self, x):
        return torch.tanh(self.head(self.rnn(x)[0][:, -1]))


def gated(x):
    h = torch.tanh(x @ torch.arange(16.0, dtype=x.dtype).reshape(4, 4))
    with torch.no_grad():
        open_ = (h > 0).to(x.dtype) * h
    return torch.exp(h * open_)


def distances(x):
    return torch.cdist(x, torch.arange(12.0, dtype=x.dtype).reshape(3, 4)).square() @ torch.ones(3, 2, dtype=x.dtype)


@pytest.mark.parametrize("name", MODELS)
def test_every_bracketing_gives_the_same_jacobian(always, monkeypatch, name):
    torch.manual_seed(1)
    model, inputs = MODELS[name]()
    for seed in range(6):
        if seed:
            monkeypatch.setattr(bracket, "solve", anything(random.Random(seed)))
        check(model, inputs)


def test_two_inputs_and_the_cut_after_they_meet():
    model = TwoTowers()
    model.left, model.right, model.top = mlp(300, 200, last=True), mlp(200, 200, last=True), mlp(400, 200, 8, 300)
    plan = check(model, (torch.randn(3, 300, 1), torch.randn(3, 200)))
    assert "(8 wide)" in plan.cuts[0]


def test_no_cut_inside_a_residual_block():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp(40, 2, 40, act=nn.Tanh)

        def forward(self, x):
            return x + self.body(x)

    problem, leaves = made(nn.Sequential(Block(), Block(), nn.Linear(40, 40)), torch.randn(3, 40))
    batch = place(problem, leaves)
    with problem.session():
        tape = chaining.record(problem, problem.values(batch), batch)[0]
    names = [tape.nodes[at].name for at in cuts.bottlenecks(tape)]
    assert names == ["add", "add", "linear", "reshape"]


@pytest.mark.parametrize("size", [1, 2, 7])
def test_the_size_of_the_batch_and_its_order_change_nothing(size):
    problem, leaves = made(mlp(784, 512, 16, 512, 784), torch.randn(7, 784))
    whole = place(problem, leaves)
    order = torch.randperm(7)
    with problem.session():
        expected = chain.jacobian(problem, whole)[0]
        assert torch.allclose(chain.jacobian(problem, [whole[0][order]])[0], expected[order], atol=1e-12)
        assert torch.allclose(chain.jacobian(problem, [whole[0][:size]])[0], expected[:size], atol=1e-12)


@pytest.mark.parametrize("widths", [(400, 300, 16, 300, 400), (400, 300, 16, 900)])
def test_rows_in_bands_and_buffers_of_any_kind(widths):
    problem, leaves = made(mlp(*widths), torch.randn(3, 400))
    batch = place(problem, leaves)
    with problem.session():
        expected = chain.jacobian(problem, batch)[0]
        buffer = torch.full((3, widths[-1], 400), torch.nan, dtype=torch.float64)
        assert chain.jacobian(problem, batch, into=[buffer])[0] is buffer
        assert torch.equal(buffer, expected)
        banded = torch.full_like(buffer, torch.nan)
        for rows in (range(7), range(7, 200), range(200, widths[-1])):
            chain.jacobian(problem, batch, rows, into=[banded[:, rows.start : rows.stop]])
        assert torch.allclose(banded, expected, atol=1e-12)
        turned = torch.full((400, widths[-1], 3), torch.nan, dtype=torch.float64).permute(2, 1, 0)
        assert torch.allclose(chain.jacobian(problem, batch, into=[turned])[0], expected, atol=1e-12)


def test_bands_are_not_taken_from_another_batch():
    problem, leaves = made(mlp(400, 300, 16, 300, 400), torch.randn(6, 400))
    first, second = place(problem, [leaves[0][:3]]), place(problem, [leaves[0][3:]])
    with problem.session():
        expected = chain.jacobian(problem, second)[0]
        chain.jacobian(problem, first, range(5))
        assert torch.allclose(chain.jacobian(problem, second, range(5, 10))[0], expected[:, 5:10], atol=1e-12)
        chain.jacobian(problem, first, range(5))
        first[0].copy_(second[0])
        assert torch.allclose(chain.jacobian(problem, first, range(5, 10))[0], expected[:, 5:10], atol=1e-12)


def test_a_model_that_changes_between_calls():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.scale, self.relu = mlp(400, 300, 8, 300, 400), 1.0, True

        def forward(self, x):
            h = self.body[:4](x)
            return self.body[4:](torch.relu(h) if self.relu else h) * self.scale

    model = Scaled()
    problem, leaves = made(model, torch.randn(3, 400), dtype=None)
    batch = place(problem, leaves)
    with problem.session():
        before = chain.jacobian(problem, batch)[0].clone()
        model.scale = 2.0
        assert torch.allclose(chain.jacobian(problem, batch)[0], 2 * before, atol=1e-6)
        model.relu = False
        assert worst(chain.jacobian(problem, batch), brute(problem, batch, range(400))) < 1e-4
        with torch.no_grad():
            model.body[0].weight.add_(torch.randn(300, 400) * 0.1)
        assert worst(chain.jacobian(problem, batch), brute(problem, batch, range(400))) < 1e-4
        model.body[6].weight = nn.Parameter(torch.randn(400, 300), requires_grad=False)
        assert worst(chain.jacobian(problem, batch), brute(problem, batch, range(400))) < 1e-4


def test_the_model_is_as_it_was():
    model = mlp(400, 300, 8, 300, 400)
    before = copy.deepcopy(model.state_dict())
    inputs = torch.randn(3, 400)
    kept = inputs.clone()
    problem, leaves = made(model, inputs, dtype=None)
    with problem.session():
        chain.jacobian(problem, place(problem, leaves))
    assert torch.equal(inputs, kept)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_what_is_remembered_goes_with_the_problem():
    problem, leaves = made(mlp(400, 300, 8, 300, 400), torch.randn(3, 400))
    batch = place(problem, leaves)
    with problem.session():
        chain.jacobian(problem, batch, range(5))
    number = id(problem)
    assert number in chain._MEMORIES
    assert chain._MEMORIES[number].band is not None
    del batch
    gc.collect()
    assert chain._MEMORIES[number].band is None
    del problem
    gc.collect()
    assert number not in chain._MEMORIES


def test_a_second_call_prepares_nothing(monkeypatch):
    problem, leaves = made(mlp(400, 300, 8, 300, 400), torch.randn(3, 400))
    batch = place(problem, leaves)
    with problem.session():
        first = chain.jacobian(problem, batch)[0]
        monkeypatch.setattr(chaining, "_prepare", None)
        assert torch.equal(chain.jacobian(problem, batch)[0], first)


@pytest.mark.parametrize("change", ["factor", "operator", "constant"])
def test_other_calls_are_prepared_for_anew(change):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.tail = mlp(400, 300, 8, 300), nn.Linear(300, 400)
            self.settings, self.shift, self.act = {"factor": 2.0}, torch.zeros(300), torch.tanh

        def forward(self, x):
            return self.tail(self.act(self.settings["factor"] * self.body(x) + self.shift))

    model = Scaled()
    problem, leaves = made(model, torch.randn(3, 400))
    batch = place(problem, leaves)
    with problem.session():
        chain.jacobian(problem, batch)
        if change == "factor":
            # Too little to be seen in the outputs.
            model.settings["factor"] = 2.0 + 1e-9
        elif change == "operator":
            model.act = torch.sigmoid
        else:
            model.shift = torch.full((300,), 1e-9)
        found = chain.jacobian(problem, batch)
        assert worst(found, brute(problem, batch, range(400))) < 1e-12


def test_the_cuts_are_told_as_text():
    problem, leaves = made(mlp(784, 512, 32, 512, 784), torch.randn(4, 784))
    batch = place(problem, leaves)
    with problem.session():
        told = chain.cuts(problem, batch)
    assert told[0] == "after relu 2 (32 wide)"
    assert told[1] == (
        "the input to relu 2 in reverse (32 rows); relu 2 to the output forward (32 columns); their product"
    )


# --- what it must refuse -----------------------------------------------------------------------------------------


class Twice(torch.autograd.Function):
    """A straight-through rounding: its derivative is not that of its calls."""

    @staticmethod
    def forward(_ctx, x):
        return torch.round(x)

    @staticmethod
    def backward(_ctx, g):
        return g


def wide(middle):
    """A model where a cut would pay, with something in the middle."""

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode, self.decode = mlp(784, 512, 16), mlp(16, 512, 784)
            self.buffer = nn.Buffer(torch.ones(16))

        def forward(self, x):
            return self.decode(middle(self.encode(x)))

    return Wide()


def viewed(h):
    h = h * 1.0
    view = h[:, :8]
    h.add_(1.0)
    return torch.cat([view, view], dim=1)


def energy(h):
    with torch.enable_grad():
        x = h.detach().requires_grad_()
        return torch.autograd.grad(torch.sin(x).sum(), x)[0] + h


@pytest.mark.parametrize(
    ("middle", "reason"),
    [
        (lambda h: h * h.mean().item(), r"looks at the numbers of a tensor \(item\)"),
        (lambda h: h if h.sum() > 0 else -h, r"looks at the numbers of a tensor \(__bool__\)"),
        (lambda h: h * float(h.detach().max()), r"looks at the numbers"),
        (lambda h: h * torch.from_numpy(h.detach().numpy()), r"looks at the numbers of a tensor \(numpy\)"),
        (lambda h: h[:, h[0].argsort().tolist()], r"looks at the numbers"),
        (Twice.apply, r"custom autograd\.Function|no torch call visible"),
        (torch.func.vmap(torch.sin), "no torch call visible from Python"),
        (viewed, "changed through a view"),
        (energy, "changed through a view|the model differentiates"),
        (lambda h: torch.softmax(h, dim=0), "depend on the other samples|gives other outputs than in a batch"),
        (lambda h: h - h.mean(dim=0), "depend on the other samples|gives other outputs than in a batch"),
        (lambda h: h + 1e-16 * h.roll(1, 0), "depend on the other samples"),
        (lambda h: h / h.shape[0], "gives other outputs than in a batch"),
        (lambda h: h.detach(), "do not depend"),
    ],
)
def test_models_that_no_tape_holds_for(middle, reason):
    problem, leaves = made(wide(middle), torch.randn(3, 784))
    batch = place(problem, leaves)
    with problem.session():
        told = chain.price(problem, batch)
        assert isinstance(told, str)
        assert re.search(reason, told), told
        with pytest.raises(MethodError, match=reason):
            chain.jacobian(problem, batch)


def test_a_harmless_look_at_shapes_types_and_constants():
    def middle(h):
        steps = torch.linspace(0, 1, 3)
        scale = sum(float(s) for s in steps) + len(h.shape) + h.numel() // h.shape[0]
        return h * scale if h.is_floating_point() and h.dim() == 2 and not h.is_cuda else h

    check(wide(middle), torch.randn(3, 784))


def test_autocast_inside_the_model():
    def middle(h):
        with torch.autocast("cpu", torch.bfloat16):
            return torch.nn.functional.linear(h, torch.eye(16)).float()

    assert refusal(wide(middle), torch.randn(3, 784), dtype=None) == "the model switches autocast on"


def test_parameters_and_random_draws_and_half_precision_by_shape_alone():
    model, inputs = mlp(4, 5, 3), torch.randn(3, 4)
    assert "parameters enter" in chain.refuse(made(model, inputs, wrt="params")[0])
    assert "random draws" in chain.refuse(made(nn.Sequential(model, nn.Dropout()), inputs, training=True)[0])
    assert "float32 or float64; got bfloat16" in chain.refuse(made(model, inputs, dtype="bfloat16")[0])
    assert chain.refuse(made(model, inputs)[0]) == ""


def test_products_with_vectors():
    problem, leaves = made(mlp(4, 5, 3), torch.randn(3, 4))
    batch = place(problem, leaves)
    with problem.session():
        with pytest.raises(MethodError, match="needs no chain"):
            chain.vjp(problem, batch, torch.ones(1, 3, 3))
        with pytest.raises(MethodError, match="needs no chain"):
            chain.jvp(problem, batch, [torch.ones(1, 3, 4)])


def test_a_first_block_that_is_wrong_is_refused(monkeypatch):
    problem, leaves = made(mlp(400, 300, 8, 300, 400), torch.randn(3, 400))
    batch = place(problem, leaves)
    right = chain.make

    def wrong(run, best, rows, into=None):
        found = right(run, best, rows, into)
        found[0][1, 3] *= -1
        return found

    monkeypatch.setattr(chain, "make", wrong)
    with problem.session(), pytest.raises(MethodError, match="disagrees with plain autograd"):
        chain.jacobian(problem, batch)

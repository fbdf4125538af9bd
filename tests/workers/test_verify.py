from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from jacray_workers.errors import VerificationError
from jacray_workers.kernels import backward_loop
from jacray_workers.problem.resolve import place, resolve
from jacray_workers.request import make_request
from jacray_workers.trust import projection
from jacray_workers.trust.reference import in_float64
from jacray_workers.trust.verify import Computed, check_sample, check_sum, raise_if_failed
from torch import nn
from torch.utils.checkpoint import checkpoint

SAMPLES = 3


@pytest.fixture(autouse=True)
def one_thread():
    """The nets are small: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Residual(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return x + self.body(x)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(4, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.mha(x, x, x, need_weights=False)[0].mean(1)


class Solve(nn.Module):
    """Solves a nearly singular system, which amplifies rounding by its condition number."""

    def __init__(self, condition):
        super().__init__()
        q = torch.linalg.qr(torch.randn(6, 6))[0]
        self.matrix = nn.Parameter(q @ torch.diag(torch.logspace(0, -condition, 6)) @ q.T)

    def forward(self, x):
        return torch.linalg.solve(self.matrix, torch.tanh(x).unsqueeze(-1)).squeeze(-1)


class Single(nn.Module):
    """Insists on float32 inside."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 4)

    def forward(self, x):
        return torch.tanh(x.float() @ self.layer.weight.float().T)


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(_ctx, x):
        return torch.round(x)

    @staticmethod
    def backward(_ctx, g):
        return g


class Scaled(nn.Module):
    def __init__(self, body, before, after):
        super().__init__()
        self.body, self.before, self.after = body, before, after

    def forward(self, x):
        return self.body(x * self.before) * self.after


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, tokens):
        return self.head(torch.tanh(self.table(tokens)).mean(1))


def mlp(activation=nn.ReLU, wide=32):
    return nn.Sequential(nn.Linear(6, wide), activation(), nn.Linear(wide, wide), activation(), nn.Linear(wide, 5))


def cnn():
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip


def encoder():
    return nn.Sequential(
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False),
        nn.Flatten(), nn.Linear(40, 4),
    )  # fmt: skip


def deep(depth=24):
    return nn.Sequential(*[Residual(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU())) for _ in range(depth)])


ZOO = {
    "mlp relu": (mlp, (6,)),
    "mlp tanh": (lambda: mlp(nn.Tanh), (6,)),
    "mlp silu": (lambda: mlp(nn.SiLU), (6,)),
    "mlp wide relu": (lambda: mlp(wide=512), (6,)),
    "leaky": (lambda: mlp(nn.LeakyReLU), (6,)),
    "hard": (lambda: mlp(nn.Hardswish), (6,)),
    "cnn with max-pool and batch norm": (cnn, (2, 8, 8)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 6, 3, groups=3), nn.GroupNorm(2, 6), nn.ELU(), nn.Flatten()), (3, 9)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 3, 2), nn.Sigmoid(), nn.Flatten()), (2, 4, 4)),
    "attention": (Attention, (5, 8)),
    "encoder": (encoder, (5, 8)),
    "rnn": (lambda: Recurrent(nn.RNN), (7, 4)),
    "gru": (lambda: Recurrent(nn.GRU), (7, 4)),
    "lstm": (lambda: Recurrent(nn.LSTM), (7, 4)),
    "deep residual": (deep, (8,)),
    "softmax": (lambda: nn.Sequential(mlp(), nn.LogSoftmax(-1)), (6,)),
    "saturated": (lambda: Scaled(mlp(nn.Sigmoid), 100.0, 1.0), (6,)),
    "large": (lambda: Scaled(mlp(nn.Tanh), 1.0, 1e12), (6,)),
    "tiny": (lambda: Scaled(mlp(nn.Tanh), 1.0, 1e-12), (6,)),
    "dead": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Threshold(1e6, 0.0), nn.Linear(8, 3)), (6,)),
    "nearly singular": (lambda: Solve(4.0), (6,)),
    "singular in float32": (lambda: Solve(6.5), (6,)),
    "float32 inside": (Single, (5,)),
    "norm": (lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.RMSNorm(6)), (6,)),
    "identity": (nn.Identity, (4,)),
    "bilinear": (lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Linear(3, 3), nn.Softplus(), nn.Flatten()), (6,)),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def job(model, x, **request):
    """The problem, a batch, and what plain loops give for every sample of it."""
    problem, leaves = resolve(model, x, make_request(**request))
    return problem, place(problem, leaves)


def entry(name, dtype, wrt, seed=0):
    torch.manual_seed(seed)
    make, shape = ZOO[name]
    model = make()
    if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        model.train()(torch.randn(16, *shape))
    has = any(True for _ in model.parameters())
    wrt = wrt if has else "inputs"
    return job(model, torch.randn(SAMPLES, *shape), wrt=wrt, dtype=dtype)


def jacobians(problem, batch):
    blocks = backward_loop.jacobian(problem, batch)
    return [[block[i] for block in blocks] for i in range(batch[0].shape[0])]


def check(problem, batch, i, **computed):
    return check_sample(problem, [leaf[i : i + 1] for leaf in batch], i, Computed(**computed), seed=7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ZOO)
def test_right_results_pass(name, dtype):
    if dtype == "bfloat16" and name in ("nearly singular", "singular in float32"):
        pytest.skip("no bfloat16 solver")
    problem, batch = entry(name, dtype, ["inputs", "params"])
    with problem.session():
        for i, blocks in enumerate(jacobians(problem, batch)):
            checks = check(problem, batch, i, jacobian=blocks)
            raise_if_failed(checks)
            assert len(checks) == 2
            assert all(math.isfinite(c.error) and c.error <= c.tolerance for c in checks)


def flip_one_sign(blocks):
    block = blocks[0].clone(memory_format=torch.contiguous_format)
    order = block.flatten().abs().argsort()
    order = order[block.flatten()[order] != 0]
    if len(order):
        block.view(-1)[order[len(order) // 2]] *= -1
    return [block, *blocks[1:]]


def swap_rows(blocks):
    block = blocks[0].clone()
    block[[0, 1]] = block[[1, 0]]
    return [block, *blocks[1:]]


def zero_a_block(blocks):
    return [*blocks[:-1], torch.zeros_like(blocks[-1])]


def zero_a_row(blocks):
    block = blocks[0].clone()
    block[-1] = 0
    return [block, *blocks[1:]]


def transpose(blocks):
    return [
        block.mT.contiguous() if block.dim() > 2 and block.shape[-1] == block.shape[-2] else block for block in blocks
    ]


def double(blocks):
    return [2 * block for block in blocks]


def half_a_percent(blocks):
    return [*blocks[:-1], blocks[-1] * 1.005]


def forget_a_number(blocks):
    block = blocks[0].clone(memory_format=torch.contiguous_format)
    block.view(-1)[block.abs().argmax()] = math.nan
    return [block, *blocks[1:]]


FAULTS = [flip_one_sign, swap_rows, zero_a_block, zero_a_row, transpose, double, half_a_percent, forget_a_number]
VICTIMS = [
    "mlp relu",
    "mlp tanh",
    "cnn with max-pool and batch norm",
    "encoder",
    "lstm",
    "tiny",
    "large",
    "nearly singular",
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("wrt", ["inputs", "params"])
@pytest.mark.parametrize(("name", "dtype"), [*((name, "float32") for name in VICTIMS), ("mlp tanh", "float64")])
def test_faults_are_found(name, wrt, fault, dtype):
    problem, batch = entry(name, dtype, wrt)
    with problem.session():
        right = jacobians(problem, batch)[1]
        wrong = fault(right)
        if all(torch.equal(a, b) for a, b in zip(right, wrong, strict=True)):
            pytest.skip("nothing to change here")
        checks = check(problem, batch, 1, jacobian=wrong)
    assert not all(c.passed for c in checks)
    with pytest.raises(VerificationError, match="sample 1"):
        raise_if_failed(checks)


@pytest.mark.parametrize("fault", [swap_rows, zero_a_block, zero_a_row, transpose, double, forget_a_number])
@pytest.mark.parametrize("name", ["mlp tanh", "cnn with max-pool and batch norm", "encoder"])
def test_large_faults_are_found_in_bfloat16(name, fault):
    problem, batch = entry(name, "bfloat16", "params")
    with problem.session():
        right = jacobians(problem, batch)[0]
        wrong = fault(right)
        if all(torch.equal(a, b) for a, b in zip(right, wrong, strict=True)):
            pytest.skip("nothing to change here")
        assert not all(c.passed for c in check(problem, batch, 0, jacobian=wrong))


@pytest.mark.parametrize("name", VICTIMS)
@pytest.mark.parametrize("wrt", ["inputs", "params"])
def test_another_sample_s_jacobian_is_found(name, wrt):
    problem, batch = entry(name, "float32", wrt)
    with problem.session():
        blocks = jacobians(problem, batch)
        assert not all(c.passed for c in check(problem, batch, 0, jacobian=blocks[1]))


def test_another_dropout_mask_is_found_and_the_same_one_passes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Dropout(0.5), nn.Linear(20, 3))
    problem, batch = job(model, torch.randn(3, 6), training=True, seed=5)
    other = replace(problem, seed=6)
    with problem.session():
        raise_if_failed(check(problem, batch, 0, jacobian=jacobians(problem, [batch[0][:1]])[0]))
        checks = check(problem, batch, 0, jacobian=jacobians(other, [batch[0][:1]])[0])
    assert not all(c.passed for c in checks)


def test_masks_drawn_for_a_whole_batch_are_checked_in_that_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Dropout(0.5), nn.Linear(20, 3))
    problem, batch = job(model, torch.randn(3, 6), training=True)
    with problem.session():
        blocks = jacobians(problem, batch)
        for i in range(3):
            raise_if_failed(check_sample(problem, batch, i, Computed(jacobian=blocks[i]), position=i))
        assert not all(c.passed for c in check_sample(problem, batch, 0, Computed(jacobian=blocks[1]), position=0))


def test_a_hidden_point_of_a_model_that_draws():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.5))
    problem, batch = job(model, torch.randn(1, 6), wrt={"module": "2"}, training=True)
    with problem.session():
        torch.manual_seed(problem.seed)
        raise_if_failed(check(problem, batch, 0, jacobian=jacobians(problem, batch)[0]))


def noise_model(x):
    return torch.tanh(x * (1 + torch.randn_like(x)))


def test_a_model_that_draws_other_numbers_in_float64_is_checked_in_its_own_precision():
    problem, batch = job(noise_model, torch.randn(2, 40), training=True)
    with problem.session():
        checks = check(problem, batch[:1], 0, jacobian=jacobians(problem, [batch[0][:1]])[0])
    raise_if_failed(checks)
    assert "draws other random numbers" in checks[0].note
    assert "float32" in checks[0].what


def test_a_model_that_cannot_be_cast_is_checked_in_its_own_precision():
    matrix = torch.randn(5, 4)
    problem, batch = job(lambda x: torch.tanh(x @ matrix), torch.randn(3, 5))
    with problem.session():
        for i, blocks in enumerate(jacobians(problem, batch)):
            checks = check(problem, batch, i, jacobian=blocks)
            raise_if_failed(checks)
            assert "does not run in float64" in checks[0].note
            wrong = check(problem, batch, i, jacobian=flip_one_sign(blocks))
            assert not all(c.passed for c in wrong)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.last, self.reentrant = nn.Linear(4, 5), nn.Linear(5, 3), reentrant

    def forward(self, x):
        return self.last(checkpoint(lambda h: torch.tanh(self.first(h)), x, use_reentrant=self.reentrant))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("wrt", ["inputs", "params"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_run_again_with_the_same_parameters(reentrant, wrt):
    torch.manual_seed(0)
    model = Checkpointed(reentrant)
    plain = nn.Sequential(model.first, nn.Tanh(), model.last)
    problem, batch = job(model, torch.randn(2, 4), wrt=wrt)
    twin, _ = job(plain, batch[0], wrt=wrt)
    with twin.session():
        right = jacobians(twin, batch)[0]
    with problem.session():
        checks = check(problem, batch, 0, jacobian=right)
        raise_if_failed(checks)
        assert "float64" in checks[0].what
        assert not all(c.passed for c in check(problem, batch, 0, jacobian=flip_one_sign(right)))


def test_one_module_under_several_names_is_left_as_it_was():
    layer = nn.Linear(5, 5)
    problem, batch = job(nn.Sequential(layer, nn.Tanh(), layer), torch.randn(2, 5), wrt="params")
    with problem.session():
        before = layer.weight
        raise_if_failed(check(problem, batch, 0, jacobian=jacobians(problem, [batch[0][:1]])[0]))
        assert layer.weight.dtype == torch.float32
        assert torch.equal(layer.weight, before)


class SingleBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        if g.dtype != torch.float32:
            raise TypeError("float32 only")
        return g * x.cos()


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(_ctx, x):
        return x.sin()

    @staticmethod
    def backward(_ctx, *_g):
        raise NotImplementedError("no backward here")


def test_a_backward_that_insists_on_its_precision():
    problem, batch = job(SingleBackward.apply, torch.randn(1, 4))
    with problem.session():
        right = [torch.diag(batch[0][0].cos())]
        checks = check(problem, batch, 0, jacobian=right)
        raise_if_failed(checks)
        assert "does not run in float64" in checks[0].note
        assert not all(c.passed for c in check(problem, batch, 0, jacobian=flip_one_sign(right)))


def test_without_any_backward_the_slope_alone_decides():
    problem, batch = job(NoBackward.apply, torch.randn(1, 4))
    with problem.session():
        right = [torch.diag(batch[0][0].cos())]
        checks = check(problem, batch, 0, jacobian=right)
        raise_if_failed(checks)
        assert "left out" in checks[0].note
        assert not all(c.passed for c in check(problem, batch, 0, jacobian=flip_one_sign(right)))


def test_samples_that_are_single_numbers():
    problem, batch = job(lambda a, b: (a * b).sin(), (torch.randn(3), torch.randn(3)))
    with problem.session():
        for i, blocks in enumerate(jacobians(problem, batch)):
            raise_if_failed(check(problem, batch, i, jacobian=blocks))
            assert not all(c.passed for c in check(problem, batch, i, jacobian=double(blocks)))


def test_a_straight_through_backward_is_said_and_does_not_fail():
    problem, batch = job(lambda x: StraightThrough.apply(3 * x).cumsum(-1), torch.randn(2, 4))
    with problem.session():
        checks = check(problem, batch, 0, jacobian=jacobians(problem, batch)[0])
        raise_if_failed(checks)
        assert "straight-through" in checks[1].note
        assert not all(c.passed for c in check(problem, batch, 0, jacobian=double(jacobians(problem, batch)[0])))


def test_a_detached_part_is_said_and_does_not_fail():
    problem, batch = job(lambda x: x * x.detach(), torch.randn(2, 4))
    with problem.session():
        checks = check(problem, batch, 0, jacobian=jacobians(problem, batch)[0])
    raise_if_failed(checks)
    assert "detach" in checks[1].note


def test_a_kink_exactly_at_the_sample():
    problem, batch = job(lambda x: torch.relu(x).cumsum(-1), torch.tensor([[0.0, 1.0, -1.0, 0.0]]))
    with problem.session():
        checks = check(problem, batch, 0, jacobian=jacobians(problem, batch)[0])
    raise_if_failed(checks)
    assert checks[1].note


def test_ties_in_a_maximum():
    problem, batch = job(lambda x: x.amax(-1, keepdim=True), torch.ones(1, 5))
    with problem.session():
        raise_if_failed(check(problem, batch, 0, jacobian=jacobians(problem, batch)[0]))


def test_what_is_not_finite_is_left_out_and_said():
    problem, batch = job(lambda x: torch.sqrt(x) + x, torch.tensor([[0.0, 1.0, 4.0]]))
    with problem.session():
        blocks = jacobians(problem, batch)[0]
        assert not torch.isfinite(blocks[0]).all()
        checks = check(problem, batch, 0, jacobian=blocks)
        raise_if_failed(checks)
        assert "not finite" in checks[0].note
        spoiled = blocks[0].clone()
        spoiled[2, 2] = 7.0
        assert not all(c.passed for c in check(problem, batch, 0, jacobian=[spoiled]))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("wrt", ["inputs", "params"])
@pytest.mark.parametrize("name", ["mlp relu", "encoder", "lstm", "tiny"])
def test_weighted_gradients(name, wrt, count):
    problem, batch = entry(name, "float32", wrt)
    ks = torch.randn(count, SAMPLES, problem.rows)
    with problem.session():
        found = backward_loop.vjp(problem, batch, ks, per_sample_params=True)
        for i in range(SAMPLES):
            part = [g[:, i] for g in found]
            raise_if_failed(check(problem, batch, i, cotangents=ks[:, i], gradients=part))
            for wrong in (flip_one_sign(part), double(part), zero_a_block(part)):
                assert not all(c.passed for c in check(problem, batch, i, cotangents=ks[:, i], gradients=wrong))
        other = check(problem, batch, 0, cotangents=ks[:, 1], gradients=[g[:, 0] for g in found])
        assert not all(c.passed for c in other)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("wrt", ["inputs", "params"])
@pytest.mark.parametrize("name", ["mlp relu", "mlp tanh", "lstm", "large"])
def test_pushed_tangents(name, wrt, count):
    problem, batch = entry(name, "float32", wrt)
    vs = [torch.randn(count, SAMPLES, *leaf.shape) for leaf in problem.leaves]
    with problem.session():
        found = backward_loop.jvp(problem, batch, vs)
        for i in range(SAMPLES):
            part = [v[:, i] for v in vs]
            raise_if_failed(check(problem, batch, i, tangents=part, pushed=found[:, i]))
            for wrong in (flip_one_sign([found[:, i]])[0], 2 * found[:, i], found[:, i].flip(1)):
                assert not all(c.passed for c in check(problem, batch, i, tangents=part, pushed=wrong))


@pytest.mark.parametrize("training", [False, True])
def test_summed_gradients(training):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))
    problem, batch = job(model, torch.randn(5, 6), wrt="params", training=training)
    ks = torch.randn(2, 5, 3)
    with problem.session():
        alone = [backward_loop.vjp(problem, [batch[0][i : i + 1]], ks[:, i : i + 1]) for i in range(5)]
        right = [torch.cat(parts, 1).sum(1) for parts in zip(*alone, strict=True)]
        checks = check_sum(problem, batch, ks, right)
        raise_if_failed(checks)
        assert len(checks) == 1
        for wrong in (
            flip_one_sign(right),
            zero_a_block(right),
            [g - a[:, 0] for g, a in zip(right, alone[2], strict=True)],
        ):
            failed = check_sum(problem, batch, ks, wrong)
            with pytest.raises(VerificationError, match="sum over samples"):
                raise_if_failed(failed)
        raise_if_failed(check_sum(problem, batch, ks, [None, *right[1:]]))


def test_a_sum_over_too_many_is_left_out_and_said():
    problem, batch = job(nn.Linear(3, 2), torch.randn(99, 3), wrt="params")
    with problem.session():
        (only,) = check_sum(problem, batch, torch.ones(1, 99, 2), [torch.zeros(1, 2, 3), torch.zeros(1, 2)])
    assert only.passed
    assert "left out" in only.note


def test_tokens_and_several_leaves_and_outputs():
    torch.manual_seed(0)
    problem, batch = job(Embedded(), torch.randint(11, (3, 5)), wrt=["params", {"module": "table"}])
    with problem.session():
        for i, blocks in enumerate(jacobians(problem, batch)):
            raise_if_failed(check(problem, batch, i, jacobian=blocks))
            assert not all(c.passed for c in check(problem, batch, i, jacobian=zero_a_block(blocks)))


@pytest.mark.parametrize("limit", [0, 1 << 25])
def test_factored_blocks(limit, monkeypatch):
    blocks = pytest.importorskip("jacray_workers.blocks.block")
    monkeypatch.setattr(projection, "FACTORED", limit)
    problem, batch = entry("mlp tanh", "float32", "params")
    with problem.session():
        for i, right in enumerate(jacobians(problem, batch)):
            factored = [blocks.as_block(b[None], leaf.shape) for b, leaf in zip(right, problem.leaves, strict=True)]
            raise_if_failed(check(problem, batch, i, jacobian=factored))
            raise_if_failed(check(problem, batch, i, jacobian=[block[0] for block in factored]))
            wrong = [blocks.as_block(flip_one_sign(right)[0][None], problem.leaves[0].shape), *factored[1:]]
            assert not all(c.passed for c in check(problem, batch, i, jacobian=wrong))


def test_one_cast_serves_every_sample_and_the_seed_decides_the_numbers():
    problem, batch = entry("mlp tanh", "float32", "params")
    shared = in_float64(problem)
    with problem.session():
        blocks = jacobians(problem, batch)[0]
        one = [leaf[:1] for leaf in batch]
        first = check_sample(problem, one, 0, Computed(jacobian=blocks), seed=3, double=shared)
        again = check_sample(problem, one, 0, Computed(jacobian=blocks), seed=3)
        other = check_sample(problem, one, 0, Computed(jacobian=blocks), seed=4)
    assert first == again
    assert first != other


def test_the_model_and_its_random_state_are_left_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Flatten())
    problem, batch = job(model, torch.randn(1, 2, 5), training=True)
    before = {name: tensor.clone() for name, tensor in problem.tensors.items()}
    state = torch.get_rng_state()
    with problem.session():
        blocks = [torch.zeros(problem.rows, 2, 5)]
        kept = {name: tensor.clone() for name, tensor in problem.tensors.items()}
        check(problem, batch, 0, jacobian=blocks)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], kept[name]) for name in before)
    assert all(torch.equal(kept[name], problem.tensors[name]) for name in kept)


def test_a_failure_says_what_where_and_how_to_go_on():
    problem, batch = entry("mlp tanh", "float32", "params")
    with problem.session():
        checks = check(problem, batch, 2, jacobian=zero_a_block(jacobians(problem, batch)[2]))
    with pytest.raises(VerificationError) as caught:
        raise_if_failed(checks)
    for part in ("sample 2", "float64 backward", "allowed", "4.bias", "backward_loop", "verify=False"):
        assert part in str(caught.value)


def test_nothing_to_compare_passes():
    problem, batch = job(lambda x: x[:, :0], torch.randn(2, 3))
    with problem.session():
        raise_if_failed(check(problem, batch, 0, jacobian=[torch.zeros(0, 3)]))

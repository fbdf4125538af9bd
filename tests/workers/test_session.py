"""The caller's module, and torch's own state, are as they were: after success and after a failure in the middle."""

from __future__ import annotations

import copy
import functools
import gc
import threading
import weakref

import numpy as np
import pytest
import torch
from jacray_workers.errors import CoupledSamplesError, JacrayError, MethodError
from jacray_workers.kernels import NAMES
from jacray_workers.planning import pricing
from jacray_workers.problem.session import session
from torch import nn
from torch._dynamo import eval_frame
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.utils import parametrizations

from tests.door import compute
from tests.zoo import ENTRIES

ALL = pytest.mark.parametrize("method", ["auto", *NAMES])
# The model below writes to a buffer and keeps state, which defeats some methods; a refusal too must leave no trace.
SURE = ("auto", "backward_loop")


def refused(work):
    """Do it; the error where it is refused."""
    try:
        work()
    except MethodError as error:
        return error
    return None


class Meter:
    """Counts where jacray does not look: what stands in modules themselves begins anew with every pass."""

    calls = 0


class Mixed(nn.Module):
    """Everything that a computation could disturb: modes, flags, grads, hooks, buffers, attributes."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.drop = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3)
        self.last = nn.Linear(6, 3)
        self.last.weight = nn.Parameter(self.last.weight.detach().clone())
        self.first.bias.requires_grad_(False)
        self.calls, self.cache, self.log = 0, None, []
        self.fail_at, self.meter = fail_at, Meter()
        self.count = nn.Buffer(torch.tensor(0))

    def forward(self, x):
        self.calls += 1
        self.count += 1
        self.log.append(x)
        self.meter.calls += 1
        if self.fail_at is not None and self.meter.calls >= self.fail_at:
            raise ZeroDivisionError("the reactor is cold")
        self.cache = self.first(x)
        self.extra = self.cache * 2
        return self.last(self.drop(self.norm(torch.tanh(self.cache))))


def prepared_model(**kwargs) -> Mixed:
    model = Mixed(**kwargs)
    model.train()
    model.norm.eval()
    for parameter in (model.first.weight, model.last.weight):
        parameter.grad = torch.randn_like(parameter)
    model.first.register_forward_hook(lambda _m, _a, y: y + 1.0)
    model.last.register_full_backward_hook(lambda _m, _i, _o: None)
    model.norm.running_mean.normal_()
    model.tag = {"a": 1}
    return model


def portrait(model: nn.Module) -> dict:
    """Everything about a module that a caller could notice."""
    found: dict = {"rng": torch.get_rng_state().clone(), "grad": torch.is_grad_enabled()}
    for name, part in model.named_modules():
        found[name, "mode"] = part.training
        found[name, "attributes"] = {k: id(v) for k, v in part.__dict__.items() if k != "_backward_hooks"}
        found[name, "log"] = list(getattr(part, "log", ()))
        for table in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            found[name, table] = [(k, id(v)) for k, v in getattr(part, table).items()]
        for table in ("_parameters", "_buffers", "_modules"):
            found[name, table] = [(k, id(v)) for k, v in getattr(part, table).items()]
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found[name, "requires_grad"] = parameter.requires_grad
        found[name, "value"] = parameter.detach().clone()
        found[name, "grad"] = None if parameter.grad is None else parameter.grad.clone()
        found[name, "version"] = parameter._version
    for name, buffer in model.named_buffers():
        found[name, "value"] = buffer.clone()
    return found


def same(before: dict, after: dict) -> None:
    assert list(before) == list(after)
    for key, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, after[key]), key
        else:
            assert value == after[key], key


@ALL
@pytest.mark.parametrize("wrt", ["inputs", "params", {"module": "first", "side": "output"}])
@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_left_behind(method, wrt, training):
    model, x = prepared_model(), torch.randn(3, 4)
    before, inputs = portrait(model), x.clone()
    work = functools.partial(
        compute, model, x, wrt=wrt, method=method, training=training, returns=["jacobian", "outputs"]
    )
    if training:
        # Batch norm in training mode couples samples, which is refused.
        with pytest.raises(CoupledSamplesError):
            work()
    else:
        assert refused(work) is None or method not in SURE
    same(before, portrait(model))
    assert torch.equal(x, inputs)
    assert not x.requires_grad
    assert x.grad is None


@ALL
@pytest.mark.parametrize("wrt", ["inputs", "params"])
def test_nothing_is_left_behind_by_a_failure_in_the_middle(method, wrt):
    # The model works for a while and then raises: while planning, or in the middle of a shard.
    for fail_at in (1, 2, 5, 9):
        model, x = prepared_model(fail_at=fail_at), torch.randn(3, 4)
        before = portrait(model)
        with pytest.raises((JacrayError, ZeroDivisionError), match="the reactor is cold"):
            compute(model, x, wrt=wrt, method=method)
        same(before, portrait(model))


def test_batchnorm_statistics_survive_training_mode():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CoupledSamplesError):
        compute(model, torch.randn(6, 4), training=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_random_state_of_a_fresh_process_is_untouched():
    # The first plan of a process measures the machine, which must not draw from the caller's stream either.
    pricing.machine.cache_clear()
    model = nn.Linear(3, 2)
    torch.manual_seed(11)
    np.random.seed(11)  # noqa: NPY002 - the legacy stream is what must stay untouched
    cpu, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    compute(model, torch.ones(4, 3))
    assert torch.equal(cpu, torch.get_rng_state())
    assert (legacy == np.random.get_state()[1]).all()  # noqa: NPY002


def test_a_random_model_sees_the_seed_and_leaves_the_stream():
    model, x = nn.Sequential(nn.Linear(4, 32), nn.Dropout(0.5), nn.Linear(32, 2)), torch.randn(3, 4)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = compute(model, x, training=True, seed=1).jacobian
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(7)
    assert torch.equal(first, compute(model, x, training=True, seed=1).jacobian)
    assert not torch.equal(first, compute(model, x, training=True, seed=2).jacobian)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
def test_the_callers_contexts_neither_matter_nor_change(guard):
    model, x = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 2)), torch.randn(3, 4)
    expected = compute(model, x).jacobian
    with guard():
        inside = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
        found = compute(model, x).jacobian
        assert inside == (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
    torch.testing.assert_close(found, expected)
    assert found.dtype == torch.float32


def test_inputs_made_under_inference_mode():
    with torch.inference_mode():
        x = torch.randn(3, 4)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    torch.testing.assert_close(compute(model, x).jacobian, compute(model, x.clone()).jacobian)


def test_switches_of_torch_come_back():
    before = torch.backends.mha.get_fastpath_enabled()
    model = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    with session(model, training=False, tf32=False, seed=0):
        assert not torch.backends.mha.get_fastpath_enabled()
        assert not any(p.requires_grad for p in model.parameters())
        assert not model.training
    assert torch.backends.mha.get_fastpath_enabled() is before
    assert all(p.requires_grad for p in model.parameters())
    assert model.training


def meddle(model):
    with session(model, training=False, tf32=False, seed=3):
        model.last.register_forward_hook(lambda *_: None)
        model.new_attribute, model.calls = 1, 99
        model.first.weight.requires_grad_(True)
        torch.rand(3)
        raise KeyError("x")


def test_an_exception_inside_a_session_passes_and_restores():
    model = prepared_model()
    before = portrait(model)
    with pytest.raises(KeyError):
        meddle(model)
    same(before, portrait(model))


def test_grads_already_there_are_not_added_to():
    model, x = nn.Linear(4, 2), torch.randn(3, 4, requires_grad=True)
    (model(x).sum()).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    own = x.grad.clone()
    for wrt in ("inputs", "params"):
        compute(model, x, wrt=wrt, method="backward_loop")
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert torch.equal(x.grad, own)
    assert x.requires_grad


def test_a_compiled_module_is_unwrapped_and_kept_compiled():
    model, x = ENTRIES["compiled"].make()
    compute(model, x, wrt="params")
    assert type(model).__name__ == "OptimizedModule"
    with pytest.raises(BackendCompilerFailed, match="the module was compiled"):
        model(x)


def test_sessions_that_overlap_give_the_compilers_stance_back():
    begun, ended = threading.Event(), threading.Event()
    stances = []

    def outlast():
        with session(nn.Linear(2, 2), training=False, tf32=False, seed=None):
            begun.set()
            ended.wait(30)
            stances.append(eval_frame._stance.stance)

    before = eval_frame._stance.stance
    second = threading.Thread(target=outlast)
    with session(nn.Linear(2, 2), training=False, tf32=False, seed=None):
        second.start()
        begun.wait(30)
    ended.set()
    second.join()
    assert stances == ["force_eager"]
    assert eval_frame._stance.stance == before


def test_data_parallel_is_unwrapped():
    inner = nn.Linear(4, 2)
    found = compute(nn.DataParallel(inner), torch.randn(3, 4), wrt="params").jacobian
    assert set(found) == {"weight", "bias"}


def test_parametrized_weights_keep_their_parametrization():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh())
    state = copy.deepcopy(model.state_dict())
    compute(model, torch.randn(3, 4), wrt="params")
    assert torch.nn.utils.parametrize.is_parametrized(model[0], "weight")
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())


def test_shared_modules_stay_shared():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    compute(model, torch.randn(3, 4), wrt="params")
    assert model[0] is model[2]
    assert model[0].weight is layer.weight


def test_models_are_not_kept_alive():
    model = nn.Linear(4, 2)
    compute(model, torch.randn(3, 4))
    compute(model, torch.randn(3, 4), wrt="params")
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_two_threads_share_a_module():
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)), torch.randn(5, 4)
    expected = {t: compute(model, x, training=t, wrt="params", seed=3).jacobian for t in (False, True)}
    wrong: list[str] = []

    def work(training: bool) -> None:
        for _ in range(5):
            found = compute(model, x, training=training, wrt="params", seed=3).jacobian
            wrong.extend(n for n in found if not torch.allclose(found[n], expected[training][n], atol=1e-6))

    threads = [threading.Thread(target=work, args=(t,)) for t in (False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert model.training

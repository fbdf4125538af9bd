"""Run a model without leaving a trace in it: every change that a computation needs is undone when it ends."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from jacray_workers.errors import ModelError

# Not in torch's public names, and not in the stubs either.
_fallback_warnings: Callable[[bool], None] = torch._C._functorch._set_vmap_fallback_warning_enabled  # type: ignore[attr-defined]
_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_GUARD = threading.Lock()
_OWN = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks")


def lock_of(module: nn.Module) -> threading.RLock:
    """One lock per module: two threads must not switch its mode under each other."""
    with _GUARD:
        return _LOCKS.setdefault(module, threading.RLock())


@contextlib.contextmanager
def session(module: nn.Module, *, training: bool, tf32: bool, seed: int | None) -> Iterator[None]:
    """Hold the module in the state that derivatives need; restore the caller's state on the way out.

    Inside: train or eval mode as asked, parameters without `requires_grad`, gradients recorded whatever the caller
    has switched off, no autocast, no fused attention fast path, TF32 as asked, the seed set. Restored after:
    all of these, the modules' attributes, the tables of parameters, buffers and hooks, and the state of torch's
    random generators. `seed` is None for a model that draws no random numbers.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock_of(module))
        stack.enter_context(_kept_attributes(module))
        stack.enter_context(_kept_requires_grad(module))
        stack.enter_context(_FAST_PATH_OFF)
        stack.enter_context(_tf32(tf32))
        stack.enter_context(_NO_FALLBACK_WARNINGS)
        if seed is not None:
            stack.enter_context(_kept_rng())
            seed_generators(seed)
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        _switch(module, training)
        yield


def _switch(module: nn.Module, training: bool) -> None:
    """Put the module into train or eval mode.

    Raises:
        ModelError: training mode was asked of an exported program, whose mode is part of its graph.
    """
    if all(part.training == training for part in module.modules()):
        return
    try:
        module.train(training)
    except NotImplementedError as error:
        if training:
            rule = f"must be able to change its mode, but raised NotImplementedError: {error}"
            raise ModelError("model", rule, type(module).__name__, "export it in training mode") from error


class _FallbackWarnings(contextlib.AbstractContextManager[None]):
    """While any session is open torch does not warn about operators that `vmap` runs in a loop.

    The planner times every method, so a slow one loses without a word to the caller's user. The flag is one for the
    whole process, hence the count.
    """

    def __init__(self) -> None:
        self._open = 0

    def __enter__(self) -> None:
        with _GUARD:
            self._open += 1
            _fallback_warnings(False)

    def __exit__(self, *exc: object) -> None:
        with _GUARD:
            self._open -= 1
            if self._open == 0:
                _fallback_warnings(True)


_NO_FALLBACK_WARNINGS = _FallbackWarnings()


@contextlib.contextmanager
def _kept_attributes(module: nn.Module) -> Iterator[None]:
    """Shallow copies of each submodule's attributes: counters, caches and hook tables come back as they were."""
    saved: list[tuple[nn.Module, dict[str, Any], dict[str, dict[Any, Any]]]] = [
        (m, dict(m.__dict__), {name: dict(m.__dict__[name]) for name in _OWN if name in m.__dict__})
        for m in module.modules()
    ]
    try:
        yield
    finally:
        for m, attributes, tables in saved:
            if not _same(m.__dict__, attributes):
                m.__dict__.clear()
                m.__dict__.update(attributes)
            for name, table in tables.items():
                current = m.__dict__[name]
                if not _same(current, table):
                    current.clear()
                    current.update(table)


def _same(now: dict[Any, Any], before: dict[Any, Any]) -> bool:
    """The same keys in the same order with identical values; equality would ask tensors for a truth value."""
    return list(now) == list(before) and all(now[key] is before[key] for key in now)


@contextlib.contextmanager
def _kept_requires_grad(module: nn.Module) -> Iterator[None]:
    on = [p for p in module.parameters() if p.requires_grad and p.is_leaf]
    for p in on:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in on:
            p.requires_grad_(True)


class _FastPathOff(contextlib.AbstractContextManager[None]):
    """The fused encoder layer records no gradient, and its check for one looks at parameters we have detached.

    The flag is one for the whole process: the first session of several threads takes it, the last one gives it back.
    """

    def __init__(self) -> None:
        self._open = 0
        self._before = True

    def __enter__(self) -> None:
        with _GUARD:
            if self._open == 0:
                self._before = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
            self._open += 1

    def __exit__(self, *exc: object) -> None:
        with _GUARD:
            self._open -= 1
            if self._open == 0:
                torch.backends.mha.set_fastpath_enabled(self._before)


_FAST_PATH_OFF = _FastPathOff()


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    if not torch.cuda.is_available():
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32, cudnn.allow_tf32 = allowed, allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def seed_generators(seed: int) -> None:
    """Seed torch's generators; `torch.manual_seed` would also queue a call for every absent accelerator, a slow one."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


@contextlib.contextmanager
def _kept_rng() -> Iterator[None]:
    cpu = torch.get_rng_state()
    gpus: list[Tensor] = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)

"""Run a model without leaving a trace in it: every change that a computation needs is undone when it ends."""

from __future__ import annotations

import contextlib
import random
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jacray_workers.errors import ModelError
from jacray_workers.problem.state import Snapshot, kept, modules_of
from jacray_workers.sharing import own_draws

# Not in torch's public names, and not in the stubs either.
_fallback_warnings: Callable[[bool], None] = torch._C._functorch._set_vmap_fallback_warning_enabled  # type: ignore[attr-defined]
_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_GUARD = threading.Lock()


def lock_of(module: nn.Module) -> threading.RLock:
    """One lock per module: two threads must not switch its mode under each other."""
    with _GUARD:
        return _LOCKS.get(module) or _LOCKS.setdefault(module, threading.RLock())


@contextlib.contextmanager
def session(
    module: nn.Module, *, training: bool, tf32: bool, seed: int | None, stateful: bool = False
) -> Iterator[None]:
    """Hold the module in the state that derivatives need; restore the caller's state on the way out.

    Inside: train or eval mode as asked, parameters without `requires_grad`, gradients recorded whatever the caller
    has switched off, no autocast, no fused attention fast path, no sparse gradients, compiled functions run as they
    were written, TF32 as asked, the seed set. Restored after: all of these, the modules' attributes, the tables of
    parameters, buffers and hooks, and the state of the random generators. `seed` is None for a model that draws no
    random numbers; with `stateful` what stands in the modules' lists and dicts is restored too.
    """
    parts = modules_of(module)
    with (
        lock_of(module),
        kept(module, deep=stateful, parts=parts),
        _AsleepParameters(parts),
        _Mode(module, parts, training),
        _FAST_PATH_OFF,
        _NO_FALLBACK_WARNINGS,
        _surroundings(tf32, seed),
        torch.enable_grad(),
    ):
        _make_dense(parts)
        yield


def _somebody_compiled() -> bool:
    """Whether the compiler was ever asked for in this process, as far as it tells; its stance is dear to change."""
    frames = sys.modules.get("torch._dynamo.eval_frame")
    if frames is None:
        return False
    known = getattr(frames, "cached_backends", None)
    # None among the backends is torch's own, of functions that it keeps from being compiled.
    return known is None or any(backend is not None for backend in known.values())


class BriefSession(contextlib.AbstractContextManager[None]):
    """What of `session` one pass in eval mode needs whose calls are all looked at; parameters may require gradients.

    Compiled functions within run as they were written; should one be overlooked, its calls are not seen, and nothing is
    made of the pass.

    Args:
        module: the model.
        parts: the module and all within it, whose `train` is torch's own.
    """

    def __init__(self, module: nn.Module, parts: Sequence[nn.Module]) -> None:
        self._lock, self._module, self._parts = lock_of(module), module, parts

    def __enter__(self) -> None:
        self._lock.acquire()
        self._before = Snapshot(self._module, deep=False, parts=self._parts)
        self._awake = [part for part in self._parts if part.training]
        self._compiled = _somebody_compiled()
        if self._compiled:
            _COMPILED_RUNS_EAGER.__enter__()
        for part in self._awake:
            part.__dict__["training"] = False

    def __exit__(self, *exc: object) -> None:
        try:
            for part in self._awake:
                part.__dict__["training"] = True
            if self._compiled:
                _COMPILED_RUNS_EAGER.__exit__(*exc)
            self._before.restore()
        finally:
            self._lock.release()


def _surroundings(tf32: bool, seed: int | None) -> contextlib.AbstractContextManager[Any]:
    """What has to be changed outside of the module, which mostly is nothing."""
    stack = contextlib.ExitStack()
    if torch.cuda.is_available():
        stack.enter_context(_tf32(tf32))
    if seed is not None:
        stack.enter_context(own_draws())
        stack.enter_context(_kept_rng())
        seed_generators(seed)
    if torch.is_inference_mode_enabled():
        stack.enter_context(torch.inference_mode(mode=False))
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
    if "torch._dynamo" in sys.modules:
        stack.enter_context(_COMPILED_RUNS_EAGER)
    return stack


def _make_dense(parts: Sequence[nn.Module]) -> None:
    """Let no table of embeddings give sparse gradients; the attributes come back with all others."""
    for part in parts:
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse:
            part.sparse = False


class _Mode(contextlib.AbstractContextManager[None]):
    """Train or eval mode while it is open.

    Raises:
        ModelError: training mode was asked of an exported program, whose mode is part of its graph.
    """

    def __init__(self, module: nn.Module, parts: Sequence[nn.Module], training: bool) -> None:
        self._module, self._training = module, training
        self._others = [part for part in parts if part.training != training]

    def __enter__(self) -> None:
        if all(type(part).train is nn.Module.train and "training" in part.__dict__ for part in self._others):
            # The flag alone: setting attributes of a module the usual way costs small models dear.
            for part in self._others:
                part.__dict__["training"] = self._training
        elif self._others:
            self._switch()

    def __exit__(self, *exc: object) -> None:
        for part in self._others:
            if "training" in part.__dict__:
                part.__dict__["training"] = not self._training
            else:
                part.training = not self._training

    def _switch(self) -> None:
        try:
            self._module.train(self._training)
        except NotImplementedError as error:
            if self._training:
                rule = f"must be able to change its mode, but raised NotImplementedError: {error}"
                way_out = "export it in training mode"
                raise ModelError("model", rule, type(self._module).__name__, way_out) from error


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


class _AsleepParameters(contextlib.AbstractContextManager[None]):
    """Parameters do not require gradients while it is open."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        found = (p for part in parts for p in part._parameters.values() if p is not None)
        self._awake = [p for p in found if p.requires_grad and p.is_leaf]

    def __enter__(self) -> None:
        for p in self._awake:
            p.requires_grad_(False)

    def __exit__(self, *exc: object) -> None:
        for p in self._awake:
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


class _CompiledRunsEager(contextlib.AbstractContextManager[None]):
    """Compiled functions inside a model run as they were written, for derivatives go through the operators they call.

    The compiler's stance is one for the whole process too, so sessions of several threads take turns as above: each
    giving back what it had found would leave the stance of another behind.
    """

    def __init__(self) -> None:
        self._open = 0
        self._stance: Any = None

    def __enter__(self) -> None:
        with _GUARD:
            if self._open == 0:
                self._stance = torch.compiler.set_stance("force_eager")
                self._stance.__enter__()
            self._open += 1

    def __exit__(self, *exc: object) -> None:
        with _GUARD:
            self._open -= 1
            if self._open == 0:
                self._stance.__exit__(None, None, None)


_COMPILED_RUNS_EAGER = _CompiledRunsEager()


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32, cudnn.allow_tf32 = allowed, allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def seed_generators(seed: int) -> None:
    """Seed torch's, numpy's and Python's generators.

    `torch.manual_seed` would also queue a call for every absent accelerator, a slow one.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - models that draw from numpy's global stream are meant
    random.seed(seed)


class Draws:
    """The states of the global random generators when it was made."""

    def __init__(self) -> None:
        self._torch = torch.get_rng_state()
        self._numpy: Any = np.random.get_state()  # noqa: NPY002
        self._python = random.getstate()
        self._gpus: list[Tensor] = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def happened(self) -> bool:
        """Whether a number was drawn since."""
        now: Any = np.random.get_state()  # noqa: NPY002
        numpys = now[2] == self._numpy[2] and np.array_equal(now[1], self._numpy[1])
        alike = numpys and random.getstate() == self._python and torch.equal(torch.get_rng_state(), self._torch)
        return not (alike and all(map(torch.equal, torch.cuda.get_rng_state_all() if self._gpus else [], self._gpus)))

    def undo(self) -> None:
        """Go back to them."""
        torch.set_rng_state(self._torch)
        np.random.set_state(self._numpy)  # noqa: NPY002
        random.setstate(self._python)
        if self._gpus:
            torch.cuda.set_rng_state_all(self._gpus)


@contextlib.contextmanager
def _kept_rng() -> Iterator[None]:
    before = Draws()
    try:
        yield
    finally:
        before.undo()

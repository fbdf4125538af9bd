"""JAX under `jit`, in the same process, on the same weights."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from benchmarks.sides.torch_func import COPIES, must_fit, tangents
from benchmarks.task import Arrays, CannotError, Ready, Side, Task


def loaded(task: Task) -> Any:
    """JAX, computing where the task's tensors are.

    Raises:
        CannotError: it is not installed, or not for this device.
    """
    if importlib.util.find_spec("jax") is None:
        raise CannotError("jax is not installed")
    kind = "cpu" if task.x.device.type == "cpu" else "gpu"
    if kind == "cpu":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # It would take three quarters of a card before torch asks for any.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    if jax.default_backend() != kind:
        raise CannotError(f"jax computes on {jax.default_backend()} here, where {kind} is asked for")
    # Its default rounds float32 to TF32 on a GPU; nobody else does here.
    jax.config.update("jax_default_matmul_precision", "highest")
    return jax


def reverse(task: Task) -> Ready:
    """`jit(vmap(jacrev(f)))`, and for tangent kernels its contraction inside the same `jit`."""
    jax = loaded(task)
    must_fit(COPIES * task.dense_bytes())
    return _ready(task, jax.jacrev)


def forward(task: Task) -> Ready:
    """`jit(vmap(jacfwd(f)))`."""
    jax = loaded(task)
    if task.by_parameters:
        columns = sum(p.numel() for p in task.parameters().values())
        raise CannotError(f"a tangent per parameter: {columns:,} of them")
    columns = tangents(task)
    must_fit(COPIES * max(task.x.shape[0] * columns**2 * 4, task.dense_bytes()))
    return _ready(task, jax.jacfwd)


def forward_by_samples(task: Task) -> Ready:
    """`jit(map(jacfwd(f)))`: sample after sample within one program.

    For the transformers, whose `jit(vmap(jacfwd(f)))` is wrong by some percent in the JAX pinned here (found by the
    check; without `jit` or without `vmap` it is right).
    """
    jax = loaded(task)
    if not isinstance(task.case.request.get("wrt"), dict):
        raise CannotError("vmap(jacfwd) is right here, and faster")
    tangents(task)
    return _ready(task, jax.jacfwd, batched=False)


def _ready(task: Task, transform: Any, *, batched: bool = True) -> Ready:
    import jax

    from benchmarks.sides import jax_nets

    function = jax_nets.net(task.model)
    every = jax_nets.weights(task.model)
    point = jax.numpy.asarray(task.point.detach().cpu().numpy())
    if not task.by_parameters:
        one = transform(function, argnums=1)
        over_samples = jax.vmap(one, in_axes=(None, 0))
        if not batched:
            over_samples = lambda w, xs: jax.lax.map(lambda x: one(w, x), xs)  # noqa: E731 - the other way round
        compiled = jax.jit(over_samples)
        return Ready(lambda: compiled(every, point).block_until_ready(), lambda J: {"": jax_nets.tensor(J)})
    chosen = {name: every[name] for name in task.names}
    rest = {name: value for name, value in every.items() if name not in chosen}
    jacobian = jax.vmap(transform(lambda p, r, x: function({**p, **r}, x)), in_axes=(None, None, 0))

    if task.case.returns == "ntk":
        compiled = jax.jit(lambda p, r, x: _contracted(jacobian(p, r, x)))
        return Ready(lambda: compiled(chosen, rest, point).block_until_ready(), lambda K: {"ntk": jax_nets.tensor(K)})
    compiled = jax.jit(jacobian)

    def read(found: Any) -> Arrays:
        return {name: jax_nets.tensor(J) for name, J in found.items()}

    return Ready(lambda: jax.block_until_ready(compiled(chosen, rest, point)), read)


def _contracted(blocks: Any) -> Any:
    import jax.numpy as jnp

    flat = [J.reshape(*J.shape[:2], -1) for J in blocks.values()]
    return sum(jnp.einsum("iap,jbp->ijab", J, J) for J in flat)


SIDES = (
    Side("JAX jit(vmap(jacrev))", reverse),
    Side("JAX jit(vmap(jacfwd))", forward),
    Side("JAX jit(map(jacfwd))", forward_by_samples),
)

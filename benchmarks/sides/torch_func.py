"""What comes with torch: `torch.func` and `torch.autograd.functional`, each as its documentation writes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacfwd, jacrev, vmap

from benchmarks.memory import available
from benchmarks.task import Arrays, CannotError, Ready, Side, Task

# A dense Jacobian is made, often copied once into the right layout, and the passes hold as much again.
COPIES = 2.5
# Both torch's and JAX's vmap(jacfwd) were tried with 12,288.
MOST_TANGENTS = 10_000
# Of the tangent kernel by single products; 2,048 of them through 4 million parameters took over a minute a call.
PRODUCTS = 500


def frozen(task: Task) -> Task:
    """The task with parameters that ask for no gradient: nothing is recorded for them, which is fastest for peers."""
    task.model.requires_grad_(False)
    return task


def must_fit(bytes_needed: float) -> None:
    """Refuse what would push the machine out of memory.

    Raises:
        CannotError: naming both figures.
    """
    if bytes_needed > available():
        raise CannotError(f"would need about {bytes_needed / 1e9:.0f} GB where {available() / 1e9:.0f} GB are free")


def function_of_parameters(model: nn.Module) -> Any:
    """One sample's outputs from `(parameters, sample)`."""

    def function(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, parameters, (sample.unsqueeze(0),)).squeeze(0)

    return function


def parameter_jacobian(task: Task) -> Any:
    """`vmap(jacrev(f))` over the parameters, as torch's tutorial on Jacobians and on tangent kernels has it."""
    jacobian = vmap(jacrev(function_of_parameters(task.model)), (None, 0))
    parameters = {name: p.detach() for name, p in task.parameters().items()}
    return lambda: jacobian(parameters, task.x)


def vmap_jacrev(task: Task) -> Ready:
    """`vmap(jacrev(f))`."""
    frozen(task)
    must_fit(COPIES * task.dense_bytes())
    if task.case.returns == "ntk":
        return contraction(task)
    if task.by_parameters:
        return Ready(parameter_jacobian(task), dict)
    tail, point = task.tail, task.point
    jacobian = vmap(jacrev(lambda e: tail(e.unsqueeze(0)).squeeze(0)))
    return Ready(lambda: jacobian(point), lambda J: {"": J})


def vmap_jacfwd(task: Task) -> Ready:
    """`vmap(jacfwd(f))`: a tangent per input number."""
    frozen(task)
    if task.by_parameters:
        columns = sum(p.numel() for p in task.parameters().values())
        raise CannotError(f"a tangent per parameter: {columns:,} of them, each as large as a parameter")
    tail, point = task.tail, task.point
    columns = tangents(task)
    # Its identity of tangents, one per sample and column.
    must_fit(COPIES * max(point.shape[0] * columns**2 * 4, task.dense_bytes()))
    jacobian = vmap(jacfwd(lambda e: tail(e.unsqueeze(0)).squeeze(0)))
    return Ready(lambda: jacobian(point), lambda J: {"": J})


def tangents(task: Task) -> int:
    """How many tangents a sample takes.

    Raises:
        CannotError: so many that one call takes minutes, and more memory than many machines have.
    """
    columns = task.point[0].numel()
    if columns > MOST_TANGENTS:
        raise CannotError(f"{columns:,} tangents a sample at once: for MiniLM 20 GB and three minutes a call")
    return columns


def functional_jacobian(task: Task) -> Ready:
    """`torch.autograd.functional.jacobian(vectorize=True)`.

    With respect to inputs of the batch's summed outputs, so that it does not compute the zeros between samples; with
    respect to parameters sample by sample, since it knows no batch there.
    """
    from torch.autograd.functional import jacobian

    must_fit(COPIES * task.dense_bytes())
    if task.case.returns == "ntk":
        raise CannotError("makes Jacobians; their contraction is timed with torch.func's, which are faster")
    if not task.by_parameters:
        frozen(task)
        tail, point = task.tail, task.point
        rows = len(task.out_shape)
        return Ready(
            lambda: jacobian(lambda e: tail(e).sum(0), point, vectorize=True),
            lambda J: {"": J.movedim(rows, 0)},
        )
    names = task.names
    values = tuple(p.detach() for p in task.parameters().values())

    def one(sample: Tensor) -> Any:
        def function(*parameters: Tensor) -> Tensor:
            named = dict(zip(names, parameters, strict=True))
            return functional_call(task.model, named, (sample.unsqueeze(0),)).squeeze(0)

        return jacobian(function, values, vectorize=True)

    def read(found: list[tuple[Tensor, ...]]) -> Arrays:
        return {name: torch.stack([J[i] for J in found]) for i, name in enumerate(names)}

    return Ready(lambda: [one(sample) for sample in task.x], read)


def contraction(task: Task) -> Ready:
    """The NTK by contracting Jacobians: torch's tutorial `neural_tangent_kernels`, "Jacobian contraction"."""
    jacobian = parameter_jacobian(task)

    def call() -> Tensor:
        blocks = [J.flatten(2) for J in jacobian().values()]
        return torch.stack([torch.einsum("Naf,Mbf->NMab", J, J) for J in blocks]).sum(0)

    return Ready(call, lambda K: {"ntk": K})


def ntk_vector_products(task: Task) -> Ready:
    """The NTK by products with rows of the identity: the same tutorial's other way."""
    frozen(task)
    if task.case.returns != "ntk":
        raise CannotError("gives tangent kernels only")
    products = task.x.shape[0] ** 2 * task.out_shape[0]
    if products > PRODUCTS:
        raise CannotError(f"a pull-back and a push-forward for each of {products:,} pairs and outputs: minutes a call")
    function = function_of_parameters(task.model)
    parameters = {name: p.detach() for name, p in task.parameters().items()}

    def pair(x1: Tensor, x2: Tensor) -> Tensor:
        def product(cotangent: Tensor) -> Tensor:
            _, vjp = torch.func.vjp(lambda p: function(p, x1), parameters)
            _, pushed = torch.func.jvp(lambda p: function(p, x2), (parameters,), vjp(cotangent))
            return pushed

        eye = torch.eye(task.out_shape[0], dtype=task.x.dtype, device=task.x.device)
        return vmap(product)(eye)

    kernel = vmap(vmap(pair, (None, 0)), (0, None))
    return Ready(lambda: kernel(task.x, task.x), lambda K: {"ntk": K})


def analytic(task: Task) -> Ready:
    """The derivative written by hand, where it is one line."""
    if task.case.key != "row-sums":
        raise CannotError("no one-line formula")
    return Ready(lambda: 2 * task.x, lambda J: {"": J})


SIDES = (
    Side("vmap(jacrev)", vmap_jacrev),
    Side("vmap(jacfwd)", vmap_jacfwd),
    Side("autograd.functional.jacobian", functional_jacobian),
    Side("NTK-vector products (torch.func)", ntk_vector_products),
    Side("analytic 2x", analytic),
)

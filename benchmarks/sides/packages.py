"""Packages on torch that give Jacobians or tangent kernels with respect to parameters, or of any graph."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.sides.torch_func import COPIES, frozen, must_fit
from benchmarks.task import Arrays, CannotError, Ready, Side, Task, split_flat


def needs(module: str) -> Any:
    """Import a peer.

    Raises:
        CannotError: it is not installed, or does not load here.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except (ImportError, RuntimeError, OSError) as error:
        raise CannotError(f"{module} does not load here: {str(error).splitlines()[0]}") from None


def of_parameters_only(task: Task) -> None:
    """Refuse tasks with respect to inputs."""
    if not task.by_parameters:
        raise CannotError("differentiates parameters only")


def all_parameters(task: Task) -> None:
    """Refuse tasks over a choice of parameters."""
    if len(task.names) != len(list(task.model.parameters())):
        raise CannotError("differentiates all parameters of the model")


def made_of(task: Task, kinds: tuple[type[nn.Module], ...], whose: str) -> None:
    """Refuse models with a layer that the peer has no rule for."""
    for module in task.model.modules():
        if not list(module.children()) and not isinstance(module, kinds):
            raise CannotError(f"{whose} has no rule for {type(module).__name__}")
        if isinstance(module, nn.MultiheadAttention):
            raise CannotError(f"{whose} has no rule for MultiheadAttention")


PLAIN = (nn.Linear, nn.Conv2d, nn.ReLU, nn.Tanh, nn.Flatten)


def per_output(task: Task, gradients: Callable[[Tensor], list[Tensor]]) -> Ready:
    """A pass per output over the whole batch; `gradients` gives `(B, *param)` each for one output's sum."""
    flat = len(task.out_shape) == 1

    def call() -> list[list[Tensor]]:
        y = task.model(task.x)
        return [gradients(y[:, k].sum()) for k in range(y.shape[1])] if flat else [gradients(y.sum())]

    def read(found: list[list[Tensor]]) -> Arrays:
        axis = [torch.stack(parts, dim=1) if flat else parts[0] for parts in zip(*found, strict=True)]
        return dict(zip(task.names, axis, strict=True))

    return Ready(call, read)


def backpack(task: Task) -> Ready:
    """BackPACK's `BatchGrad`, one backward per output over one forward."""
    of_parameters_only(task)
    all_parameters(task)
    if task.case.returns == "ntk":
        raise CannotError("gives gradients per sample, no tangent kernel")
    package = needs("backpack")
    extensions = needs("backpack.extensions")
    made_of(task, PLAIN, "BackPACK")
    must_fit(COPIES * task.dense_bytes())
    model = package.extend(task.model)
    parameters = list(model.parameters())

    def gradients(total: Tensor) -> list[Tensor]:
        with package.backpack(extensions.BatchGrad(), retain_graph=True):
            total.backward(retain_graph=True, inputs=parameters)
        found = [p.grad_batch for p in parameters]
        for p in parameters:
            del p.grad_batch
            p.grad = None
        return found

    return per_output(task, gradients)


def opacus(task: Task) -> Ready:
    """Opacus' `GradSampleModule`, one backward per output over one forward."""
    of_parameters_only(task)
    all_parameters(task)
    if task.case.returns == "ntk":
        raise CannotError("gives gradients per sample, no tangent kernel")
    package = needs("opacus")
    made_of(task, PLAIN, "opacus")
    if task.out_shape != (1,):
        raise CannotError("one gradient per sample and forward: its hooks keep no activations for a second output")
    # Its hooks keep activations in training mode only; no layer here behaves otherwise in it.
    wrapped = package.GradSampleModule(task.model.train(), loss_reduction="sum")

    def call() -> list[Tensor]:
        wrapped.zero_grad()
        wrapped(task.x).sum().backward()
        found = [p.grad_sample for p in wrapped.parameters()]
        for p in wrapped.parameters():
            p.grad_sample, p.grad = None, None
        return found

    return Ready(call, lambda found: {n: g.unsqueeze(1) for n, g in zip(task.names, found, strict=True)})


def torchjd(task: Task) -> Ready:
    """TorchJD: `autojac.jac`, and for tangent kernels `autogram.Engine`."""
    needs("torchjd")
    if task.case.returns == "ntk":
        return torchjd_gramian(task)
    jac = needs("torchjd.autojac").jac
    must_fit(COPIES * task.dense_bytes())
    if not task.by_parameters:
        frozen(task)
        tail, point = task.tail, task.point
        rows = len(task.out_shape)

        def call() -> Tensor:
            e = point.detach().requires_grad_(True)
            # Summed over the batch: it knows no batch, and would compute the zeros between samples.
            return jac(tail(e).sum(0), e)[0]

        return Ready(call, lambda J: {"": J.reshape(*task.out_shape, *point.shape).movedim(rows, 0)})
    parameters = list(task.parameters().values())

    def read(found: list[tuple[Tensor, ...]]) -> Arrays:
        return {name: torch.stack([J[i] for J in found]) for i, name in enumerate(task.names)}

    return Ready(lambda: [jac(task.model(x.unsqueeze(0))[0], parameters) for x in task.x], read)


def torchjd_gramian(task: Task) -> Ready:
    """The Gramian of all outputs of all samples, which is the tangent kernel."""
    engine = needs("torchjd.autogram").Engine(task.model, batch_dim=0)

    def read(gramian: Tensor) -> Arrays:
        return {"ntk": gramian.transpose(1, 2).detach()}

    return Ready(lambda: engine.compute_gramian(task.model(task.x)), lambda found: read(_square(found, task)))


def _square(gramian: Tensor, task: Task) -> Tensor:
    """`(B, O, B, O)` from TorchJD, whose second half of axes may come mirrored."""
    batch, out = task.x.shape[0], task.out_shape[0]
    if gramian.shape == (batch, out, out, batch):
        gramian = gramian.transpose(2, 3)
    return gramian.reshape(batch, out, batch, out)


def laplace(task: Task, backend: str, module: str) -> Ready:
    """A Jacobian backend of laplace-torch: `(B, O, P)` over all parameters, or over a last layer from its features.

    Its BackPACK backend is left out: those are BackPACK's passes, which stand here by themselves, with a forward more
    per output; and it takes BackPACK's hooks off every model of the process.
    """
    of_parameters_only(task)
    curvature = needs(module)
    if task.case.returns == "ntk":
        raise CannotError("its tangent kernels are contractions of the Jacobians")
    must_fit(COPIES * task.dense_bytes())
    if len(task.names) != len(list(task.model.parameters())):
        return laplace_last_layer(task, backend)
    if backend == "AsdlInterface":
        made_of(task, PLAIN, "ASDL")
    task.model.output_size = task.out_shape[0]
    interface = getattr(curvature, backend)(task.model, "classification")
    return Ready(lambda: interface.jacobians(task.x)[0], lambda J: split_flat(J, task))


def laplace_last_layer(task: Task, backend: str) -> Ready:
    """Laplace's Jacobian of the last layer, dense as it makes it."""
    if backend != "CurvatureInterface":
        raise CannotError("the last layer's Jacobian is the same in every backend of Laplace")
    # An outer product, then a copy of it beside the bias.
    must_fit(2.2 * task.dense_bytes())
    features = needs("laplace.utils.feature_extractor").FeatureExtractor(task.model, last_layer_name="head")
    features(task.x)
    interface = needs("laplace.curvature").CurvatureInterface(features, "classification", last_layer=True)
    return Ready(lambda: interface.last_layer_jacobians(task.x)[0], lambda J: split_flat(J, task))


def nngeometry(task: Task) -> Ready:
    """NNGeometry's dense Jacobian, or its Gram matrix for tangent kernels."""
    of_parameters_only(task)
    all_parameters(task)
    needs("nngeometry")
    backend = needs("nngeometry.backend").TorchHooksJacobianBackend
    made_of(task, PLAIN, "NNGeometry")
    must_fit(COPIES * task.dense_bytes())
    data = torch.utils.data.TensorDataset(task.x, torch.zeros(len(task.x)))
    loader = torch.utils.data.DataLoader(data, batch_size=len(task.x))
    if task.case.returns == "ntk":
        return Ready(
            lambda: backend(model=task.model).get_gram_matrix(loader),
            lambda G: {"ntk": G.permute(1, 3, 0, 2)},
        )
    return Ready(lambda: backend(model=task.model).get_jacobian(loader), lambda J: _split_ours(J, task))


def _split_ours(J: Tensor, task: Task) -> Arrays:
    return split_flat(J.movedim(0, 1), task)


SIDES = (
    Side("BackPACK", backpack),
    Side("opacus", opacus),
    Side("TorchJD", torchjd),
    Side("Laplace (default)", lambda task: laplace(task, "CurvatureInterface", "laplace.curvature")),
    Side("Laplace (ASDL)", lambda task: laplace(task, "AsdlInterface", "laplace.curvature.asdl")),
    Side("NNGeometry", nngeometry),
)

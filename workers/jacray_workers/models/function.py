"""A formula as a module: the expression of one sample, mapped over the batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from jacray_workers.errors import ModelError, Plain, UserError
from jacray_workers.models.expression import parse
from jacray_workers.models.formula import FunctionModel
from jacray_workers.nested import tensor_of


class FormulaModule(nn.Module):
    """Evaluates expressions for every sample of a batch.

    Inputs come positionally in the order of the spec's `inputs`, or by name. A list of expressions is stacked along
    a new first axis of the sample's output; a mapping gives a dict of outputs.
    """

    def __init__(self, spec: FunctionModel) -> None:
        super().__init__()
        self.expression: Any = spec.expression
        self.names = spec.input_names
        for name, value in spec.constants.items():
            # Double precision, cast where it is used, so that 0.1 means the same in every precision.
            self.register_buffer(name, tensor_of(value, f"constants.{name}"))
        for name, value in spec.parameters.items():
            tensor = tensor_of(value, f"parameters.{name}", torch.get_default_dtype())
            self.register_parameter(name, nn.Parameter(tensor))
        self._parsed = {text: parse(text) for text in _texts(spec.expression)}
        self._sized: set[tuple[tuple[int, ...], ...]] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the sizes seen, which belong to one process."""
        return {**self.__dict__, "_sized": set()}

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        """The value for each sample.

        Args:
            args: the inputs in order, each `(B, ...)`.
            kwargs: the inputs by name.

        Raises:
            ModelError: an input is missing or has no name here.
        """
        batch = self._named(args, kwargs)
        self._check_sizes(batch)
        return torch.vmap(self._sample)(batch)

    def _named(self, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
        named = dict(zip(self.names, args, strict=False)) | kwargs
        if len(args) > len(self.names) or set(named) != set(self.names):
            got = ", ".join([*(f"input {i}" for i in range(len(args))), *kwargs])
            raise ModelError("model", f"takes the inputs {', '.join(self.names)}", got, "name them in `inputs`")
        return named

    def _check_sizes(self, batch: Mapping[str, Tensor]) -> None:
        """Run new shapes without data once: an expression that blows up is refused before it allocates."""
        shapes = tuple(tuple(batch[name].shape[1:]) for name in self.names)
        if shapes not in self._sized:
            blank = {n: torch.empty(s, device="meta") for n, s in zip(self.names, shapes, strict=True)}
            own = {n: torch.empty_like(t, device="meta") for n, t in self._own().items()}
            try:
                self._value(self.expression, {**own, **blank})
            except (RuntimeError, IndexError, TypeError, ValueError) as error:
                raise _unfit(error, dict(zip(self.names, shapes, strict=True))) from None
            self._sized.add(shapes)

    def _own(self) -> dict[str, Tensor]:
        return {**dict(self.named_buffers()), **dict(self.named_parameters())}

    def _sample(self, inputs: Mapping[str, Tensor]) -> Any:
        like = next((t for t in inputs.values() if t.is_floating_point()), None)
        dtype = torch.get_default_dtype() if like is None else like.dtype
        constants = {name: tensor.to(dtype) for name, tensor in self.named_buffers()}
        return self._value(self.expression, {**inputs, **constants, **dict(self.named_parameters())})

    def _value(self, expression: Any, values: Mapping[str, Tensor]) -> Any:
        if isinstance(expression, Mapping):
            return {name: self._value(part, values) for name, part in expression.items()}
        if isinstance(expression, tuple):
            return torch.stack([self._value(part, values) for part in expression])
        found = self._parsed[expression](values)
        if isinstance(found, list):
            raise ModelError("model", "must give a tensor", f"a list from {expression}", "use stack([...])")
        if isinstance(found, Tensor):
            return found
        like = next(iter(values.values()))
        return torch.full((), found, dtype=like.dtype if like.is_floating_point() else None, device=like.device)


def _unfit(error: Exception, shapes: Mapping[str, tuple[int, ...]]) -> ModelError:
    """What torch or the grammar found wrong, once the shapes were known."""
    if isinstance(error, UserError):
        return ModelError(f"model.{error.argument}", error.rule, error.value, error.way_out)
    shown = ", ".join(f"{name}: {list(shape)}" for name, shape in shapes.items())
    return ModelError("model.expression", f"cannot be evaluated: {error}", Plain(f"a sample of shape {shown}"))


def _texts(expression: Any) -> set[str]:
    if isinstance(expression, Mapping):
        return {text for part in expression.values() for text in _texts(part)}
    return set(expression) if isinstance(expression, tuple) else {expression}

"""The one request vocabulary: the same names in Python, in YAML and over HTTP."""

from __future__ import annotations

import re
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from jacray_workers.errors import Plain, RequestError
from jacray_workers.validation import explain

Method = Literal["auto", "reverse", "forward", "backward_loop", "layerwise", "chain"]
Return = Literal[
    "outputs",
    "jacobian",
    "weighted_gradient",
    "jvp",
    "mean_jacobian",
    "norms",
    "singular_values",
    "logabsdet",
    "gram",
    "ntk",
    "ggn",
    "fisher",
]
METHODS: tuple[str, ...] = get_args(Method)
RETURNS: tuple[str, ...] = get_args(Return)
DTYPES = ("float64", "float32", "bfloat16", "float16")
_BYTES = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(%|[kKMGT]i?B|B)?\s*$")
_SCALE = {"k": 10, "K": 10, "M": 20, "G": 30, "T": 40}


class ModulePoint(BaseModel):
    """A point inside the model: the input or the output of a named submodule."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    module: str
    side: Literal["input", "output"] = "output"

    @property
    def key(self) -> str:
        """The name this point has in results, as in `encoder.layer.3:output`."""
        return f"{self.module}:{self.side}"


Wrt = str | ModulePoint


class Request(BaseModel):
    """What to compute. Immutable; every field has the same name in Python, YAML and HTTP.

    Attributes:
        wrt: what to differentiate with respect to: `inputs`, `inputs.NAME`, `params`, a glob over parameter
            names, `{module: NAME, side: input | output}`, or a list of these.
        returns: which results to compute; each becomes an attribute of the result.
        weights: the cotangents k of `weighted_gradient`, with as many axes as one sample's output (the same for
            every sample), one more (one per sample) or two more (K of them); a pytree of such for a pytree of
            outputs. None means 1 for a scalar output.
        vectors: the tangents v of `jvp`, with as many axes as what is differentiated, one more or two more; a dict
            by name for several. With `ggn`, `fisher` and `gram`: the vectors to multiply by.
        reduction: `sum` adds parameter gradients over the batch as `backward` does; `none` keeps one per sample.
        outputs: which outputs: None for all, indices into one sample's flattened output, the name of one output,
            a dict from output name to indices, or `{module: NAME}` for a hidden output.
        method: how to compute; `auto` chooses and says why.
        chunk_size: samples in flight at a time; None lets the plan choose from the memory budget.
        memory_budget: a bound on peak memory: bytes, a text such as `2GiB` or `50%`, or a share (0, 1] of what is
            free. None is a safe default.
        form: `auto` keeps parameter blocks in factors where that is smaller, `dense` never, `factors` always where
            the method has them.
        dtype: the precision to compute in; None keeps the model's own.
        verify: True or False, or how many samples to check; None is on for jobs and off for the bare functions.
        seed: fixes every random draw of a job: dropout masks, the check's directions.
        device: `auto` takes the first GPU where there is one; else a torch device name.
        training: True runs the model in training mode; by default it is evaluated in eval mode.
        nan_policy: `propagate` keeps non-finite values, counts and locates them; `raise` refuses them.
        tf32: lets matrix products on a GPU round to TF32.
        loss: the loss whose output Hessian stands in `ggn` and whose likelihood stands in `fisher`.
        ntk: `full` keeps all pairs of outputs, `trace` sums the diagonal over outputs.
        top_k: how many of the largest singular values; None for all.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    wrt: Wrt | tuple[Wrt, ...] = "inputs"
    returns: tuple[Return, ...] = ("jacobian",)
    weights: Any = None
    vectors: Any = None
    reduction: Literal["sum", "none"] = "sum"
    outputs: Any = None
    method: Method = "auto"
    chunk_size: int | None = Field(default=None, ge=1, le=2**53)
    memory_budget: int | float | str | None = None
    form: Literal["auto", "dense", "factors"] = "auto"
    dtype: Literal["float64", "float32", "bfloat16", "float16"] | None = None
    verify: bool | int | None = None
    seed: int = Field(default=0, ge=0, lt=2**63)
    device: str = "auto"
    training: bool = False
    nan_policy: Literal["propagate", "raise"] = "propagate"
    tf32: bool = False
    loss: Literal["cross_entropy", "mse"] = "cross_entropy"
    ntk: Literal["full", "trace"] = "full"
    top_k: int | None = Field(default=None, ge=1, le=2**53)

    @field_validator("returns", mode="before")
    @classmethod
    def _one_return_is_a_list(cls, value: Any) -> Any:
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list | tuple | set | frozenset) or not names:
            raise ValueError(f"a list of at least one of {', '.join(RETURNS)}")
        return tuple(dict.fromkeys(names)) if all(isinstance(name, str) for name in names) else tuple(names)

    @field_validator("wrt", mode="before")
    @classmethod
    def _wrt_is_not_empty(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            if not value:
                raise ValueError("at least one of inputs, inputs.NAME, params, a parameter glob, {module: NAME}")
            return tuple(value)
        return value

    @field_validator("dtype", mode="before")
    @classmethod
    def _dtype_by_name(cls, value: Any) -> Any:
        return str(value).removeprefix("torch.") if value is not None and not isinstance(value, str) else value

    @field_validator("device", mode="before")
    @classmethod
    def _device_by_name(cls, value: Any) -> Any:
        name = str(value) if type(value).__name__ == "device" else value
        if isinstance(name, str) and name.partition(":")[0] == "meta":
            raise ValueError("a device that computes, such as cpu or cuda:0")
        return name

    @field_validator("memory_budget", mode="before")
    @classmethod
    def _budget_has_a_meaning(cls, value: Any) -> Any:
        # Before pydantic's own checks, which take True for 1.
        if isinstance(value, int | float | str):
            budget_bytes(value, free=1 << 40)
        return value

    @property
    def wrt_list(self) -> tuple[Wrt, ...]:
        """The targets as a tuple, whether one was given or several."""
        return self.wrt if isinstance(self.wrt, tuple) else (self.wrt,)


def make_request(request: Request | None = None, **fields: Any) -> Request:
    """Build a request from keyword arguments, or change some fields of one.

    Raises:
        RequestError: naming the field, the rule, the value, and for an unknown field the nearest known one.
    """
    base = {} if request is None else {name: getattr(request, name) for name in request.model_fields_set}
    try:
        return Request.model_validate({**base, **fields})
    except ValidationError as error:
        raise RequestError(*explain(error, Request)) from None


def budget_bytes(budget: int | float | str, free: int) -> int:
    """What a memory budget means in bytes, given how many are free.

    Raises:
        ValueError: the budget is not a positive number of bytes, nor a share in (0, 1], nor a text like `2GiB`.
    """
    rule = "a positive number of bytes, a share of free memory in (0, 1], or a text such as 2GiB or 50%"
    if isinstance(budget, str):
        match = _BYTES.match(budget)
        if match is None:
            raise ValueError(rule)
        number, unit = float(match[1]), match[2] or "B"
        if unit == "%":
            share = number / 100
            if not 0 < share <= 1:
                raise ValueError(rule)
            return int(share * free)
        # A decimal prefix (GB) counts in powers of ten and a binary one (GiB) in powers of two.
        power = _SCALE.get(unit[0], 0)
        scale = 2**power if "i" in unit else 10 ** (power // 10 * 3)
        if number * scale >= 2**63:
            raise ValueError(rule)
        budget = int(number * scale)
    # Compared, not asked whether they are finite: whole numbers may be too large to be made floats.
    if isinstance(budget, bool) or not 0 < budget < 2**63:
        raise ValueError(rule)
    return int(budget * free) if isinstance(budget, float) and budget <= 1 else int(budget)


def plain(text: str) -> Plain:
    """A phrase shown without quotes in an error."""
    return Plain(text)

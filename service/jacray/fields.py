"""The request vocabulary as keyword arguments, so that editors and type checkers know them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from jacray_workers.request import Method, ModulePoint, Return

if TYPE_CHECKING:
    import torch

Target = str | ModulePoint | Mapping[str, str]


class Fields(TypedDict, total=False):
    """The fields of a request that every function takes; `Request` says what each means."""

    wrt: Target | Sequence[Target]
    vectors: Any
    reduction: Literal["sum", "none"]
    outputs: Any
    method: Method
    chunk_size: int | None
    memory_budget: int | float | str | None
    form: Literal["auto", "dense", "factors"]
    dtype: torch.dtype | Literal["float64", "float32", "bfloat16", "float16"] | None
    verify: bool | int | None
    seed: int
    device: torch.device | str
    training: bool
    nan_policy: Literal["propagate", "raise"]
    tf32: bool
    loss: Literal["cross_entropy", "mse"]
    ntk: Literal["full", "trace"]
    top_k: int | None


class AllFields(Fields, total=False):
    """All fields of a request."""

    returns: Return | Sequence[Return]
    weights: Any

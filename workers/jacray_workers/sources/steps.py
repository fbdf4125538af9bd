"""Specs of what is done to inputs before the model sees them: each step looks at one sample at a time."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, field_validator, model_validator

from jacray_workers.errors import SpecError
from jacray_workers.spec_parts import Finite, Spec, SpecPath, Whole
from jacray_workers.validation import ByKind

DtypeName = Literal[
    "float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"
]  # fmt: skip
Numbers = Finite | Annotated[tuple[Finite, ...], Field(min_length=1)]
Axis = Annotated[int, Field(strict=True, ge=-16, le=16)]
Index = Annotated[int, Field(strict=True, ge=0, lt=2**48)]


class _Step(Spec):
    of: str | None = Field(default=None, description="the named input that this applies to; all of them by default")


class Cast(_Step):
    """Change the number type. Numbers that the type cannot hold are refused."""

    kind: Literal["cast"] = "cast"
    dtype: DtypeName


class Scale(_Step):
    """`x * factor + offset`."""

    kind: Literal["scale"] = "scale"
    factor: Finite = 1.0
    offset: Finite = 0.0


class Reshape(_Step):
    """Give each sample another shape; one size may be -1."""

    kind: Literal["reshape"] = "reshape"
    shape: Annotated[tuple[Annotated[int, Field(strict=True, ge=-1, le=2**48)], ...], Field(max_length=16)]

    @field_validator("shape")
    @classmethod
    def _one_is_free(cls, shape: tuple[int, ...]) -> tuple[int, ...]:
        if shape.count(-1) > 1 or 0 in shape:
            raise SpecError("", "must hold sizes of at least 1, and -1 at most once", list(shape))
        return shape


class Normalise(_Step):
    """`(x - mean) / std`, with one number for all or one for each place along an axis."""

    kind: Literal["normalise"] = "normalise"
    mean: Numbers = 0.0
    std: Numbers = 1.0
    axis: Whole = Field(default=1, description="the axis that lists of numbers run along; 0 is the batch")

    @field_validator("std")
    @classmethod
    def _is_positive(cls, std: Any) -> Any:
        if any(not s > 0 for s in (std if isinstance(std, tuple) else (std,))):
            raise SpecError("", "must be greater than 0", std)
        return std


class Select(_Step):
    """Some places along an axis: columns of a table, channels of an image."""

    kind: Literal["select"] = "select"
    axis: Axis = Field(default=1, description="0 is the batch, which `range` cuts")
    indices: Annotated[tuple[Index, ...], Field(min_length=1)] | None = None
    range: tuple[Index, Index] | None = Field(default=None, description="[start, stop]")

    @model_validator(mode="after")
    def _one_way(self) -> Select:
        if (self.indices is None) == (self.range is None):
            raise SpecError("", "must have either indices or range", None)
        if self.range is not None and self.range[0] >= self.range[1]:
            raise SpecError("range", "must be [start, stop] with start before stop", list(self.range))
        return self


class Permute(_Step):
    """Reorder the axes of a sample: `[2, 0, 1]` puts the last axis of an image first."""

    kind: Literal["permute"] = "permute"
    axes: Annotated[tuple[Annotated[int, Field(strict=True, ge=0, lt=16)], ...], Field(min_length=1, max_length=16)] = (
        Field(description="a sample's axes, counted without the batch, in their new order")
    )

    @field_validator("axes")
    @classmethod
    def _each_once(cls, axes: tuple[int, ...]) -> tuple[int, ...]:
        if sorted(axes) != list(range(len(axes))):
            raise SpecError("", f"must name each of the axes 0 to {len(axes) - 1} once", list(axes))
        return axes


class Clip(_Step):
    """Keep numbers between two bounds."""

    kind: Literal["clip"] = "clip"
    min: Finite | None = None
    max: Finite | None = None

    @model_validator(mode="after")
    def _bounds_fit(self) -> Clip:
        if self.min is None and self.max is None:
            raise SpecError("", "must have min, max or both", None)
        if self.min is not None and self.max is not None and self.min >= self.max:
            raise SpecError("min", "must be less than max", self.min)
        return self


class OneHotStep(_Step):
    """Whole numbers as rows of zeros with a one at their place, float32: `(N, ...)` becomes `(N, ..., classes)`."""

    kind: Literal["one_hot"] = "one_hot"
    classes: Annotated[int, Field(strict=True, ge=1, le=2**24)]


class Tokenize(_Step):
    """Texts as token ids, by a tokenizer file of the `tokenizers` library.

    The inputs become `input_ids` and `attention_mask`, int64 `(N, length)` each; without a mask, the ids take the place
    of the texts. Longer texts are cut, shorter ones padded at the end.
    """

    kind: Literal["tokenize"] = "tokenize"
    path: SpecPath = Field(description="a tokenizer.json")
    length: Annotated[int, Field(strict=True, ge=1, le=2**20)] = Field(description="tokens a sample")
    mask: StrictBool = Field(default=True, description="give attention_mask as well")
    special_tokens: StrictBool = Field(default=True, description="add those that the model was trained with")


AnyStep = Cast | Scale | Reshape | Normalise | Select | Permute | Clip | OneHotStep | Tokenize
Step = Annotated[AnyStep, ByKind()]

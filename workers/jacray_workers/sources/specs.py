"""Input specs: where a batch comes from, which part of it, and what is done to it first. Nothing is read here.

Every spec is frozen, forbids unknown keys and is told apart by its `kind`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from jacray_workers.errors import SpecError
from jacray_workers.spec_parts import Finite, Seed, Spec, SpecPath, Whole
from jacray_workers.validation import ByKind

FloatName = Literal["float64", "float32", "bfloat16", "float16"]
DtypeName = Literal[
    "float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"
]  # fmt: skip
Size = Annotated[int, Field(strict=True, ge=1, le=2**48)]
Shape = Annotated[tuple[Size, ...], Field(min_length=1, max_length=16)]
Numbers = Finite | tuple[Finite, ...]


class _Step(Spec):
    of: str | None = Field(default=None, description="the named input that this applies to; all of them by default")


class Cast(_Step):
    """Change the number type."""

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


Step = Annotated[Cast | Scale | Reshape | Normalise, ByKind()]


class _Input(Spec):
    range: tuple[Annotated[int, Field(strict=True, ge=0)], Annotated[int, Field(strict=True, ge=1)]] | None = Field(
        default=None, description="[start, stop]: these samples only"
    )
    preprocess: tuple[Step, ...] = Field(default=(), description="applied in order")

    @field_validator("range")
    @classmethod
    def _start_comes_first(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and value[0] >= value[1]:
            raise SpecError("", "must be [start, stop] with start before stop", list(value))
        return value


class Random(_Input):
    """Random numbers: one tensor, or several by name."""

    kind: Literal["random"] = "random"
    shape: Shape | dict[str, Shape] = Field(description="the batch first; or a shape for each named input")
    seed: Seed = 0
    distribution: Literal["normal", "uniform"] = "normal"
    dtype: FloatName = "float32"


class Digits(_Input):
    """The 1,797 handwritten digits that ship with scikit-learn: `(N, 1, 8, 8)` from 0 to 1, classes as `target`."""

    kind: Literal["digits"] = "digits"


class Inline(_Input):
    """Numbers written in the spec: nested lists, or a mapping from names to nested lists."""

    kind: Literal["inline"] = "inline"
    values: Any
    dtype: DtypeName = "float32"
    fields: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_nested_evenly(self) -> Inline:
        from jacray_workers.nested import tensor_of

        named = self.values if isinstance(self.values, dict) else {"": self.values}
        if not named:
            raise SpecError("values", "must hold at least one named input", self.values)
        for name, value in named.items():
            tensor_of(value, f"values.{name}".rstrip("."))
        for name, value in self.fields.items():
            tensor_of(value, f"fields.{name}")
        return self


class _File(_Input):
    path: SpecPath = Field(description="relative to the file that this stands in")


class Npy(_File):
    """One array in numpy's format, mapped rather than read."""

    kind: Literal["npy"] = "npy"


class _Arrays(_File):
    arrays: str | tuple[str, ...] | None = Field(
        default=None, description="which arrays are inputs: one name, or several for named inputs"
    )
    fields: dict[str, str] = Field(
        default_factory=dict, description="other arrays by the name they get, such as {target: labels}"
    )


class Npz(_Arrays):
    """Several arrays in numpy's zipped format."""

    kind: Literal["npz"] = "npz"


class Safetensors(_Arrays):
    """Several tensors in a safetensors file."""

    kind: Literal["safetensors"] = "safetensors"


class Zarr(_Arrays):
    """A zarr array, or arrays of a zarr group."""

    kind: Literal["zarr"] = "zarr"


class Csv(_File):
    """A table of numbers with a header line; the columns become one tensor `(N, columns)`."""

    kind: Literal["csv"] = "csv"
    columns: tuple[str, ...] | None = Field(default=None, min_length=1, description="all that are no fields by default")
    fields: dict[str, str] = Field(
        default_factory=dict, description="columns by the name they get, such as {target: label}"
    )
    delimiter: str = Field(default=",", min_length=1, max_length=1)


class OneHot(Spec):
    """A weight per sample that picks one output: a one for the class in a field of the inputs, zeros elsewhere."""

    kind: Literal["one_hot"] = "one_hot"
    of: str = Field(description="a field of the inputs that holds whole numbers, such as target")
    classes: Annotated[int, Field(strict=True, ge=1, le=2**31)] | None = Field(
        default=None, description="the model's number of outputs by default"
    )


AnyInput = Random | Digits | Inline | Npy | Npz | Safetensors | Zarr | Csv
InputSpec = Annotated[AnyInput, ByKind()]
DirectionSpec = Annotated[OneHot | AnyInput, ByKind()]

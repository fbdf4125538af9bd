"""Input specs: where a batch comes from, which part of it, and what is done to it first. Nothing is read here.

Every spec is frozen, forbids unknown keys and is told apart by its `kind`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from jacray_workers.errors import SpecError
from jacray_workers.sources.steps import DtypeName, Step
from jacray_workers.spec_parts import Seed, Spec, SpecPath
from jacray_workers.validation import ByKind

FloatName = Literal["float64", "float32", "bfloat16", "float16"]
Size = Annotated[int, Field(strict=True, ge=1, le=2**48)]
Shape = Annotated[tuple[Size, ...], Field(min_length=1, max_length=16)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=200)]
Column = Annotated[str, Field(min_length=1, max_length=1000)]
Row = Annotated[int, Field(strict=True, ge=0, lt=2**53)]


class _Input(Spec):
    range: tuple[Row, Row] | None = Field(default=None, description="[start, stop]: these samples only")
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
    shape: Shape | Annotated[dict[Name, Shape], Field(min_length=1)] = Field(
        description="the batch first; or a shape for each named input"
    )
    seed: Seed = 0
    distribution: Literal["normal", "uniform"] = "normal"
    dtype: FloatName = "float32"


class Digits(_Input):
    """The 1,797 handwritten digits that ship with scikit-learn: `(N, 1, 8, 8)` from 0 to 1, classes as `target`."""

    kind: Literal["digits"] = "digits"


class Sklearn(_Input):
    """One of scikit-learn's bundled sets as float32 `(N, features)`, what is to be predicted as the field `target`."""

    kind: Literal["sklearn"] = "sklearn"
    name: Literal["breast_cancer", "diabetes", "digits", "iris", "linnerud", "wine"]


class Inline(_Input):
    """Numbers written in the spec: nested lists, or a mapping from names to nested lists. Or texts, for a tokenizer."""

    kind: Literal["inline"] = "inline"
    values: Any
    dtype: DtypeName = "float32"
    fields: dict[Name, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_nested_evenly(self) -> Inline:
        from jacray_workers.nested import check_nested

        named = self.values if isinstance(self.values, dict) else {"": self.values}
        if not named:
            raise SpecError("values", "must hold at least one named input", self.values)
        for name, value in named.items():
            if not is_texts(value):
                check_nested(value, f"values.{name}".rstrip("."))
            if name and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise SpecError("values", "must have names of letters, digits and underscores", name)
        for name, value in self.fields.items():
            check_nested(value, f"fields.{name}")
        return self


def is_texts(value: Any) -> bool:
    """Whether these are texts, one a sample."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(v, str) for v in value)


class _File(_Input):
    path: SpecPath = Field(description="relative to the file that this stands in")


class Npy(_File):
    """One array in numpy's format."""

    kind: Literal["npy"] = "npy"


class _Arrays(_File):
    arrays: Column | Annotated[tuple[Column, ...], Field(min_length=1)] | None = Field(
        default=None, description="which arrays are inputs: one name, or several for named inputs"
    )
    fields: dict[Name, Column] = Field(
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


Columns = Column | Annotated[tuple[Column, ...], Field(min_length=1)]


class _Table(_File):
    columns: Columns | Annotated[dict[Name, Columns], Field(min_length=1)] | None = Field(
        default=None,
        description="one column as it is, several as one tensor (N, columns), or a mapping for named inputs; "
        "by default all that are no fields",
    )
    fields: dict[Name, Column] = Field(
        default_factory=dict, description="columns by the name they get, such as {target: label}"
    )


class Csv(_Table):
    """A table of numbers or texts with a header line."""

    kind: Literal["csv"] = "csv"
    delimiter: Annotated[str, Field(pattern=r"^[^\r\n\"A-Za-z0-9.+-]$")] = ","
    dtype: FloatName = Field(default="float32", description="of columns of numbers")


class Parquet(_Table):
    """A parquet file, or a folder of them. Columns hold numbers, texts, or lists of numbers, all of one length."""

    kind: Literal["parquet"] = "parquet"


class _Pictures(Spec):
    mode: Literal["L", "RGB", "RGBA"] = Field(default="RGB", description="L for one channel, grey")
    size: (
        tuple[Annotated[int, Field(strict=True, ge=1, le=2**15)], Annotated[int, Field(strict=True, ge=1, le=2**15)]]
        | None
    ) = Field(default=None, description="[height, width]: scale every image to this")


class Datasets(_Table, _Pictures):
    """A folder that Hugging Face's `datasets` wrote with `save_to_disk`. Columns of images are decoded."""

    kind: Literal["datasets"] = "datasets"
    split: Annotated[str, Field(pattern=r"^\w+([.-]\w+)*$", max_length=200)] | None = Field(
        default=None, description="of a folder with several"
    )


class Images(_File, _Pictures):
    """A folder of images in the order of their names, `(N, channels, height, width)` from 0 to 1, float32.

    Where the images lie in folders, each folder is a class, and the field `target` has its number.
    """

    kind: Literal["images"] = "images"


class OneHot(Spec):
    """A weight per sample that picks one output: a one for the class in a field of the inputs, zeros elsewhere."""

    kind: Literal["one_hot"] = "one_hot"
    of: str = Field(description="a field of the inputs that holds whole numbers, such as target")
    classes: Annotated[int, Field(strict=True, ge=1, le=2**31)] | None = Field(
        default=None, description="the model's number of outputs by default"
    )


AnyInput = (
    Random | Digits | Sklearn | Inline | Npy | Npz | Safetensors | Zarr | Csv | Parquet | Datasets | Images
)  # fmt: skip
OneInput = Annotated[AnyInput, ByKind()]
InputSpec = Annotated[AnyInput | dict[Name, OneInput], ByKind()]
"""One source, or several by the names that the model's inputs get."""
DirectionSpec = Annotated[OneHot | AnyInput, ByKind()]
